"""What perturbations that are crafted together each have of their own: start, order, labels.

Enters: a seed and a target class, or none, for each. Leaves: random signs, an order of the images
for every epoch, the classes its loss is of. None depends on what is crafted beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def start_signs(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """+-1, float32 [K, C, H, W], of each seed's own generator."""
    choices = np.array([-1.0, 1.0], dtype=np.float32)
    signs = [np.random.default_rng(seed).choice(choices, size=shape) for seed in seeds]
    return torch.from_numpy(np.stack(signs))


def orders(seeds: Sequence[int], n: int, *, epoch: int, shuffle: bool) -> Tensor:
    """The order of n images of each seed in an epoch, int64 [K, n]; unshuffled: as they lie."""
    if not shuffle:
        return torch.arange(n).expand(len(seeds), -1)
    found = [np.random.default_rng((seed, epoch)).permutation(n) for seed in seeds]
    return torch.from_numpy(np.stack(found))


def wanted(labels: np.ndarray, targets: Sequence[int | None]) -> Tensor:
    """The class each perturbation's loss is of, int64 [K, n]: the label, or its own target."""
    found = torch.from_numpy(labels).expand(len(targets), -1).clone()
    for k, target in enumerate(targets):
        if target is not None:
            found[k] = target
    return found

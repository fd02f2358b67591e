"""What chance decides while perturbations are crafted: their starts and their orders of images.

Enters: seeds, one a perturbation. Leaves: random signs, and an order for every epoch; each depends
on nothing but its own seed, whatever is crafted beside it.
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

"""Choosing among candidates: several starts of an optimiser, and patterns that no gradient made.

Enters: perturbations of one request, a part of the attack images. Leaves: the best of them there,
judged as a device receives it: whole levels added to 8-bit images. Images of the evaluation never
take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.crafting.perturbation import to_levels

LAST, CHESSBOARD, START, WAVE = "last iterate", "chessboard", "start", "wave"
MIN_IMAGES, MAX_IMAGES = 64, 1024
IMAGES_A_CALL = 256


@dataclass(frozen=True)
class Chosen:
    """The best candidate."""

    values: np.ndarray
    """float32 [C, H, W], as the candidate came; whole levels if a pattern could have been it."""
    name: str
    """`last iterate`, `chessboard`, `start` or `wave`."""
    scores: tuple[float, ...]
    """Share of the images on which the last iterate of each start succeeds."""
    start: int = 0
    """The start it comes from; the first for a pattern."""


def selection_images(n: int) -> int:
    """How many of n attack images choose among the candidates: an eighth, within limits."""
    return min(n, max(MIN_IMAGES, min(MAX_IMAGES, n // 8)))


def selection_cost(*, images: int, starts: int, patterns: int) -> int:
    """Gradient evaluations a selection is worth: a forward pass counts as half of one."""
    return math.ceil((starts + patterns) * images / 2)


@torch.no_grad()
def select(
    networks: Sequence[Callable[[Tensor], Tensor]],
    images: Tensor,
    labels: Tensor,
    iterates: Sequence[np.ndarray],
    patterns: Mapping[str, np.ndarray],
    *,
    eps: float,
    targeted: bool,
    count: int,
) -> Chosen:
    """The candidate that succeeds on most of the images; in a tie, the optimiser's first.

    Args:
        networks: pixels float [N, C, H, W] in [0, 255] -> logits; of several, each judges an equal
            share of the images.
        images: uint8 [N, C, H, W], the attack images.
        labels: int64 [N], the true classes, or the target class where targeted.
        iterates: float32 [C, H, W] each, in pixel levels: the last one of every start.
        patterns: candidates that no gradient made, by name, +-1 [C, H, W]: they take the whole
            budget, and with them the result is whole levels.
        eps: the budget in pixel levels.
        targeted: whether success is the label predicted, not another one.
        count: how many of the images to use, evenly spread.
    """
    candidates = [(values, LAST) for values in iterates]
    candidates += [(signs * eps, name) for name, signs in patterns.items()]
    used = torch.linspace(0, len(images) - 1, min(count, len(images)), device=images.device).long()
    # Drawn, not dealt in turn: the images may lie in the order of their classes.
    judge = torch.from_numpy(np.random.default_rng(0).permutation(len(used)) % len(networks))
    shares = [used[(judge == i).to(used.device)] for i in range(len(networks))]
    scores = []
    for values, _ in candidates:
        levels = torch.from_numpy(to_levels(values, eps=eps)).to(images.device)
        successes = 0
        for network, share in zip(networks, shares, strict=True):
            for part in share.split(IMAGES_A_CALL):
                attacked = (images[part].to(torch.int16) + levels).clamp_(0, 255).float()
                hit = (network(attacked).argmax(dim=1) == labels[part]) == targeted
                successes += int(hit.sum())
        scores.append(successes / len(used))
    best = scores.index(max(scores))
    values, name = candidates[best]
    if patterns:
        values = to_levels(values, eps=eps).astype(np.float32)
    start = best if best < len(iterates) else 0
    return Chosen(values, name, tuple(scores[: len(iterates)]), start)

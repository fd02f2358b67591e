"""Choosing images: frozen random streams, and subsets that keep or equalise the classes.

Everything returns sorted or explicitly shuffled indices, never images; nothing is copied here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CALIBRATION_SHARE = 0.1
CALIBRATION_MAX = 1000
"""Calibration holds min(10 % of train, 1,000) images: means of activations need no more."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare
class Split:
    """Images of one role. Treat the arrays as read-only: roles may share memory.

    Attributes:
        images: uint8 [N, C, H, W], C-ordered.
        labels: int64 [N], class indices.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def frozen_random(*key: int) -> np.random.RandomState:
    """A random stream that depends on `key` (non-negative integers) and on nothing else.

    RandomState, not Generator: NumPy promises that its streams never change (NEP 19), and these
    draws decide which images an experiment is judged on.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def stratified(
    labels: NDArray[np.int64], count: int, rng: np.random.RandomState
) -> NDArray[np.int64]:
    """Indices (sorted) of `count` images that keep the class proportions of `labels`.

    Quotas are by largest remainder: each class gets floor or ceil of its exact share, ties going
    to the lower class. All of them when `count` is at least len(labels).
    """
    sizes = np.bincount(labels)
    count = min(count, len(labels))
    exact, remainder = np.divmod(sizes * count, len(labels))
    left = count - int(exact.sum())
    exact[np.argsort(-remainder, kind="stable")[:left]] += 1
    return np.sort(_draw(labels, exact, rng))


def balanced(
    labels: NDArray[np.int64],
    count: int,
    rng: np.random.RandomState,
    *,
    at_most: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Indices (shuffled) of `count` images, as many of each class as there can be.

    Class sizes differ by at most one, except for classes that have too few: those give all they
    may, and the others share the rest. Shuffled, because crafting walks its images in order and a
    batch of a single class has a misleading mean gradient.

    Args:
        labels: int64 [N].
        count: images wanted; fewer come back when `at_most` sums to less.
        rng: decides which images, and their order.
        at_most: int64 [classes], how many each class may give; by default all it has.
    """
    room = np.bincount(labels) if at_most is None else at_most
    quota = np.zeros_like(room)
    left = min(count, int(room.sum()))
    while left:
        open_classes = np.flatnonzero(quota < room)
        share = max(left // len(open_classes), 1)
        for c in open_classes[:left]:
            given = min(share, int(room[c] - quota[c]))
            quota[c] += given
            left -= given
    return rng.permutation(_draw(labels, quota, rng))


def hold_out(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, calibration): indices that part `labels`, calibration class-balanced.

    Calibration takes min(10 %, 1,000) of the images, at least one, and never more than a quarter
    of a class (rounded up where it leaves training an image), so that rare classes keep theirs.
    Training indices are sorted. Calibration is empty only when every class has a single image.
    """
    sizes = np.bincount(labels)
    wanted = max(1, min(int(len(labels) * CALIBRATION_SHARE), CALIBRATION_MAX))
    room = np.minimum(-(-sizes // 4), np.maximum(sizes - 1, 0))
    calibration = balanced(labels, wanted, frozen_random(seed, 1), at_most=room)
    kept = np.ones(len(labels), dtype=bool)
    kept[calibration] = False
    return np.flatnonzero(kept), calibration


def _draw(
    labels: NDArray[np.int64], quota: NDArray[np.int64], rng: np.random.RandomState
) -> NDArray[np.int64]:
    """`quota[c]` indices of each class c, in class order."""
    drawn = [
        rng.permutation(np.flatnonzero(labels == c))[:wanted] for c, wanted in enumerate(quota)
    ]
    return np.concatenate(drawn).astype(np.int64)

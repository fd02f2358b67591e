"""Two models compared on all images though a device saw only some of them.

PyTorch predicted all N images of both. On images that the device saw of both, its own predictions
count. On the others it may err where PyTorch does not, or the other way; how many those are, the
sample bounds. A difference is shown if it would be even with all of them held against it.

Enters: who errs where, by PyTorch on all and by the device on a sample. Leaves: a difference and p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from harness.metrics import corrected_uer, mcnemar, most_unseen

Wrong = npt.NDArray[np.bool_]
SHARE = 0.002
"""Probability that the bound on the other images is allowed to fail, at most; p is never below it.
Smaller, and it bounds less."""
FAMILY_SHARE = 0.01
"""The same of a whole family of tests: p is adjusted for their number, and what it is never below
must not be what keeps a large family from showing anything."""

MOST_UNKNOWN = 0.04
"""Share of all images that a sample without a disagreement may leave unknown, for all of them to
be tested: beyond it no difference below eight points would show, which the sample alone does as
well. Of 10,000 images, in a family of 60, 500 leave 0.017, 250 leave 0.034."""


@dataclass(frozen=True)
class Sampled:
    """One model under one perturbation."""

    torch_wrong: Wrong
    """[N]."""
    device_wrong: Wrong
    """[n], on the sample."""
    indices: npt.NDArray[np.int64]
    """[n], the sample's positions, drawn at random."""

    @property
    def rate(self) -> float:
        """Error rate on all images: PyTorch's, corrected by the sample."""
        return corrected_uer(self.torch_wrong, self.device_wrong, self.indices).value


def sampled_difference(first: Sampled, second: Sampled, *, family: int = 1) -> tuple[float, float]:
    """(error rate of the first less the second's over all images, two-sided p).

    p is of exact McNemar on the images that the device saw of both. Where those are many, it is the
    smaller of two, doubled (Bonferroni): the other is of McNemar on all images with as many of
    those not seen turned against the difference as the sample leaves possible, plus the probability
    that there are more (a p-value over a confidence set of the unknown: Berger & Boos 1994).

    Args:
        first: a model under a perturbation.
        second: another, or the same under another, on the same images.
        family: for how many tests p will be adjusted; known before any of them is made.

    Raises:
        ValueError: the two are not of the same images.
    """
    if first.torch_wrong.shape != second.torch_wrong.shape:
        raise ValueError("two models compared on different images")
    value = first.rate - second.rate
    both, here, there = np.intersect1d(first.indices, second.indices, return_indices=True)
    if not both.size:
        return value, 1.0
    seen = first.device_wrong[here], second.device_wrong[there]
    population, share = first.torch_wrong.size, min(SHARE, FAMILY_SHARE / max(1, family))

    def unknown(differing: int) -> int:
        return most_unseen(
            both.size, population=population, confidence=1 - share, differing=differing
        )

    if unknown(0) > MOST_UNKNOWN * population:
        return value, mcnemar(*seen)
    expected = first.torch_wrong[both], second.torch_wrong[both]
    differing = int(np.count_nonzero((seen[0] != expected[0]) | (seen[1] != expected[1])))
    one, other = first.torch_wrong.copy(), second.torch_wrong.copy()
    one[both], other[both] = seen
    more = int(np.count_nonzero(one & ~other))
    less = int(np.count_nonzero(~one & other))
    # Where only one model errs it may be the other alone that does: that counts twice.
    turned = max(more, less) - unknown(differing)
    whole = 1.0
    if 2 * turned > more + less:
        whole = share + float(stats.binomtest(turned, more + less, 0.5).pvalue)
    return value, min(1.0, 2 * min(mcnemar(*seen), whole))

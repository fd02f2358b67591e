"""Intervals and tests where images are not the only thing that could have come out otherwise.

All images of an evaluation share one perturbation, and another crafting seed gives another one.
With several seeds both are resampled together: images and seeds are drawn with replacement,
crossed, as every perturbation met the same images (Owen 2007, the "pigeonhole" bootstrap). Two
methods are compared on the same drawn images, and on the same drawn seeds where they met the same
perturbations. Few seeds make a bootstrap too sure of itself, so its quantiles are widened to
Student's t with the degrees of freedom that Satterthwaite's formula gives the two variances.

Enters: arrays of right and wrong. Leaves: estimates with 95 % intervals and p-values; the same
input gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats

from harness.metrics import wilson

DRAWS = 2000
"""B, resamples of every interval."""
CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Sums of shares that are equal differ by this much at most."""
Values = npt.NDArray[np.float64]
_Statistic = Callable[[Values], Values]


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means with its 95 % interval; `p` is of "it is zero"."""

    value: float
    low: float
    high: float
    p: float
    seeds: int
    """Crafting seeds behind it; with 1 the interval covers the choice of images only."""
    n: int


def mean_over_seeds(wrong: npt.NDArray[np.bool_]) -> Estimate:
    """A rate averaged over crafting seeds.

    Args:
        wrong: bool [S, N], seed by seed on the same N images.

    Raises:
        ValueError: no seed or no image.
    """
    values = _checked(wrong)
    found = _estimate(values, None, same_seeds=False)
    low, high = max(0.0, found.low), min(1.0, found.high)
    if values.min() == values.max():  # all alike: resampling cannot say what others would do
        low, high = wilson(round(found.value * found.n), found.n)
    return Estimate(found.value, low, high, found.p, found.seeds, found.n)


def difference(
    first: npt.NDArray[np.bool_] | Values,
    second: npt.NDArray[np.bool_] | Values,
    *,
    same_seeds: bool,
) -> Estimate:
    """Mean of `first` minus mean of `second`, on the same images.

    Args:
        first: [S, N], of every seed on the same N images; right and wrong, or values per image.
        second: [S', N].
        same_seeds: row s of both is of one perturbation, so that seeds are drawn together.

    Raises:
        ValueError: not the same images, or not the same seeds though they are said to be.
    """
    one, other = _checked(first), _checked(second)
    if one.shape[1] != other.shape[1] or (same_seeds and one.shape != other.shape):
        raise ValueError(f"nothing to pair: {one.shape} and {other.shape}")
    return _estimate(one, other, same_seeds=same_seeds)


def _checked(values: npt.NDArray[np.bool_] | Values) -> Values:
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"need [seeds, images], got {values.shape}")
    return values.astype(np.float64)


def _estimate(first: Values, second: Values | None, *, same_seeds: bool) -> Estimate:
    rng = np.random.default_rng(0)
    n = first.shape[1]
    weights = _image_weights(n)
    if second is not None and same_seeds:
        groups = [first - second]
    else:
        groups = [first] if second is None else [first, -second]
    per_image = np.sum([group.mean(axis=0) for group in groups], axis=0)
    value = float(per_image.mean())
    drawn = np.zeros(DRAWS)
    # Variances of the mean, each with its degrees of freedom: images, then seeds of each method.
    parts = [(float(per_image.var(ddof=1)) / n if n > 1 else 0.0, n - 1)]
    for group in groups:
        seeds = len(group)
        means = weights @ group.T  # [B, S]
        if seeds > 1:
            chosen = rng.integers(0, seeds, size=(DRAWS, seeds))
            drawn += np.take_along_axis(means, chosen, axis=1).mean(axis=1)
            parts.append((float(group.mean(axis=1).var(ddof=1)) / seeds, seeds - 1))
        else:
            drawn += means[:, 0]
    variance = sum(part for part, _ in parts)
    spread = float(drawn.std())
    error = max(math.sqrt(variance), spread)
    total_seeds = min(len(group) for group in groups)
    if spread < ROUNDING:
        return _unanimous(value, seeds=total_seeds, n=n)
    # No variance of images' or of seeds' means: what there is lies in how they go together.
    freedom = (
        variance**2 / sum(part**2 / df for part, df in parts if part > ROUNDING)
        if variance > ROUNDING
        else max(1, min(df for _, df in parts))
    )
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))
    widen = error / spread * quantile / float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    low, high = np.quantile(drawn - value, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    # Counts are whole: without the continuity, a handful of images would seem to be a proof.
    excess = max(0.0, abs(value) - 1 / n)
    return Estimate(
        value=value,
        low=value + widen * float(low),
        high=value + widen * float(high),
        p=float(2 * stats.t.sf(excess / error, freedom)),
        seeds=total_seeds,
        n=n,
    )


def _unanimous(value: float, *, seeds: int, n: int) -> Estimate:
    """Every image says the same: what n images, however they agree, can show (the sign test).

    The interval is of a share of agreeing images from the bound of n out of n (Clopper and Pearson
    1934) to all of them.
    """
    if value == 0.0:
        return Estimate(0.0, 0.0, 0.0, 1.0, seeds, n)
    least = ((1 - CONFIDENCE) / 2) ** (1 / n)
    ends = sorted((value, value * (2 * least - 1)))
    return Estimate(value, ends[0], ends[1], min(1.0, 2 * 0.5**n), seeds, n)


@lru_cache(maxsize=4)
def _image_weights(n: int) -> Values:
    """How often each image is drawn, as shares: float64 [B, N]. The same for every comparison."""
    rng = np.random.default_rng(n)
    counts = np.stack([np.bincount(rng.integers(0, n, size=n), minlength=n) for _ in range(DRAWS)])
    shares: Values = counts / n
    return shares


# --- promised and measured slopes ---------------------------------------------------------------


def agreement(promised: Values, measured: Values) -> Estimate | None:
    """How well a gradient's promises say what the network does: their cosine, by random directions.

    1 where every slope is as promised (up to one factor), 0 where promises say nothing. Over random
    directions this estimates the cosine between the gradient and the network's true one.

    Args:
        promised: float [n, D], slopes that the gradient promises, D directions an image.
        measured: float [n, D], central differences of the network itself.

    Returns:
        The cosine with its bootstrap interval over images, or None where there is no gradient.
    """

    def cosine(weights: Values) -> Values:
        across = weights @ (promised * measured).sum(axis=1)
        own = (weights @ (promised**2).sum(axis=1)) * (weights @ (measured**2).sum(axis=1))
        found: Values = np.divide(across, np.sqrt(own), out=np.zeros_like(across), where=own > 0)
        return found

    return _over_images(cosine, promised, measured)


def slope_ratio(promised: Values, measured: Values) -> Estimate | None:
    """Sum of measured slopes over the sum of promised ones, [n] each; None without a gradient."""

    def ratio(weights: Values) -> Values:
        below = weights @ promised
        above = weights @ measured
        found: Values = np.divide(above, below, out=np.zeros_like(below), where=below != 0)
        return found

    return _over_images(ratio, promised, measured)


def _over_images(statistic: _Statistic, promised: Values, measured: Values) -> Estimate | None:
    n = len(promised)
    if n == 0 or promised.shape != measured.shape or not np.any(promised):
        return None
    if not (np.isfinite(promised).all() and np.isfinite(measured).all()):
        return None
    value = float(statistic(np.full((1, n), 1 / n))[0])
    low, high = np.quantile(statistic(_image_weights(n)), [0.025, 0.975])
    return Estimate(value, float(low), float(high), math.nan, 1, n)

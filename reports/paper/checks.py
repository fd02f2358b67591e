"""The tests behind the verdicts on the paper's claims.

Enters: cells of a `Study`. Leaves: differences with intervals, p-values and one of three states.
A check compares the mean rate of some cells with `factor` times the mean rate of others on the same
images: exact McNemar and Tango's interval for two single perturbations, else the bootstrap of
`harness.bootstrap`. A contrast compares what a check finds on two data sets. p-values are
Holm-adjusted over every check of the page. Intervals are simultaneous over the checks of a claim
(Bonferroni), so that one of many does not decide by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from harness import metrics
from harness.bootstrap import CONFIDENCE, difference, mean_over_seeds
from harness.metrics import UNSEEN
from harness.records import ResultRow
from reports.inference import ALL_IMAGES, ALPHA
from reports.paper.study import Cell
from reports.view import View

MARGIN = 0.05
"""Two rates that differ by less than this are called as good as equal."""
GREATLY = 0.10
"""The same where the paper says "not greatly"."""

Expects = Literal["lower", "higher", "same"]
State = Literal["yes", "no", "open"]


@dataclass(frozen=True)
class Check:
    """The first cells' mean rate is claimed to be lower, higher, or the same as the second's.

    Without second cells the rate stands for itself, as a side of a `Contrast`.
    """

    name: str
    first: tuple[Cell, ...]
    second: tuple[Cell, ...]
    expects: Expects
    factor: float = 1.0
    """Times the second: a claim about a ratio is one about such a difference."""
    margin: float = MARGIN

    @property
    def published(self) -> tuple[float, float]:
        """Both means, from the paper's numbers."""
        return _mean([c.published for c in self.first]), _mean([c.published for c in self.second])

    @property
    def published_difference(self) -> float:
        first, second = self.published
        return first - self.factor * second

    @property
    def supported(self) -> bool:
        """Whether the paper's own numbers are as it says; they come without intervals."""
        found = self.published_difference
        if self.expects == "same":
            return abs(found) <= self.margin
        return found < 0 if self.expects == "lower" else found > 0

    @property
    def missing(self) -> list[str]:
        """What was not measured."""
        return [cell.what for cell in (*self.first, *self.second) if cell.here is None]


@dataclass(frozen=True)
class Contrast:
    """What one check finds on a data set is claimed to be lower or higher than on another."""

    name: str
    first: Check
    first_view: View
    first_title: str
    second: Check
    second_view: View
    second_title: str
    expects: Literal["lower", "higher"]
    factor: float = 1.0
    margin: float = MARGIN

    @property
    def published(self) -> tuple[float, float]:
        return self.first.published_difference, self.second.published_difference

    @property
    def published_difference(self) -> float:
        first, second = self.published
        return first - second

    @property
    def supported(self) -> bool:
        found = self.published_difference
        return found < 0 if self.expects == "lower" else found > 0

    @property
    def missing(self) -> list[str]:
        """What was not measured, and on which data set."""
        sides = (self.first, self.first_title), (self.second, self.second_title)
        return [f"{what} on {title}" for side, title in sides for what in side.missing]


@dataclass(frozen=True)
class Estimated:
    """A check's difference on the images that all of its rows saw."""

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    """Adjusted by `decide`; as estimated, for itself."""
    n: int


@dataclass(frozen=True)
class Decided:
    """A check and what came of it."""

    check: Check | Contrast
    found: Estimated
    state: State


def estimate(view: View, check: Check, *, level: float) -> Estimated | None:
    """The difference with its interval at `level`; None where no image is in all rows."""
    first = _repeats(view, check.first)
    second = _repeats(view, check.second)
    rows = [row for repeats in (*first, *second) for row in repeats]
    predicted = [view.predictions(row) for row in rows]
    known = [p for p in predicted if p is not None]
    if len(known) < len(rows) or not known:
        return None
    seen = (np.stack(known) != UNSEEN).all(axis=0)
    if not seen.any():
        return None
    hits = [[_hits(view, row)[seen] for row in repeats] for repeats in (*first, *second)]
    one = _image_means(hits[: len(first)])
    other = _image_means(hits[len(first) :]) if second else np.zeros_like(one)
    means = float(one.mean()), float(other.mean())
    single = len(first) == len(second) == 1 and check.factor == 1.0
    if single and len(rows) == 2:
        return _exact(hits[0][0], hits[1][0], means, level)
    if len(first) == 1 and not second:
        found = mean_over_seeds(np.stack(hits[0]))
    elif single:  # one perturbation each, of several crafting seeds: they are drawn too
        sides = np.stack(hits[0]), np.stack(hits[1])
        same = [row.uap_sha256 for row in first[0]] == [row.uap_sha256 for row in second[0]]
        found = difference(*sides, same_seeds=same)
    else:
        found = difference(one[None], check.factor * other[None], same_seeds=True)
    wider = _quantile(level) / _quantile(CONFIDENCE)
    return Estimated(
        *means,
        found.value,
        found.value - wider * (found.value - found.low),
        found.value + wider * (found.high - found.value),
        found.p,
        found.n,
    )


def _image_means(hits: list[list[npt.NDArray[np.bool_]]]) -> npt.NDArray[np.float64]:
    """[N], averaged over crafting seeds and then over perturbations."""
    means: npt.NDArray[np.float64] = np.mean([np.mean(h, axis=0) for h in hits], axis=0)
    return means


def _exact(
    one: npt.NDArray[np.bool_],
    other: npt.NDArray[np.bool_],
    means: tuple[float, float],
    level: float,
) -> Estimated:
    gained, lost = int(np.count_nonzero(one & ~other)), int(np.count_nonzero(other & ~one))
    low, high = metrics.paired_difference(
        gained, lost, one.size, population=ALL_IMAGES, confidence=level
    )
    value, p = (gained - lost) / one.size, metrics.mcnemar(one, other)
    return Estimated(*means, value, low, high, p, one.size)


def _repeats(view: View, cells: tuple[Cell, ...]) -> list[tuple[ResultRow, ...]]:
    return [view.repeats(cell.row) for cell in cells if cell.row is not None]


def _hits(view: View, row: ResultRow) -> npt.NDArray[np.bool_]:
    """Where the attack has its way: images misclassified, or predicted as the target."""
    predicted = view.predictions(row)
    assert predicted is not None
    labels = np.asarray(view.evaluation.labels, dtype=np.int64)
    found: npt.NDArray[np.bool_] = (
        predicted != labels if row.target is None else predicted == row.target
    )
    return found


def contrast(check: Contrast, *, level: float) -> Estimated | None:
    """The difference between two data sets, whose images were drawn apart.

    The interval joins those of the sides (MOVER: Zou and Donner 2008), and p is of the same reach
    towards zero, under a normal curve.
    """
    one = estimate(check.first_view, check.first, level=level)
    other = estimate(check.second_view, check.second, level=level)
    if one is None or other is None:
        return None
    value = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    reach = below if value > 0 else above
    z = abs(value) / reach * _quantile(level) if reach else math.inf
    p = float(2 * stats.norm.sf(z)) if value else 1.0
    return Estimated(
        one.value, other.value, value, value - below, value + above, p, min(one.n, other.n)
    )


def state_of(check: Check | Contrast, found: Estimated) -> State:
    """`found.p` is adjusted.

    "Same" is shown by an interval within the margin and refuted by one outside. A direction is
    shown by the test, and refuted by the test the other way or by an interval that leaves less
    than the margin of what is claimed.
    """
    if check.expects == "same":
        if -check.margin < found.low and found.high < check.margin:
            return "yes"
        return "no" if found.low > check.margin or found.high < -check.margin else "open"
    sign = -1.0 if check.expects == "lower" else 1.0
    if found.p < ALPHA:
        return "yes" if sign * found.value > 0 else "no"
    most = max(sign * found.low, sign * found.high)
    return "no" if most < check.margin else "open"


def simultaneous(checks: int) -> float:
    """The level of each of so many intervals that together hold at 95 % (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, checks)


def _quantile(level: float) -> float:
    return float(stats.norm.ppf(0.5 + level / 2))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0

"""Statistical tests behind the report's sentences: nothing is called different without one.

Enters: a `View`. Leaves: comparisons, Pareto fronts, a fleet mix; numbers only. Paired exact
McNemar on raw predictions of the same images, or the hierarchical bootstrap where crafting seeds
are averaged. Of samples, all images count where the files agree with PyTorch
(`reports.agreed`). Holm-adjusted over each family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness import metrics
from harness.bootstrap import difference
from harness.metrics import UNSEEN
from harness.records import PAPER_ORDER, ResultRow
from harness.seeds import key_of
from reports.view import VariantView, View

ALPHA = 0.05
MARGIN = 0.05
"""Five points: a smaller difference, however well shown, changes no one's choice of a method."""
ROUNDING = 1e-9
"""Rates of whole counts that differ by the margin do so but for this."""
ALL_IMAGES = 10**9
"""The images that could have been drawn: an interval is not of these images alone."""
NEAR_CEILING = 0.95
"""Share of the highest possible UER from which attacks can no longer be told apart."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """One variant against a baseline on the same images: difference of error rates, adjusted p."""

    variant: VariantView
    rate: float
    baseline_rate: float
    p: float

    @property
    def difference(self) -> float:
        return self.rate - self.baseline_rate

    @property
    def shown(self) -> bool:
        return self.p < ALPHA

    @property
    def matters(self) -> bool:
        """Whether it is shown, and large enough to choose by."""
        return self.shown and abs(self.difference) >= MARGIN - ROUNDING


Measure = Literal["clean", "white_box", "worst"]


def measured(variant: VariantView, measure: Measure) -> ResultRow | None:
    rows = {"clean": variant.clean, "white_box": variant.white_box, "worst": variant.worst}
    return rows[measure]


def against_baseline(view: View, measure: Measure) -> list[Comparison]:
    """Every variant's error rate against the baseline's; error rates for `clean` too."""
    base = measured(view.baseline, measure) if view.baseline else None
    if base is None:
        return []
    others = [
        (v, row)
        for v in view.variants
        if v is not view.baseline
        and (measure != "worst" or view.comparable(v))
        and (row := measured(v, measure)) is not None
    ]
    return _against(view, base, others)


def against_baseline_at(view: View, eps: float) -> list[Comparison]:
    """The same of white-box rates at any budget."""
    rows = {v.name: row for v in view.variants for row in v.curve if row.eps == eps}
    base = rows.get(view.baseline_name)
    others = [(v, rows[v.name]) for v in view.variants if v.name in rows and v is not view.baseline]
    return [] if base is None else _against(view, base, others)


def _against(
    view: View, base: ResultRow, others: Sequence[tuple[VariantView, ResultRow]]
) -> list[Comparison]:
    _, adjusted = compare_apart(view, [v for v, _ in others], [(row, base) for _, row in others])
    return [
        Comparison(variant, rate_of(row), rate_of(base), p)
        for (variant, row), p in zip(others, adjusted, strict=True)
    ]


def inaccurate(view: View) -> list[Comparison]:
    """Who is shown to give up `MARGIN` or more of the baseline's clean accuracy."""
    return [t for t in against_baseline(view, "clean") if t.matters and t.difference > 0]


def ceiling(view: View) -> float:
    """What a guess errs on: the highest UER that an attack can be expected to reach."""
    return 1 - 1 / max(2, len(view.evaluation.classes))


def near_ceiling(view: View, rate: float) -> bool:
    """Whether a rate leaves others no room to be higher."""
    return rate >= NEAR_CEILING * ceiling(view)


def paired(view: View, pairs: Sequence[tuple[ResultRow, ResultRow]]) -> list[float]:
    """Holm-adjusted p-values of pairs of rows; 1 where no image is in both.

    Exact McNemar where either row is of one perturbation; where crafting seeds are averaged, the
    hierarchical bootstrap, which covers them too.
    """
    return holm([compare(view, *pair).p for pair in pairs])


def adjusted_apart(variants: Sequence[VariantView], p_values: Sequence[float]) -> list[float]:
    """Holm over the experiment's variants, and apart over what the user added to them.

    A model brought with --onnx, or INT8, must not change what is said of the others.
    """
    adjusted = [1.0] * len(p_values)
    for ours in (True, False):
        family = [i for i, v in enumerate(variants) if (v.name in PAPER_ORDER) == ours]
        for i, p in zip(family, holm([p_values[i] for i in family]), strict=True):
            adjusted[i] = p
    return adjusted


def compare_apart(
    view: View, variants: Sequence[VariantView], pairs: Sequence[tuple[ResultRow, ResultRow]]
) -> tuple[list[Difference], list[float]]:
    """The paired tests of one pair of rows a variant, and their p-values by `adjusted_apart`."""
    tests = [compare(view, *pair) for pair in pairs]
    return tests, adjusted_apart(variants, [test.p for test in tests])


@dataclass(frozen=True)
class Difference:
    """UER of one row minus another's on the images both saw; `p` not adjusted."""

    value: float
    p: float
    low: float = -1.0
    """95 % interval, over images and, where there are several, crafting seeds."""
    high: float = 1.0


def compare(view: View, first: ResultRow, second: ResultRow) -> Difference:
    """The paired test of two rows, over images and, where there are several, crafting seeds."""
    key = ("compare", key_of(first), key_of(second))
    if key not in view.memo:
        view.memo[key] = _compare(view, first, second)
    found: Difference = view.memo[key]
    return found


def _compare(view: View, first: ResultRow, second: ResultRow) -> Difference:
    ours, theirs = view.repeats(first), view.repeats(second)
    if len(ours) == len(theirs) == 1:
        pair = view.together(first, second)
        if pair is None:
            return Difference(0.0, 1.0)
        wrong, other = pair.first != pair.labels, pair.second != pair.labels
        gained, lost = (int(np.count_nonzero(x)) for x in (wrong & ~other, other & ~wrong))
        bounds = metrics.paired_difference(gained, lost, wrong.size, population=ALL_IMAGES)
        value, p = float(wrong.mean() - other.mean()), metrics.mcnemar(wrong, other)
        if value * (rate_of(first) - rate_of(second)) < 0:
            p = 1.0  # a sample that leans the other way than the estimates shows neither
        return Difference(value, p, *bounds)
    runs = [view.predictions(row) for row in (*ours, *theirs)]
    stacked = np.stack([run for run in runs if run is not None])
    seen = (stacked != UNSEEN).all(axis=0)
    if len(stacked) < len(runs) or not seen.any():
        return Difference(0.0, 1.0)
    all_wrong = stacked[:, seen] != np.asarray(view.evaluation.labels, dtype=np.int64)[seen]
    same = [row.uap_sha256 for row in ours] == [row.uap_sha256 for row in theirs]
    found = difference(all_wrong[: len(ours)], all_wrong[len(ours) :], same_seeds=same)
    return Difference(found.value, found.p, found.low, found.high)


def mean_difference(
    view: View, first: Sequence[ResultRow], second: Sequence[ResultRow]
) -> Difference:
    """Mean rate of some rows minus that of others, tested over the images that all of them saw.

    The rate is TSR for targeted rows, else UER. Rows are given, images are drawn: it says what
    other images would do under these perturbations, not what other perturbations would.
    """
    groups = []
    labels = np.asarray(view.evaluation.labels, dtype=np.int64)
    seen = np.ones(labels.size, dtype=bool)
    for rows in (first, second):
        every = [repeat for row in rows for repeat in view.repeats(row)]
        hits = []
        for row in every:
            predicted = view.predictions(row)
            if predicted is None:
                return Difference(0.0, 1.0)
            seen &= predicted != UNSEEN
            hits.append(predicted != labels if row.target is None else predicted == row.target)
        groups.append(np.mean(hits, axis=0) if hits else None)
    one, other = groups
    if one is None or other is None or not seen.any():
        return Difference(0.0, 1.0)
    found = difference(one[None, seen], other[None, seen], same_seeds=True)
    return Difference(found.value, found.p)


def bound_of_none(n: int) -> float:
    """No disagreement seen among n bounds their rate (exact, one-sided): (1 - p)^n = alpha."""
    return float(1 - ALPHA ** (1 / n))


def rate_of(row: ResultRow) -> float:
    """Share of images wrong, clean or attacked."""
    if row.uer is not None:
        return row.uer
    return 1.0 - (row.clean_accuracy or 0.0)


@dataclass(frozen=True)
class GapRow:
    """Device against PyTorch for one variant under its white-box perturbation."""

    variant: VariantView
    clean_agreement: float | None
    attacked_agreement: float | None
    torch_uer: float
    uer: float
    disagreements: int
    n: int
    p: float

    @property
    def gap(self) -> float:
        return self.uer - self.torch_uer


def deployment_gaps(view: View) -> list[GapRow]:
    """One row per variant that PyTorch was run on too; p Holm-adjusted over the variants."""
    found = []
    for variant in view.variants:
        row = variant.white_box or variant.worst
        pair = view.answered(row, row, torch=True) if row else None
        if row is None or pair is None:
            continue
        clean = variant.clean.torch_agreement if variant.clean else None
        found.append((variant, row, pair, clean))
    wrong = [(p.first != p.labels, p.second != p.labels) for _, _, p, _ in found]
    tests = [metrics.mcnemar(here, there) for here, there in wrong]
    adjusted = adjusted_apart([v for v, _, _, _ in found], tests)
    return [
        GapRow(
            variant=variant,
            clean_agreement=clean,
            attacked_agreement=row.torch_agreement,
            torch_uer=float(np.mean(there)),
            uer=float(np.mean(here)),
            disagreements=int(np.count_nonzero(pair.first != pair.second)),
            n=here.size,
            p=p,
        )
        for (variant, row, pair, clean), (here, there), p in zip(
            found, wrong, adjusted, strict=True
        )
    ]

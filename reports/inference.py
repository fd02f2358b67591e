"""Statistical tests behind the report's sentences: nothing is called different without one.

Enters: a `View`. Leaves: comparisons, suspicion flags, Pareto fronts, a fleet mix; numbers only.
Paired exact McNemar on raw predictions of the same images, Holm-adjusted over each family
(FACTS H).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linprog

from harness import metrics
from harness.records import CONTROLS, ResultRow
from reports.view import VariantView, View

ALPHA = 0.05
MIN_GAIN_OVER_RANDOM = 3.0
MAX_SATURATED = 0.5

FlagKind = Literal["transfer", "control", "random", "monotone", "saturated"]


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


Measure = Literal["clean", "white_box", "worst"]


def measured(variant: VariantView, measure: Measure) -> ResultRow | None:
    rows = {"clean": variant.clean, "white_box": variant.white_box, "worst": variant.worst}
    return rows[measure]


def against_full(view: View, measure: Measure) -> list[Comparison]:
    """Every variant's error rate against `full`'s; the rates are error rates for `clean` too."""
    base = measured(view.full, measure) if view.full else None
    if base is None:
        return []
    others = [
        (v, row)
        for v in view.variants
        if v.name != "full"
        and (measure != "worst" or view.comparable(v))
        and (row := measured(v, measure)) is not None
    ]
    return [
        Comparison(variant, _rate(row), _rate(base), p)
        for (variant, row), p in zip(
            others, paired(view, [(row, base) for _, row in others]), strict=True
        )
    ]


def paired(view: View, pairs: Sequence[tuple[ResultRow, ResultRow]]) -> list[float]:
    """Holm-adjusted McNemar p-values of pairs of rows; 1 where no image is in both."""
    return holm([_mcnemar(view, first, second) for first, second in pairs])


def _mcnemar(view: View, first: ResultRow, second: ResultRow) -> float:
    pair = view.together(first, second)
    if pair is None:
        return 1.0
    return metrics.mcnemar(pair.first != pair.labels, pair.second != pair.labels)


def bound_of_none(n: int) -> float:
    """No disagreement seen among n bounds their rate (exact, one-sided): (1 - p)^n = alpha."""
    return float(1 - ALPHA ** (1 / n))


def _rate(row: ResultRow) -> float:
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
        pair = view.together(row, row, runtime="torch") if row else None
        if row is None or pair is None:
            continue
        clean = variant.clean.torch_agreement if variant.clean else None
        found.append((variant, row, pair, clean))
    wrong = [(p.first != p.labels, p.second != p.labels) for _, _, p, _ in found]
    adjusted = holm([metrics.mcnemar(here, there) for here, there in wrong])
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


# --- suspected gradient masking ------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """A reason to doubt a white-box number. What `value` and `reference` are depends on `kind`."""

    kind: FlagKind
    value: float
    reference: float
    other: str = ""
    """Source or control the flag is about; for `monotone`, the two budgets."""
    p: float | None = None
    family: int = 1
    """How many tests the p-value was adjusted over."""


def flags(view: View, variant: VariantView) -> list[Flag]:
    """Signs that a variant's white-box UER understates how vulnerable it is (FACTS H)."""
    own = variant.white_box
    found: list[Flag] = []
    if own is not None and own.uer is not None:
        found += _transfer_flag(view, variant, own)
        found += _control_flag(view, variant, own)
        found += _random_flag(variant, own)
    found += _monotone_flag(variant)
    found += _saturation_flag(view, variant)
    return found


def _transfer_flag(view: View, variant: VariantView, own: ResultRow) -> list[Flag]:
    transfers = variant.transfers
    adjusted = paired(view, [(row, own) for row in transfers])
    better = [
        (row, p)
        for row, p in zip(transfers, adjusted, strict=True)
        if _rate(row) > _rate(own) and p < ALPHA
    ]
    if not better:
        return []
    row, p = max(better, key=lambda pair: _rate(pair[0]))
    return [
        Flag("transfer", _rate(row), _rate(own), row.uap_source or "", p=p, family=len(transfers))
    ]


def _control_flag(view: View, variant: VariantView, own: ResultRow) -> list[Flag]:
    rows = [variant.attacked[c] for c in CONTROLS if c in variant.attacked]
    beating = [row for row in rows if _rate(row) >= _rate(own)]
    if not beating:
        return []
    row = max(beating, key=_rate)
    p = paired(view, [(r, own) for r in rows])[rows.index(row)]
    return [Flag("control", _rate(row), _rate(own), row.uap_source or "", p=p, family=len(rows))]


def _random_flag(variant: VariantView, own: ResultRow) -> list[Flag]:
    random = variant.attacked.get("random")
    if random is None or random.evasion_on_correct is None or own.evasion_on_correct is None:
        return []
    if own.evasion_on_correct >= MIN_GAIN_OVER_RANDOM * random.evasion_on_correct:
        return []
    return [Flag("random", own.evasion_on_correct, random.evasion_on_correct, "random")]


def _monotone_flag(variant: VariantView) -> list[Flag]:
    drops = [
        (low.uer - high.uer, low, high)
        for i, low in enumerate(variant.curve)
        for high in variant.curve[i + 1 :]
        if low.uer is not None
        and high.uer is not None
        and low.uer_low is not None
        and high.uer_high is not None
        and high.uer_high < low.uer_low
    ]
    if not drops:
        return []
    _, low, high = max(drops, key=lambda drop: drop[0])
    return [Flag("monotone", _rate(high), _rate(low), f"{low.eps:g} to {high.eps:g}")]


def saturated_fraction(view: View, variant: VariantView) -> float | None:
    """What the crafting run recorded; metadata is free-form, so anything else is no number."""
    own = variant.white_box
    uap = view.uaps.get(own.uap_sha256 or "") if own else None
    value = uap.meta.get("saturated_fraction") if uap else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= 1 else None


def _saturation_flag(view: View, variant: VariantView) -> list[Flag]:
    """More samples beyond the loss clamp, hence without a gradient, than misclassified images.

    Where the attack has won, a saturated sample is simply one that is misclassified already.
    """
    value, own = saturated_fraction(view, variant), variant.white_box
    if value is None or own is None or value <= max(MAX_SATURATED, _rate(own)):
        return []
    return [Flag("saturated", value, _rate(own))]


# --- choosing ------------------------------------------------------------------------------------


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points no other point beats in both coordinates (less is better), by cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if not front or costs[i][1] < costs[front[-1]][1]:
            front.append(i)
    return front


@dataclass(frozen=True)
class FleetMix:
    """Shares of variants that minimise the worst UER of a single perturbation over the fleet."""

    shares: tuple[tuple[str, float], ...]
    worst: float
    best_single: str
    best_single_worst: float


def fleet_mix(view: View) -> FleetMix | None:
    """The minimax mix over the complete transfer matrix, or None where it is incomplete.

    A model that nothing was crafted on takes part only if it faced every perturbation.

    Minimise t subject to sum_v w_v UER[v, s] <= t for every perturbation s, sum_v w_v = 1.
    """
    sources = sorted({s for v in view.variants for s in v.attacked})
    victims = [v for v in view.variants if all(s in v.attacked for s in sources)]
    incomplete = {v.name for v in view.variants} - {v.name for v in victims}
    if len(victims) < 2 or incomplete.intersection(sources) or len(sources) < 2:
        return None
    uer = np.array([[_rate(v.attacked[s]) for s in sources] for v in victims])  # [V, S]
    n = len(victims)
    solved = linprog(
        c=[0.0] * n + [1.0],
        A_ub=np.hstack([uer.T, -np.ones((len(sources), 1))]),
        b_ub=np.zeros(len(sources)),
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
        method="highs",
    )
    if not solved.success or solved.x is None:
        return None
    shares = [(v.name, float(w)) for v, w in zip(victims, solved.x[:n], strict=True) if w >= 0.005]
    worsts = uer.max(axis=1)
    best = int(np.argmin(worsts))
    return FleetMix(
        shares=tuple(sorted(shares, key=lambda share: -share[1])),
        worst=float(solved.x[n]),
        best_single=victims[best].name,
        best_single_worst=float(worsts[best]),
    )

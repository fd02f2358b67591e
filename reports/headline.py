"""The answer in a few sentences: who survives better than the uncompressed model, if anybody.

Enters: a `View`. Leaves: plain text (escaped where printed). Who is called better or more fragile
is shown to be, and by enough to choose by. Where the baseline errs as often as a guess, a budget
cannot show who errs more, and a smaller one is asked too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from reports.inference import (
    ALPHA,
    MARGIN,
    ROUNDING,
    Comparison,
    against_baseline,
    against_baseline_at,
    ceiling,
    near_ceiling,
    paired,
    rate_of,
)
from reports.view import VariantView, View
from reports.words import epsilon, listed, percent, plural

POOR = 0.5
"""Erring on this share of the images, nobody survived well."""
ENOUGH = f"{100 * MARGIN:.0f} points"


def headline(view: View) -> str:
    """The answer in a sentence or two."""
    rated = [v for v in view.variants if v.worst is not None and view.comparable(v)]
    if not rated or view.reference_eps is None:
        return (
            f"Nothing was attacked yet: {plural(len(view.variants), 'model')} measured on clean"
            " images only, so nothing can be said about robustness."
        )
    at = f"under the worst untargeted perturbation measured at {epsilon(view.reference_eps)}"
    if len(rated) == 1:
        only = rated[0]
        which, rest = "was attacked", ""
        if view.set_apart:
            which = "was attacked in full"
            apart = listed([variant.label for variant in view.set_apart])
            rest = f", since {apart} met other perturbations: `harness run` has all meet the same"
        return (
            f"Only {only.label} {which}: {at} it errs on {_worst(only)} of the images."
            f" There is nothing to compare it with{rest}."
        )
    base = view.baseline_label
    if view.baseline not in rated:
        return f"There is no attacked {base} model to compare with: {at} {_pairwise(view, rated)}"
    tests = sorted(against_baseline(view, "worst"), key=lambda test: test.rate)
    better = [test for test in tests if test.matters and test.difference < 0]
    worse = [test for test in tests if test.matters and test.difference > 0]
    text = _survivors(view, at, better) if better else _no_survivor(view, at, tests)
    if worse:
        verb = "is" if len(worse) == 1 else "are"
        text += f" {names_of(worse)} {verb} shown to be more fragile than {base}."
    text += _price(view, better)
    text += _with_more_room(view, tests)
    spared = [v.label for v in rated if v.white_box is None]
    if spared:
        text += (
            f" Mind that {listed(spared)} faced no perturbation crafted on"
            f" {'itself' if len(spared) == 1 else 'themselves'}, which may do more harm."
        )
    return text


def _pairwise(view: View, rated: list[VariantView]) -> str:
    """Who is shown to differ from whom, of all pairs: Holm over all of them."""
    ordered = sorted(rated, key=_worst_value)
    pairs = list(combinations(ordered, 2))
    rows = [(a.worst, b.worst) for a, b in pairs]
    p_values = paired(view, [(a, b) for a, b in rows if a is not None and b is not None])
    span = listed([f"{v.label} errs on {_worst(v)}" for v in (ordered[0], ordered[-1])])
    shown = [
        f"{a.label} less than {b.label}"
        for (a, b), p in zip(pairs, p_values, strict=True)
        if p < ALPHA and _worst_value(b) - _worst_value(a) >= MARGIN - ROUNDING
    ]
    if not shown:
        return (
            f"{span} of the images, the extremes of what was measured; no difference of {ENOUGH}"
            " or more is shown."
        )
    less = f"Shown to err less, and by {ENOUGH} or more as measured: {listed(shown)}."
    return f"{span} of the images. {less}"


def _survivors(view: View, at: str, better: list[Comparison]) -> str:
    """Who beats the baseline; one is called the best only where it is shown to beat the next."""
    lowest, base = better[0].rate, better[0].baseline_rate
    poor = ", none of them well" if lowest >= POOR and len(better) > 1 else ""
    poor = ", though not well" if lowest >= POOR and len(better) == 1 else poor
    verb = "survives" if len(better) == 1 else "survive"
    text = (
        f"{names_of(better)} {verb} better than {view.compared_with}{poor}: {at}"
        f" {'it errs' if len(better) == 1 else 'they err'} on {rates_of(better)} of the images,"
        f" {view.baseline_label} on {percent(base)}."
    )
    if len(better) > 1:
        first, rest = better[0], better[1:]
        rows = [(first.variant.worst, other.variant.worst) for other in rest]
        p_values = paired(view, [(a, b) for a, b in rows if a is not None and b is not None])
        if all(p < ALPHA for p in p_values):
            text += f" Of these {first.variant.label} is shown to err least."
        elif not any(p < ALPHA for p in p_values):
            text += " Between the first of these and the others no difference is shown."
    return text


def _price(view: View, better: list[Comparison]) -> str:
    """What those who survive better are shown to lose on clean images."""
    survivors = {test.variant.name for test in better}
    paid = [
        test
        for test in against_baseline(view, "clean")
        if test.variant.name in survivors and test.shown and test.difference > 0
    ]
    if not paid:
        return ""
    costs = listed([f"{test.variant.label} errs on {percent(test.rate)}" for test in paid])
    base = f"{view.baseline_label} on {percent(paid[0].baseline_rate)}"
    return f" The price: on clean images {costs}, {base}."


def _no_survivor(view: View, at: str, tests: list[Comparison]) -> str:
    who = f"{tests[0].variant.label} errs" if len(tests) == 1 else "the others err"
    slightly = any(test.shown and test.difference < 0 for test in tests)
    by = f" by {ENOUGH} or more" if slightly else ""
    return (
        f"No {view.other} is shown to survive better than {view.compared_with}{by}: {at}"
        f" {view.baseline_label} errs on {percent(tests[0].baseline_rate)} of the images, {who} on"
        f" {rates_of(tests)}."
    )


def _with_more_room(view: View, tests: Sequence[Comparison]) -> str:
    """Where the baseline is as good as guessing: what a budget says that it half withstands."""
    full = view.baseline
    near = [near_ceiling(view, rate) for rate in (tests[0].baseline_rate, *(t.rate for t in tests))]
    if full is None or not near[0] or any(test.matters for test in tests):
        return ""
    text = f" A guess errs on {percent(ceiling(view))}: this budget leaves"
    text += " no room to differ." if all(near) else f" {full.label} no room to err more."
    clean = rate_of(full.clean) if full.clean is not None else 0.0
    half = (clean + ceiling(view)) / 2
    by_eps = {row.eps: rate_of(row) for row in full.curve if row.eps is not None}
    smaller = {
        eps: rate
        for eps, rate in by_eps.items()
        if eps < (view.reference_eps or 0.0) and not near_ceiling(view, rate)
    }
    if not smaller:
        return text
    eps = min(smaller, key=lambda eps: abs(smaller[eps] - half))
    found = sorted(against_baseline_at(view, eps), key=lambda test: test.rate)
    if not found:
        return text
    text += f" At {epsilon(eps)}, each under its own perturbation, {full.label} errs on"
    text += f" {percent(smaller[eps])} (clean {percent(clean)})"
    less = [test for test in found if test.matters and test.difference < 0]
    more = [test for test in found if test.matters and test.difference > 0]
    if not less and not more:
        return f"{text}; no variant is shown to differ by {ENOUGH} or more."
    enough = f"and by {ENOUGH} or more as measured"
    text += f". Shown to err less, {enough}: {_each(less)};" if less else "."
    if not more:
        return f"{text} none errs so much more."
    return f"{text} {'more' if less else f'Shown to err more, {enough}'}: {_each(more)}."


def _each(tests: list[Comparison]) -> str:
    named = []
    for test in tests:
        clean = test.variant.clean
        of_clean = f", clean {percent(rate_of(clean))}" if clean is not None else ""
        named.append(f"{test.variant.label} ({percent(test.rate)}{of_clean})")
    return listed(named)


def _worst_value(variant: VariantView) -> float:
    row = variant.worst
    return row.uer if row is not None and row.uer is not None else 2.0


def _worst(variant: VariantView) -> str:
    return percent(_worst_value(variant))


def rates_of(tests: Sequence[Comparison]) -> str:
    """From the lowest to the highest rate."""
    low, high = percent(min(t.rate for t in tests)), percent(max(t.rate for t in tests))
    return low if low == high else f"{low} to {high}"


def names_of(tests: Sequence[Comparison]) -> str:
    """Their labels, in the order given."""
    return listed([test.variant.label for test in tests])

"""Deployment advice: which variant under which constraint.

Enters: a `View`. Leaves: plain-text sentences. Advice follows the Pareto front of worst-case UER
against a cost, of those that keep the baseline's clean accuracy; a step along it is called an
improvement only where a paired test shows one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness import metrics
from reports import words
from reports.choosing import pareto_front
from reports.inference import ALPHA, MARGIN, adjusted_apart, holm, inaccurate, paired
from reports.view import VariantView, View
from reports.words import label_of, listed, p_value, percent

Rated = tuple[VariantView, float, float]
"""(variant, cost, worst-case UER)."""


@dataclass(frozen=True)
class Cost:
    """One axis of the trade-off."""

    key: str
    title: str
    phrase: str
    value: Callable[[VariantView], float | None]
    show: Callable[[float | None], str]


def _latency(variant: VariantView) -> float | None:
    return variant.any_row.latency_p50_ms


COSTS = (
    Cost("latency", "Latency p50, ms", "latency", _latency, words.milliseconds),
    Cost("size", "File size", "file size", lambda v: v.any_row.file_bytes, words.size),
    Cost("macs", "MACs an image", "arithmetic", lambda v: v.any_row.macs, words.count),
)


def rated(view: View, cost: Cost) -> list[Rated]:
    """(variant, cost, worst-case UER) of every variant that has both and compares."""
    found = []
    for variant in view.variants:
        value, worst = cost.value(variant), variant.worst
        if not view.comparable(variant) or value is None or worst is None:
            continue
        if worst.uer is not None:
            found.append((variant, float(value), worst.uer))
    return found


def latency_caveat(view: View) -> str:
    """Why latencies must not be compared, or nothing."""
    if view.device.emulated:
        return "an emulator\u2019s time says nothing about the board"
    timed = [v.any_row for v in view.variants if v.any_row.latency_p50_ms is not None]
    if not timed:
        return "no latency was measured"
    if any(row.latency_mode == "quick" for row in timed):
        return words.QUICK
    doubtful = [label_of(row.variant) for row in timed if row.latency_verdict != "VALID"]
    if doubtful:
        return f"not every measurement is valid ({listed(doubtful)})"
    return ""


def not_faster(view: View) -> list[str]:
    """Compression that did not speed up: said outright, since it is what people expect of it."""
    timed = {v.name: v for v in view.variants if _latency(v) is not None}
    full = timed.get(view.baseline_name)
    if view.device.emulated or full is None or len(timed) < 2:
        return []
    baseline = _latency(full) or 0.0
    against = f"Latency p50 against {full.label} ({words.milliseconds(baseline)}):"

    def ratios(variants: Sequence[VariantView]) -> str:
        return listed([f"{v.label} {(_latency(v) or 0.0) / baseline:.2f} times" for v in variants])

    others = [v for v in timed.values() if v is not full]
    sound = [v for v in others if _sound(v)]
    if not _sound(full) or not sound:
        return [f"{against} {ratios(others)}. A hint only: {latency_caveat(view)}."]
    slower, level = [], []
    for variant, p in zip(
        sound, adjusted_apart(sound, [_latency_p(v, full) for v in sound]), strict=True
    ):
        ratio = (_latency(variant) or 0.0) / baseline
        if p < ALPHA and ratio > 1:
            slower.append(f"{variant.label} ({ratio:.2f} times, {p_value(p)})")
        elif p >= ALPHA:
            level.append(f"{variant.label} ({ratio:.2f} times)")
    doubtful = [v for v in others if v not in sound]
    though = ", though compressed" if view.baseline_name == "full" else ""
    text = f" shown to be slower{though}: {listed(slower)}." if slower else ""
    text += f" No difference shown: {listed(level)}." if level else ""
    text += f" A hint only, not validly measured: {ratios(doubtful)}." if doubtful else ""
    return [against + text] if text else []


def _latency_p(first: VariantView, second: VariantView) -> float:
    """Of no difference, from the medians of processes; 1 where one has no raw timing."""
    if first.timing is None or second.timing is None:
        return 1.0
    return metrics.latency_difference(first.timing[1].medians_ms, second.timing[1].medians_ms)


def _sound(variant: VariantView) -> bool:
    """Whether its latency may be compared at all."""
    row = variant.any_row
    return not row.emulated and row.latency_mode == "full" and row.latency_verdict == "VALID"


def by_constraint(view: View) -> list[str]:
    """One sentence or two for each cost."""
    said, poor = [], {test.variant.name for test in inaccurate(view)}
    for cost in COSTS:
        points = rated(view, cost)
        if len(points) < 2:
            continue
        left_out = ""
        if cost.key == "latency":
            sound = [p for p in points if _sound(p[0])]
            if len(sound) < 2:
                said.append(f"No advice on latency: {latency_caveat(view)}.")
                continue
            if len(sound) < len(points):
                doubtful = listed([p[0].label for p in points if not _sound(p[0])])
                left_out = f" Left out, measurement not valid: {doubtful}."
            points = sound
        kept = [p for p in points if p[0].name not in poor]
        price = _at_a_price(view, cost, [p for p in points if p[0].name in poor])
        text = _advice(view, cost, kept) if kept else f"No advice on {cost.phrase}."
        said.append(text + price + left_out)
    accurate = max(
        (v for v in view.variants if v.clean and v.clean.clean_accuracy is not None),
        key=lambda v: (v.clean.clean_accuracy or 0.0) if v.clean else 0.0,
        default=None,
    )
    if said and accurate is not None and accurate.clean is not None:
        robust = f", {percent(accurate.worst.uer)} wrong at worst" if accurate.worst else ""
        said.append(
            f"If clean accuracy is all that counts: the highest measured is {accurate.label}\u2019s"
            f" ({percent(accurate.clean.clean_accuracy)}{robust}){_accuracy_lead(view, accurate)}."
        )
    return said


def _accuracy_lead(view: View, accurate: VariantView) -> str:
    """Whom it is shown to beat; it was picked for its lead, so all are tested together."""
    others = [(v, v.clean) for v in view.variants if v.clean is not None and v is not accurate]
    if not others or accurate.clean is None:
        return ""
    p_values = paired(view, [(accurate.clean, clean) for _, clean in others])
    level = [v.label for (v, _), p in zip(others, p_values, strict=True) if p >= ALPHA]
    if not level:
        return ", shown to be higher than every other\u2019s"
    if len(level) == len(others):
        return "; no difference to any other is shown"
    return f"; no difference shown to {listed(level)}"


def _advice(view: View, cost: Cost, points: list[Rated]) -> str:
    front = [points[i] for i in pareto_front([(value, uer) for _, value, uer in points])]
    chosen = _most_accurate(view, front[0], points)
    if chosen is not front[0]:  # what errs less than that one for more
        left = [chosen, *(p for p in points if p[1] > chosen[1])]
        front = [left[i] for i in pareto_front([(value, uer) for _, value, uer in left])]
    cheapest, value, uer = chosen
    text = (
        f"If {cost.phrase} is the limit, take {cheapest.label}: {cost.show(value)},"
        f" {percent(uer)} wrong at worst{_accuracy(cheapest)}."
    )
    text += _as_cheap(view, chosen, points)
    if cost.key == "latency":
        text += _as_fast(cheapest, points)
    steps = front[1:]
    if not steps:
        return text + " None that costs more was measured to err less at worst."
    pairs = [(v.worst, cheapest.worst) for v, _, _ in steps]
    adjusted = paired(view, [(a, b) for a, b in pairs if a is not None and b is not None])
    shown = [(s, p) for s, p in zip(steps, adjusted, strict=True) if p < ALPHA]
    for (variant, dearer, rate), p in shown:
        text += (
            f" {variant.label} for {cost.show(dearer)} lowers that to {percent(rate)}"
            f" ({p_value(p)})."
        )
    if not shown:
        text += " No difference shown to the more expensive ones on the front"
        text += f" ({listed([v.label for v, _, _ in steps])})."
    return text


def _at_a_price(view: View, cost: Cost, dropped: list[Rated]) -> str:
    """What was no candidate, since it is shown to give up too much of the clean accuracy."""
    if not dropped:
        return ""
    named = [
        f"{v.label} ({cost.show(value)}{_accuracy(v)}, {percent(uer)} wrong at worst)"
        for v, value, uer in sorted(dropped, key=lambda p: p[1])
    ]
    return (
        f" Not considered, right on clean images less often than {view.baseline_label} by"
        f" {100 * MARGIN:.0f} points or more: {listed(named)}."
    )


def _most_accurate(view: View, chosen: Rated, points: list[Rated]) -> Rated:
    """Of those that cost the same and are no worse under attack, the best on clean images.

    Another than the one that errs least is taken only where it is shown to be more accurate, and
    errs less than `MARGIN` more under attack, no difference shown.
    """
    least, base = chosen[2], chosen[0].clean
    same = [
        p for p in points if p[1] == chosen[1] and p[0] is not chosen[0] and p[2] < least + MARGIN
    ]
    pairs = [(v.worst, chosen[0].worst) for v, _, _ in same]
    level = paired(view, [(a, b) for a, b in pairs if a is not None and b is not None])
    cleans = [(v.clean, base) for v, _, _ in same]
    better = paired(view, [(a, b) for a, b in cleans if a is not None and b is not None])
    if base is None or not len(level) == len(better) == len(same):
        return chosen
    shown = [
        p
        for p, attacked, clean in zip(same, level, better, strict=True)
        if attacked >= ALPHA and clean < ALPHA and _right(p) > _right(chosen)
    ]
    return max(shown, key=_right, default=chosen)


def _right(rated: Rated) -> float:
    clean = rated[0].clean
    return (clean.clean_accuracy or 0.0) if clean is not None else 0.0


def _as_cheap(
    view: View,
    chosen: Rated,
    points: list[Rated],
) -> str:
    """Variants of the same cost that no test sets apart from the one named."""
    same = [v for v, value, _ in points if value == chosen[1] and v is not chosen[0]]
    pairs = [(v.worst, chosen[0].worst) for v in same]
    adjusted = paired(view, [(a, b) for a, b in pairs if a is not None and b is not None])
    level = [v.label for v, p in zip(same, adjusted, strict=True) if p >= ALPHA]
    if not level:
        return ""
    verb = "costs" if len(level) == 1 else "cost"
    return f" {listed(level)} {verb} the same, with no difference shown."


def _as_fast(chosen: VariantView, points: list[Rated]) -> str:
    """Variants whose latency is not shown to differ from the lowest measured."""
    others = [v for v, _, _ in points if v is not chosen]
    p_values = holm([_latency_p(v, chosen) for v in others])
    level = [v.label for v, p in zip(others, p_values, strict=True) if p >= ALPHA]
    return f" No difference in latency is shown to {listed(level)}." if level else ""


def _accuracy(variant: VariantView) -> str:
    if variant.clean is None:
        return ""
    return f", {percent(variant.clean.clean_accuracy)} right on clean images"

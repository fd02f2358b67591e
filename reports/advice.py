"""Deployment advice: which variant under which constraint, and what a mixed fleet would gain.

Enters: a `View`. Leaves: plain-text sentences. Advice follows the Pareto front of worst-case UER
against a cost; a step along it is called an improvement only where a paired test shows one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.sources import FLEET
from reports import words
from reports.inference import ALPHA, fleet_mix, paired, pareto_front
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
    full = timed.get("full")
    if view.device.emulated or full is None or len(timed) < 2:
        return []
    baseline = _latency(full) or 0.0
    slower = [
        f"{v.label} ({(_latency(v) or 0.0) / baseline:.2f} times)"
        for v in timed.values()
        if v is not full and (_latency(v) or 0.0) > baseline
    ]
    if not slower:
        return []
    text = (
        f"Compressed, yet not faster here than {full.label} ({words.milliseconds(baseline)} p50):"
        f" {listed(slower)}."
    )
    caveat = latency_caveat(view)
    return [f"{text} A hint only: {caveat}." if caveat else text]


def _sound(variant: VariantView) -> bool:
    """Whether its latency may be compared at all."""
    row = variant.any_row
    return not row.emulated and row.latency_mode == "full" and row.latency_verdict == "VALID"


def by_constraint(view: View) -> list[str]:
    """One sentence or two for each cost."""
    said = []
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
        said.append(_advice(view, cost, points) + left_out)
    accurate = max(
        (v for v in view.variants if v.clean and v.clean.clean_accuracy is not None),
        key=lambda v: (v.clean.clean_accuracy or 0.0) if v.clean else 0.0,
        default=None,
    )
    if said and accurate is not None and accurate.clean is not None:
        robust = f", {percent(accurate.worst.uer)} wrong at worst" if accurate.worst else ""
        said.append(
            f"If clean accuracy is all that counts, {accurate.label} has the highest here"
            f" ({percent(accurate.clean.clean_accuracy)}{robust}); see the tests above before"
            " reading a small lead as one."
        )
    return said


def _advice(view: View, cost: Cost, points: list[Rated]) -> str:
    front = [points[i] for i in pareto_front([(value, uer) for _, value, uer in points])]
    cheapest, value, uer = front[0]
    text = (
        f"If {cost.phrase} is the limit, take {cheapest.label}: {cost.show(value)},"
        f" {percent(uer)} wrong at worst{_accuracy(cheapest)}."
    )
    text += _as_cheap(view, front[0], points)
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


def _accuracy(variant: VariantView) -> str:
    if variant.clean is None:
        return ""
    return f", {percent(variant.clean.clean_accuracy)} right on clean images"


def fleet(view: View) -> list[str]:
    """What a perturbation made for one variant does to the others, and one made for all."""
    return _carried_over(view) + _made_for_all(view)


def _made_for_all(view: View) -> list[str]:
    rates = [
        (row.uer, v.label)
        for v in view.variants
        if (row := v.attacked.get(FLEET)) is not None and row.uer is not None
    ]
    if not rates or view.reference_eps is None:
        return []
    low, high = min(rates), max(rates)
    text = f"One perturbation crafted on all variants at once reaches {percent(low[0])} UER"
    if len(rates) > 1:
        mean = sum(rate for rate, _ in rates) / len(rates)
        text += f" on {low[1]} and {percent(high[0])} on {high[1]}, {percent(mean)} on average"
    else:
        text += f" on {low[1]}"
    return [f"{text}: the attacker needs no knowledge of which variant a device runs."]


def _carried_over(view: View) -> list[str]:
    carried: dict[str, list[tuple[float, str]]] = {}
    for victim in view.variants:
        for row in victim.transfers:
            if row.uer is not None and row.uap_source is not None:
                carried.setdefault(row.uap_source, []).append((row.uer, victim.label))
    if not carried:
        return []
    means = {s: sum(u for u, _ in rates) / len(rates) for s, rates in carried.items()}
    strongest = max(means, key=lambda s: means[s])
    weakest = min(means, key=lambda s: means[s])
    low, high = min(carried[strongest]), max(carried[strongest])
    reach = f"{percent(low[0])} UER on {low[1]}"
    if len(carried[strongest]) > 1:
        reach = (
            f"{percent(means[strongest])} UER on average over the other variants"
            f" ({percent(low[0])} on {low[1]}, {percent(high[0])} on {high[1]})"
        )
    said = [
        f"An attacker who extracts one device attacks the others too: the perturbation crafted on"
        f" {label_of(strongest)} carries over best, {reach}."
    ]
    if weakest != strongest:
        said[0] += f" That of {label_of(weakest)} carries over least ({percent(means[weakest])})."
    mix = fleet_mix(view)
    if mix is None:
        said.append("The transfer matrix is incomplete, so no mix of variants is computed.")
    elif mix.best_single_worst - mix.worst < 0.005:
        said.append(
            f"Mixing variants buys nothing here: against any single perturbation measured, a fleet"
            f" of {label_of(mix.best_single)} alone errs on at most"
            f" {percent(mix.best_single_worst)}, as low as any mix."
        )
    else:
        shares = listed([f"{share:.0%} {label_of(name)}" for name, share in mix.shares])
        said.append(
            f"A fleet of {shares} would err on at most {percent(mix.worst)} under any single"
            f" perturbation measured, against {percent(mix.best_single_worst)} for"
            f" {label_of(mix.best_single)} alone (minimax mix, point estimates on these images;"
            " an attacker who optimises against the mix may do better)."
        )
    return said

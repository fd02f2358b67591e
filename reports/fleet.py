"""What one perturbation does to a fleet: carried over from one model, or crafted on all of them.

Enters: a `View`. Leaves: plain-text sentences; nothing is said to carry over without a test.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations

from harness.records import ResultRow
from harness.sources import FLEET
from reports.choosing import fleet_mix, incomplete
from reports.inference import ALPHA, holm, inaccurate, mean_difference, rate_of
from reports.view import View
from reports.words import label_of, listed, percent


def fleet(view: View) -> list[str]:
    """What a perturbation made for one variant does to the others, and one made for all."""
    return _carried_over(view) + _made_for_all(view)


def _made_for_all(view: View) -> list[str]:
    rows = [row for v in view.variants if (row := v.attacked.get(FLEET)) is not None]
    if not rows or view.reference_eps is None:
        return []
    low, high = min(rows, key=rate_of), max(rows, key=rate_of)
    text = f"One perturbation crafted on all variants at once reaches {percent(rate_of(low))} UER"
    text += f" on {label_of(low.variant)}"
    if len(rows) > 1:
        mean = sum(rate_of(row) for row in rows) / len(rows)
        text += f" and {percent(rate_of(high))} on {label_of(high.variant)}"
        text += f", {percent(mean)} on average"
    return [f"{text}: the attacker needs no knowledge of which variant a device runs."]


def _carried_over(view: View) -> list[str]:
    carried = _carried(view)
    if not carried:
        return []
    means = {s: sum(rate_of(r) for r in rows) / len(rows) for s, rows in carried.items()}
    strongest = max(means, key=lambda s: means[s])
    low, high = min(carried[strongest], key=rate_of), max(carried[strongest], key=rate_of)
    reach = f"{percent(low.uer)} UER on {label_of(low.variant)}"
    if len(carried[strongest]) > 1:
        reach = (
            f"{percent(means[strongest])} UER on average over the other variants"
            f" ({percent(low.uer)} on {label_of(low.variant)}, {percent(high.uer)} on"
            f" {label_of(high.variant)})"
        )
    what = f"{label_of(strongest)} reaches {reach}"
    said = [_who_extracts(view, carried, strongest, what)]
    mix = fleet_mix(view)
    if mix is None:
        why = "the transfer matrix is incomplete"
        if not incomplete(view):
            why = "fewer than two models keep the baseline\u2019s clean accuracy"
        said.append(f"No mix of variants is computed: {why}.")
    elif mix.best_single_worst - mix.worst < 0.005 or not mix.shown:
        gain = (
            "buys nothing" if mix.best_single_worst - mix.worst < 0.005 else "is not shown to gain"
        )
        said.append(
            f"Mixing variants {gain} here: against any single perturbation of the matrix, a fleet"
            f" of {label_of(mix.best_single)} alone errs on at most"
            f" {percent(mix.best_single_worst)}, the best mix on {percent(mix.worst)} of the very"
            " images it was chosen on."
        )
    else:
        shares = listed([f"{share:.0%} {label_of(name)}" for name, share in mix.shares])
        said.append(
            f"A fleet of {shares} would err on at most {percent(mix.worst)} under any single"
            f" perturbation of the matrix, against {percent(mix.best_single_worst)} for"
            f" {label_of(mix.best_single)} alone (minimax mix; a gain is shown on images that it"
            " was not chosen on; an attacker who optimises against the mix may do better)."
        )
    return said


def _carried(view: View) -> dict[str, list[ResultRow]]:
    """By source, the rows of the models that met every other source: their means compare.

    A file that met one perturbation must not decide whose carries over most, nor one that guesses,
    nor a perturbation that only some models met. Where no model met all, all rows are there.
    """
    rows = {v.name: {r.uap_source: r for r in v.transfers if r.uap_source} for v in view.variants}
    crafted_on = [v.name for v in view.variants if v.white_box is not None]
    met = Counter(source for name in crafted_on or rows for source in rows[name])
    sources = {source for source, count in met.items() if count == max(met.values())}
    guesses = {test.variant.name for test in inaccurate(view)}
    victims = [name for name, there in rows.items() if sources - {name} <= there.keys()]
    if not victims:
        victims, sources = list(rows), set(met)
    carried: dict[str, list[ResultRow]] = {}
    for name in [v for v in victims if v not in guesses] or victims:
        for source, row in rows[name].items():
            if row.uer is not None and source in sources:
                carried.setdefault(source, []).append(row)
    return carried


def _who_extracts(
    view: View, carried: dict[str, list[ResultRow]], strongest: str, what: str
) -> str:
    """Whether the strongest of what carries over is shown to do anything at all.

    It was picked for its strength, so every source is tested against clean images with it.
    """
    clean = {v.name: v.clean for v in view.variants}
    before = {
        source: [found for row in rows if (found := clean[row.variant]) is not None]
        for source, rows in carried.items()
    }
    if any(len(before[source]) < len(rows) for source, rows in carried.items()):
        return f"The perturbation crafted on {what}; not compared with clean images."
    tests = [mean_difference(view, rows, before[source]) for source, rows in carried.items()]
    adjusted = dict(zip(carried, holm([test.p for test in tests]), strict=True))
    value = dict(zip(carried, (test.value for test in tests), strict=True))[strongest]
    if adjusted[strongest] < ALPHA and value > 0:
        return (
            "An attacker who extracts one device attacks the others too: the perturbation crafted"
            f" on {what}{_most_carried(view, carried, strongest)}."
        )
    rate = sum(rate_of(row) for row in before[strongest]) / len(before[strongest])
    return (
        f"No perturbation is shown to carry over: the strongest, crafted on {what}, where"
        f" {percent(rate)} are wrong on clean images."
    )


def _most_carried(view: View, carried: dict[str, list[ResultRow]], strongest: str) -> str:
    """Whether the highest average is shown to be one, of all pairs of sources.

    Each mean leaves its own source out, so two sources are compared on the victims of both.
    """
    sources = sorted(carried)
    pairs = list(combinations(sources, 2))
    found = []
    for first, second in pairs:
        both = {r.variant for r in carried[first]} & {r.variant for r in carried[second]}
        rows = [[r for r in carried[s] if r.variant in both] for s in (first, second)]
        found.append(mean_difference(view, *rows))
    p_values = holm([difference.p for difference in found])
    beaten = []
    for (first, second), difference, p in zip(pairs, found, p_values, strict=True):
        ahead = difference.value if first == strongest else -difference.value
        if strongest in (first, second) and p < ALPHA and ahead > 0:
            beaten.append(second if first == strongest else first)
    if not pairs:
        return ""
    if not beaten:
        return ", the highest measured; no source is shown to carry over less"
    if len(beaten) == len(sources) - 1:
        return ", shown to be more than any other source\u2019s on the victims both met"
    return f", shown to be more than that of {listed([label_of(s) for s in beaten])}"

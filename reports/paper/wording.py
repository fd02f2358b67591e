"""Judged claims as the page prints them: what was claimed, found there and found here.

Enters: judged claims of a `Study`. Leaves: plain strings and tables of text, escaped where printed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reports.estimates import sample_of
from reports.inference import ALPHA
from reports.method import TextTable
from reports.paper.checks import Check, Contrast, Decided, State
from reports.paper.judging import Judged, Met, Word, family_sizes
from reports.paper.study import Study
from reports.signals import masking_verdicts
from reports.words import interval_of_points, listed, p_value, percent, plural, points, span

TONES: dict[Word, str] = {
    "holds here": "yes",
    "does not hold here": "no",
    "undecided here": "open",
    "cannot be judged here": "none",
}
NAMED = 3
"""Comparisons of a demand that are named one by one; of more, their number and range."""
_STATES: dict[State, str] = {"yes": "shown", "no": "refuted", "open": "open"}
_OF_PART: dict[State, str] = {"yes": "shown", "no": "does not hold", "open": "undecided"}


@dataclass(frozen=True)
class Part:
    """A demand: what is claimed, by the paper's numbers, and here."""

    words: str
    paper: str
    here: str


@dataclass(frozen=True)
class ClaimText:
    """A claim on the page."""

    anchor: str
    title: str
    quote: str
    section: str
    word: Word
    tone: str
    why: str
    elsewhere: bool
    """Whether the paper says it of the other data set only."""
    own: str
    """Whether the paper's own numbers are as it says."""
    parts: tuple[Part, ...]
    remark: str
    rule: str
    caution: str
    table: TextTable | None


def claim_texts(study: Study, judged: list[Judged]) -> list[ClaimText]:
    return [
        ClaimText(
            anchor=j.claim.anchor,
            title=j.claim.title,
            quote=j.claim.quote,
            section=j.claim.section,
            word=j.word,
            tone=TONES[j.word],
            why=j.why,
            elsewhere=study.published.key not in j.claim.datasets,
            own=_own_numbers(j),
            parts=tuple(_part(met, alone=len(j.met) == 1) for met in j.met),
            remark=_remark(study, j),
            rule=j.claim.rule,
            caution=j.claim.caution,
            table=_table(j),
        )
        for j in judged
    ]


def lead(study: Study, judged: list[Judged]) -> str:
    """The page in one or two sentences."""
    words = Counter(j.word for j in judged)
    where = study.title + (f" with {study.beside.title} beside it" if study.beside else "")
    able = len(judged) - words["cannot be judged here"]
    if not able:
        return (
            f"None of the paper\u2019s {len(judged)} claims looked at can be judged from what was"
            f" measured on {study.title}: what is missing is said with each."
        )
    holds, fails, neither = (
        words[word] for word in ("holds here", "does not hold here", "undecided here")
    )
    return (
        f"Of {len(judged)} claims of the paper, {able} can be judged on {where}:"
        f" {plural(holds, 'holds', 'hold')} here, {plural(fails, 'does', 'do')} not,"
        f" {plural(neither, 'is', 'are')} undecided."
    )


def tests_text(study: Study, judged: list[Judged]) -> str:
    """How the verdicts were reached."""
    own, between = family_sizes(judged)
    apart = ""
    if between:
        apart = (
            " Between the data sets, whose images were drawn apart, the intervals of both sides are"
            f" joined (MOVER); these {plural(between, 'test')} are a family of their own."
        )
    given = ""
    if (sample := sample_of(study.view)) is not None and sample.judged_by_torch:
        given = (
            f" Exported models were given {span(sample.fewest, sample.most)} of the images and"
            " predicted what PyTorch does, every time: predictions here are PyTorch\u2019s, of all"
            " images."
        )
    return (
        f"Claims are judged at \u03b5 = {study.eps:g}/255, targeted ones at"
        f" {study.targeted_eps:g}/255, from raw predictions of the same images: exact McNemar for"
        " two perturbations, a bootstrap over images where rates are averaged or scaled (over"
        " crafting seeds too where each side is one perturbation of several). All"
        f" {plural(own, 'test')} on this data set are one Holm family, at"
        f" {percent(ALPHA)}; the intervals of a claim hold together at 95 % (Bonferroni). A"
        " direction is refuted where the other one is shown, or where the interval"
        f" leaves less than 5 points of it (none, where the claim is about a ratio).{apart}{given}"
    )


def _own_numbers(judged: Judged) -> str:
    return "are as it says" if judged.supported else "are not as it says, by this rule"


def _part(met: Met, *, alone: bool) -> Part:
    """`alone`: the verdict on the claim is the one on this."""
    checks = met.demand.checks
    words = met.demand.words[:1].upper() + met.demand.words[1:]
    if met.decided and not alone:
        words += f": {_OF_PART[met.state]}"
    if len({(check.first, check.second) for check in checks}) == 1 < len(checks):
        # One pair of rates within bounds: their ratio says it.
        found = [(d.found.first, d.found.second) for d in met.decided[:1]]
        return Part(words, _times(*checks[0].published), "".join(_times(*pair) for pair in found))
    differences = [check.published_difference for check in checks]
    if len(checks) > NAMED:
        count = sum(check.supported for check in checks)
        paper = f"{count} of {len(checks)} as claimed; differences {_span(differences)}."
        return Part(words, paper, _here_many(met))
    paper = _points_of([c.name for c in checks], [points(value) for value in differences])
    here = [
        f"{points(d.found.value)} [{interval_of_points(d.found.low, d.found.high)}], {_state(d)}"
        for d in met.decided
    ]
    return Part(words, paper, _points_of([c.name for c in checks], here) if here else "")


def _points_of(names: list[str], values: list[str]) -> str:
    """Such as: PP2 white-box +4.6; PP3 white-box +0.1 (points)."""
    return "; ".join(f"{n} {v}" for n, v in zip(names, values, strict=True)) + " (points)."


def _times(first: float, second: float) -> str:
    ratio = f", {first / second:.2f} times as much" if second else ""
    return f"{percent(first)} against {percent(second)}{ratio}."


def _here_many(met: Met) -> str:
    if not met.decided:
        return ""
    states = Counter(d.state for d in met.decided)
    said = [f"{states['yes']} of {len(met.decided)} shown"]
    said += [f"{states['no']} refuted"] if states["no"] else []
    said += [f"{states['open']} open"] if states["open"] else []
    return f"{listed(said)}; differences {_span([d.found.value for d in met.decided])}."


def _span(values: list[float]) -> str:
    return f"{points(min(values))} to {points(max(values))} points"


def _remark(study: Study, judged: Judged) -> str:
    """What this report knows beside the tests."""
    if judged.claim.anchor == "q-masking":
        words = {
            v.variant.label: v.word
            for v in masking_verdicts(study.view)
            if v.variant.method == "apot"
        }
        said = listed([f"{label} {word}" for label, word in words.items()])
        return f"This report\u2019s own verdicts on gradient masking: {said}." if said else ""
    return ""


def _table(judged: Judged) -> TextTable | None:
    """Every comparison of a claim; the paper's alone where it could not be made here."""
    head: tuple[str, ...] = ("Compared", "Paper", "Difference, points")
    decided = judged.decided
    checks = [check for met in judged.met for check in met.demand.checks]
    if not checks:
        return None
    if not decided:
        return TextTable(head, tuple(_published_cells(check) for check in checks))
    head = (*head, "Here", "Difference, points", "Interval", "Adjusted p", "As claimed")
    return TextTable(head, tuple(_published_cells(d.check) + _cells(d) for d in decided))


def _published_cells(check: Check | Contrast) -> tuple[str, ...]:
    return (
        check.name,
        _both(check, *check.published),
        points(check.published_difference),
    )


def _cells(decided: Decided) -> tuple[str, ...]:
    found = decided.found
    return (
        _both(decided.check, found.first, found.second),
        points(found.value),
        interval_of_points(found.low, found.high),
        p_value(found.p),
        _state(decided),
    )


def _state(decided: Decided) -> str:
    """A direction that is refuted without the other one being shown: how little is left of it."""
    check, found = decided.check, decided.found
    if decided.state != "no" or check.expects == "same" or not check.margin:
        return _STATES[decided.state]
    return "the other way" if found.p < ALPHA else f"less than {100 * check.margin:g} points"


def _pair(first: float, second: float, factor: float) -> str:
    times = "" if factor == 1.0 else f"{factor:g} \u00d7 "
    return f"{percent(first)} vs {times}{percent(second)}"


def _both(check: Check | Contrast, first: float, second: float) -> str:
    """The two that are compared: rates, or effects on two data sets."""
    if isinstance(check, Contrast) and check.first.second:
        return f"{points(first)} vs {points(second)} points"
    return _pair(first, second, check.factor)

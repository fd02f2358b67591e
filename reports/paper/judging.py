"""A verdict on each of the paper's claims, for this run's data set, or for both with one beside it.

Enters: a `Study`. Leaves: `Judged` claims: numbers and one of four words. A demand that all of its
checks must meet is met when all are shown and fails when one is refuted; one that most must meet is
met when more than half are shown and fails when half are refuted. A claim holds when every demand
is met, does not hold when one fails, else it is undecided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from reports.inference import holm
from reports.paper.checks import (
    Check,
    Contrast,
    Decided,
    Estimated,
    State,
    contrast,
    estimate,
    simultaneous,
    state_of,
)
from reports.paper.claims import CLAIMS, Claim
from reports.paper.demands import Demand
from reports.paper.study import Study, unlike
from reports.words import listed, plural

Word = Literal["holds here", "does not hold here", "undecided here", "cannot be judged here"]
SHOWN_MISSING = 3


@dataclass(frozen=True)
class Met:
    """A demand and what came of its checks; `decided` is empty where they cannot be made."""

    demand: Demand
    supported: bool
    """By the paper's own numbers."""
    decided: tuple[Decided, ...]
    state: State


@dataclass(frozen=True)
class Judged:
    """A claim, the verdict, and why where there is none."""

    claim: Claim
    word: Word
    why: str
    supported: bool
    """Whether the paper's own numbers are as it says, by the same rule without intervals."""
    met: tuple[Met, ...]

    @property
    def decided(self) -> tuple[Decided, ...]:
        return tuple(d for met in self.met for d in met.decided)


def judge(study: Study) -> list[Judged]:
    """Every claim: those that can be judged here first, each group in the paper's order."""
    demands = {claim.anchor: _demands(study, claim) for claim in CLAIMS}
    reasons = {c.anchor: _why_not(study, c, demands[c.anchor]) for c in CLAIMS}
    found: dict[str, list[Estimated]] = {}
    for claim in CLAIMS:
        if reasons[claim.anchor]:
            continue
        checks = [check for demand in demands[claim.anchor] for check in demand.checks]
        level = simultaneous(len(checks))
        estimates = [_estimate(study, check, level=level) for check in checks]
        known = [e for e in estimates if e is not None]
        if len(known) < len(checks):
            reasons[claim.anchor] = "the perturbations compared met no image in common"
        else:
            found[claim.anchor] = known
    # Tests between data sets are a family of their own: the same on the page of either.
    for between in (False, True):
        family = [anchor for anchor in found if _between(demands[anchor]) == between]
        adjusted = iter(holm([e.p for anchor in family for e in found[anchor]]))
        for anchor in family:
            found[anchor] = [replace(e, p=next(adjusted)) for e in found[anchor]]
    judged = [_judged(c, demands[c.anchor], found.get(c.anchor), reasons[c.anchor]) for c in CLAIMS]
    return sorted(judged, key=lambda j: j.word == "cannot be judged here")


def _estimate(study: Study, check: Check | Contrast, *, level: float) -> Estimated | None:
    if isinstance(check, Contrast):
        return contrast(check, level=level)
    return estimate(study.view, check, level=level)


def family_sizes(judged: list[Judged]) -> tuple[int, int]:
    """The sizes of the page's Holm families: on its data set, and between both."""
    decided = [d for j in judged for d in j.decided]
    between = sum(isinstance(d.check, Contrast) for d in decided)
    return len(decided) - between, between


def _between(demands: list[Demand]) -> bool:
    return any(isinstance(check, Contrast) for demand in demands for check in demand.checks)


def _demands(study: Study, claim: Claim) -> list[Demand]:
    """With this run's rows if the paper says it of this data set, else with its numbers only."""
    here = study.published.key in claim.datasets
    return claim.demands(study if here else study.about(claim.datasets[0]))


def _why_not(study: Study, claim: Claim, demands: list[Demand]) -> str:
    """Why a claim cannot be judged; empty where it can."""
    if study.published.key not in claim.datasets:
        other = listed([study.paper.datasets[key].title for key in claim.datasets])
        return f"the paper says it of {other}; this report is about {study.published.title}"
    if _between(demands):
        others = [p.title for key, p in study.paper.datasets.items() if key != study.published.key]
        if study.beside is None:
            return f"it needs a run on {listed(others)} too (harness report --beside WORKSPACE)"
        if apart := unlike(study, study.beside):
            return f"the run on {listed(others)} is of another scale: {'; '.join(apart)}"
    missing = sorted({what for d in demands for check in d.checks for what in check.missing})
    if not missing:
        return ""
    shown = missing[:SHOWN_MISSING]
    if more := len(missing) - len(shown):
        shown.append(f"{more:,} more")
    return f"{plural(len(missing), 'measurement is', 'measurements are')} missing: {listed(shown)}"


def _judged(
    claim: Claim, demands: list[Demand], estimates: list[Estimated] | None, why: str
) -> Judged:
    supported = all(_supported(demand) for demand in demands)
    if estimates is None:
        met = tuple(Met(d, _supported(d), (), "open") for d in demands)
        return Judged(claim, "cannot be judged here", why, supported, met)
    left = iter(estimates)
    met = tuple(_met(d, [_decided(check, next(left)) for check in d.checks]) for d in demands)
    states = [m.state for m in met]
    word: Word = "undecided here"
    if "no" in states:
        word = "does not hold here"
    elif all(state == "yes" for state in states):
        word = "holds here"
    return Judged(claim, word, "", supported, met)


def _decided(check: Check | Contrast, found: Estimated) -> Decided:
    return Decided(check, found, state_of(check, found))


def _met(demand: Demand, decided: list[Decided]) -> Met:
    states = [d.state for d in decided]
    yes, no = states.count("yes"), states.count("no")
    state: State = "open"
    if demand.need == "all":
        state = "no" if no else "yes" if yes == len(states) else "open"
    elif 2 * yes > len(states):
        state = "yes"
    elif 2 * no >= len(states):
        state = "no"
    return Met(demand, _supported(demand), tuple(decided), state)


def _supported(demand: Demand) -> bool:
    count = sum(check.supported for check in demand.checks)
    return count == len(demand.checks) if demand.need == "all" else 2 * count > len(demand.checks)

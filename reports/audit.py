"""The audit's write-up: what each undocumented choice changes, with intervals, and what follows.

Enters: the questions, and which images every measured meeting got wrong. Leaves: `audit.md` and
`audit.json`. The same measurements give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.audit.contrasts import Contrast, Means, Meeting, Question, Unit
from harness.audit.questions import QUESTIONS
from harness.bootstrap import Estimate, difference
from reports.inference import ALPHA, MARGIN, NEAR_CEILING, holm
from reports.portable import portable
from reports.words import p_value, points, tenths

Wrong = npt.NDArray[np.bool_]
A_GUESS = 0.9
"""What one errs on, of the paper's ten classes."""
NEAR_A_GUESS = NEAR_CEILING * A_GUESS
Measured = Callable[[Meeting, float | None], Wrong | None]
"""(meeting, budget in 1/255 units; None for clean images) -> whether the model errs, per image."""


@dataclass(frozen=True)
class Finding:
    """One contrast, measured."""

    label: str
    eps: float | None
    """The budget of its perturbations; None where images are clean."""
    units: int
    rate: float
    reference_rate: float
    difference: Estimate
    each: tuple[float, ...]
    """Difference of every pair of units."""
    p_adjusted: float

    @property
    def verdict(self) -> str:
        """raises, lowers, none (smaller than the margin) or undecided."""
        found = self.difference
        if max(-found.low, found.high) < MARGIN:
            return "none"
        if self.p_adjusted < ALPHA and (found.low > 0 or found.high < 0):
            return "raises" if found.value > 0 else "lowers"
        return "undecided"


@dataclass(frozen=True)
class Answer:
    """One question, as far as it was measured."""

    question: Question
    findings: tuple[Finding, ...]
    missing: tuple[tuple[str, float | None], ...]
    """Contrasts that were not measured, by label and budget."""

    @property
    def conclusions(self) -> list[str]:
        """In plain sentences: what each contrast that means something says, by budget."""
        told = {c.label: c.means for c in self.question.contrasts if c.means is not None}
        said: dict[str, list[str]] = {}
        for finding in self.findings:
            if (means := told.get(finding.label)) is not None:
                words = _words(finding, means)
                said.setdefault(words, []).append(f"{_at(finding)}{_size(finding)}")
        return [f"{words} {'; '.join(sizes)}." for words, sizes in said.items()]

    @property
    def shown(self) -> list[str]:
        """A line for each other contrast that raises or lowers its rate."""
        told = {c.label for c in self.question.contrasts if c.means is not None}
        return [
            f"{found.label}: {_at(found)}{_size(found)}"
            for found in self.findings
            if found.label not in told and found.verdict in ("raises", "lowers")
        ]


def _words(finding: Finding, means: Means) -> str:
    if finding.verdict == "undecided":
        return f"Undecided: {finding.label}."
    by_verdict = {"lowers": means.lowers, "raises": means.raises, "none": means.none}
    return by_verdict[finding.verdict]


def _ceiling(found: Finding) -> str:
    """What is equal because no model could do worse says nothing of other budgets."""
    if found.verdict != "none" or min(found.rate, found.reference_rate) < NEAR_A_GUESS:
        return ""
    return f", both near the {100 * A_GUESS:.0f} % of a guess"


def _at(finding: Finding) -> str:
    return "" if finding.eps is None else f"eps {finding.eps:g}: "


def _size(found: Finding) -> str:
    gap = found.difference
    inside = f", inside \u00b1{100 * MARGIN:.0f} points" if found.verdict == "none" else ""
    once = ", of one run" if found.units == 1 else ""
    # An interval beside zero that is not shown: there are many contrasts, or few units.
    doubt = f", {p_value(found.p_adjusted)}" if found.verdict == "undecided" else ""
    size = f"{points(gap.value)} points ({points(gap.low)} to {points(gap.high)})"
    return f"{size}{inside}{_ceiling(found)}{once}{doubt}"


def answers(
    questions: Sequence[Question], measured: Measured, *, budgets: Sequence[float]
) -> list[Answer]:
    """Every question's findings; p-values are Holm-adjusted over each question's contrasts.

    Args:
        questions: what is asked.
        measured: what every model got wrong.
        budgets: in 1/255 units; every contrast under perturbations is one at each.
    """
    found: list[tuple[Question, Contrast, float | None, list[Any], list[Any], Estimate]] = []
    missing: dict[str, list[tuple[str, float | None]]] = {q.name: [] for q in questions}
    asked = [
        (question, contrast, eps)
        for question in questions
        for contrast in question.contrasts
        for eps in ((None,) if contrast.is_clean else budgets)
    ]
    for question, contrast, eps in asked:
        changed = _rates(contrast.changed, measured, eps, crossed=contrast.crossed[0])
        reference = _rates(contrast.reference, measured, eps, crossed=contrast.crossed[1])
        if changed is None or reference is None:
            missing[question.name].append((contrast.label, eps))
            continue
        estimate = difference(np.stack(changed), np.stack(reference), same_seeds=True)
        found.append((question, contrast, eps, changed, reference, estimate))
    adjusted = [0.0] * len(found)
    for question in questions:
        family = [i for i, (asked_of, *_) in enumerate(found) if asked_of is question]
        for i, p in zip(family, holm([found[i][-1].p for i in family]), strict=True):
            adjusted[i] = p
    findings: dict[str, list[Finding]] = {question.name: [] for question in questions}
    for one, p in zip(found, adjusted, strict=True):
        question, contrast, eps, changed, reference, estimate = one
        pairs = zip(changed, reference, strict=True)
        findings[question.name].append(
            Finding(
                label=contrast.label,
                eps=eps,
                units=len(changed),
                rate=float(np.mean([unit.mean() for unit in changed])),
                reference_rate=float(np.mean([unit.mean() for unit in reference])),
                difference=estimate,
                each=tuple(float(c.mean() - r.mean()) for c, r in pairs),
                p_adjusted=p,
            )
        )
    return [Answer(q, tuple(findings[q.name]), tuple(missing[q.name])) for q in questions]


def _rates(
    units: Sequence[Unit], measured: Measured, eps: float | None, *, crossed: bool
) -> list[Any] | None:
    """[N] of every unit: the share of its meetings in which an image is wrong; None if unknown.

    Crossed units share sources: they are replaced by the pseudo-values of their seeds.
    """
    cells: list[list[Any]] = [[measured(meeting, eps) for meeting in unit] for unit in units]
    if any(cell is None for unit in cells for cell in unit):
        return None
    if crossed:
        return _pseudo_values(cells)
    return [np.mean(unit, axis=0) for unit in cells]


def _pseudo_values(cells: Sequence[Sequence[Any]]) -> list[Any]:
    """[N] of every seed: what it adds to the mean over all pairs, as a victim and as a source.

    The mean over pairs of different seeds is a U-statistic, and seed s takes part in it twice. The
    pseudo-values S * mean - (S - 1) * (mean without s) have the mean as their average, and spread
    as independent seeds do (Arvesen 1969, "Jackknifing U-statistics").

    Args:
        cells: [S][S - 1] arrays [N]; row i is victim i, under the sources of the others in order.
    """
    seeds = len(cells)
    pairs = {
        (victim, other if other < victim else other + 1): np.asarray(cell, dtype=np.float64)
        for victim, row in enumerate(cells)
        for other, cell in enumerate(row)
    }
    whole = np.mean(list(pairs.values()), axis=0)
    without = [
        np.mean([cell for pair, cell in pairs.items() if s not in pair], axis=0)
        for s in range(seeds)
    ]
    return [seeds * whole - (seeds - 1) * rest for rest in without]


# --- text ----------------------------------------------------------------------------------------

METHOD = (
    "Rates are UER at the budget named unless they say clean error. Differences are in points,"
    " with 95 % intervals over images and units (hierarchical bootstrap); p-values are"
    " Holm-adjusted over the contrasts and budgets of each question, intervals are of each contrast"
    " by itself: one may leave out 0 where p shows nothing. An interval within"
    f" \u00b1{100 * MARGIN:.0f} points is called no difference that matters.",
    "A unit is what was trained, or crafted, once. With one unit the interval covers images only,"
    " not another run. Where models meet the perturbations of all other seeds, a unit is a seed in"
    " both of its parts (jackknife pseudo-values), since several models meet every perturbation.",
    "A model of ten classes that knows nothing errs on 90 %: rates near that leave no room for a"
    " difference, so \u201cno difference\u201d up there is of this budget only.",
)
WORDS = {
    "raises": "raises",
    "lowers": "lowers",
    "none": "no difference that matters",
    "undecided": "undecided",
}


def markdown_text(found: Sequence[Answer], *, facts: Sequence[str]) -> str:
    """The write-up: facts of the run, a conclusion per question, one table."""
    lines = [
        "# Audit: which undocumented choices carry the paper's conclusions?",
        "",
        *(f"- {fact}" for fact in facts),
        *(f"- {line}" for line in METHOD),
        "",
        "## Conclusions",
        "",
    ]
    for answer in found:
        question = answer.question
        lines += [f"**{question.title}** Theirs: {question.authors}.", ""]
        lines += [f"- {line}" for line in answer.conclusions or ["Not measured."]] + [""]
        if shown := answer.shown:
            lines += ["Shown besides:", "", *(f"- {line}" for line in shown), ""]
    lines += [
        "## All contrasts",
        "",
        "| question | contrast | eps | units | rate | reference | difference | 95 % | each | p | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for answer in found:
        lines += [_row(answer.question.name, finding) for finding in answer.findings]
        lines += [
            f"| {answer.question.name} | {label} | {_budget(eps)} | | | | not measured | | | | |"
            for label, eps in answer.missing
        ]
    return "\n".join(lines) + "\n"


def _budget(eps: float | None) -> str:
    return "clean" if eps is None else f"{eps:g}"


def _row(question: str, finding: Finding) -> str:
    gap = finding.difference
    cells = (
        question,
        finding.label,
        _budget(finding.eps),
        f"{finding.units}",
        tenths(finding.rate),
        tenths(finding.reference_rate),
        points(gap.value),
        f"{points(gap.low)} to {points(gap.high)}",
        " ".join(points(value) for value in finding.each),
        p_value(finding.p_adjusted),
        WORDS[finding.verdict],
    )
    return f"| {' | '.join(cells)} |"


def json_text(found: Sequence[Answer], *, facts: Sequence[str]) -> str:
    """The same as data; rates and differences are fractions."""
    content = {
        "facts": list(facts),
        "margin": MARGIN,
        "questions": [
            {
                "name": answer.question.name,
                "title": answer.question.title,
                "authors": answer.question.authors,
                "conclusions": answer.conclusions,
                "shown_besides": answer.shown,
                "contrasts": [
                    {**asdict(finding), "verdict": finding.verdict} for finding in answer.findings
                ],
                "not_measured": [{"label": label, "eps": eps} for label, eps in answer.missing],
            }
            for answer in found
        ],
    }
    return json.dumps(portable(content), indent=1, ensure_ascii=False) + "\n"


def answers_in(text: str) -> tuple[list[Answer], list[str]]:
    """(answers, facts) of what `json_text` wrote, to be said anew when the words change."""
    content = json.loads(text)
    found = []
    for each in content["questions"]:
        findings = []
        for one in each["contrasts"]:
            values = {k: v for k, v in one.items() if k not in ("verdict", "difference", "each")}
            gap = Estimate(**one["difference"])
            findings.append(Finding(**values, difference=gap, each=tuple(one["each"])))
        missing = tuple((one["label"], one["eps"]) for one in each["not_measured"])
        # Of how many seeds a question is asked changes neither labels nor what they mean.
        found.append(Answer(QUESTIONS[each["name"]](3), tuple(findings), missing))
    return found, content["facts"]

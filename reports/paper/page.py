"""The page "against the paper" and the same as data.

Enters: a `View`. Leaves: HTML and JSON text and the sentence that links to them; None where the
data set is not one of the paper's. Escaped by Jinja like the report, whose templates it shares.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from harness.records import CONTROLS, PAPER_ORDER
from reports.method import TextTable
from reports.page import environment
from reports.paper import figures
from reports.paper.judging import Judged, judge
from reports.paper.study import Cell, Fact, Study, facts, scale_text, study_of
from reports.paper.wording import claim_texts, lead, tests_text
from reports.portable import portable
from reports.view import View
from reports.words import clean_text

SECTIONS = (
    ("answer", "The verdicts"),
    ("claims", "Claim by claim"),
    ("accuracy", "Clean accuracy"),
    ("curves", "Strength of attack"),
    ("transfer", "Transfer"),
    ("targeted", "Targeted attacks"),
    ("controls", "Controls"),
    ("setup", "Behind the numbers"),
)
CHIPS = ("data set", "width", "preset", "protocol", "attack", "images evaluated", "crafting seeds")
"""The facts a reader needs before the first number."""


@dataclass(frozen=True)
class PaperFiles:
    """What `write_report` writes beside the report."""

    html: str
    json: str
    sentence: str
    """For the report, which links to the page."""


def paper_files(view: View, beside: View | None = None) -> PaperFiles | None:
    """The page, where the evaluated data set is CIFAR-10 or SVHN; `beside` is of the other.

    Raises:
        HarnessError: `beside` is not.
    """
    study = study_of(view, beside)
    if study is None:
        return None
    judged = judge(study)
    return PaperFiles(_html(study, judged), _json(study, judged), lead(study, judged))


def _html(study: Study, judged: list[Judged]) -> str:
    setup = facts(study)
    by_name = {fact.name: fact.here for fact in setup}
    return (
        environment()
        .get_template("paper.html")
        .render(
            sections=SECTIONS,
            dataset=clean_text(study.title),
            lead=lead(study, judged),
            chips=[(name, clean_text(by_name[name])) for name in CHIPS],
            scale=clean_text(scale_text(study), 900),
            tests=tests_text(study, judged),
            claims=claim_texts(study, judged),
            accuracy=figures.accuracy_table(study),
            curves=figures.curves(study),
            curve_table=figures.curve_table(study),
            matrices=figures.matrices(study),
            bars=figures.bars(study),
            controls=figures.controls_table(study),
            controls_text=figures.controls_text(study),
            setup=_setup_table(setup),
            caveats=study.published.caveats,
            title=study.paper.title,
            source=study.paper.source,
        )
    )


def _setup_table(setup: list[Fact]) -> TextTable:
    rows = tuple((f.name, clean_text(f.here, 120), f.paper, "differs" if f.differs else "")
                 for f in setup)  # fmt: skip
    return TextTable(("", "Here", "The paper", ""), rows)


# --- data ----------------------------------------------------------------------------------------


def _json(study: Study, judged: list[Judged]) -> str:
    """Every number compared: fractions; absent is null."""
    theirs = study.published
    content = {
        "paper": study.paper.title,
        "source": study.paper.source,
        "dataset": study.title,
        "evaluation_sha256": study.view.evaluation.sha256,
        "beside": _beside(study),
        "setup": [asdict(fact) for fact in facts(study)],
        "comparable_values": not any(fact.differs for fact in facts(study)),
        "claims": [_claim(j) for j in judged],
        "clean_error": [
            {"variant": name, **_compared(study.clean(name))} for name in PAPER_ORDER
        ],
        "white_box_uer": [
            {"eps": eps, "variant": name, **_compared(study.white_box(name, eps))}
            for eps in theirs.white_box_uer
            for name in PAPER_ORDER
        ],
        "transfer_uer": [
            {"eps": eps, "variant": victim, "uap_source": source,
             **_compared(study.attacked(victim, source, eps))}
            for eps in theirs.transfer_uer
            for victim in PAPER_ORDER
            for source in PAPER_ORDER
        ],
        "rank_correlation": [
            {"eps": eps, "cells": cells, "spearman": rho}
            for eps in study.budgets
            for cells, rho in [figures.rank_correlation(study, eps)]
        ],
        "tsr": [
            {"eps": study.targeted_eps, "variant": name, "target": target,
             **_compared(study.targeted(name, target))}
            for name in PAPER_ORDER
            for target in range(10)
        ],
        "controls_uer": [
            {"eps": eps, "variant": name, "control": control,
             **_compared(study.control(name, control, eps))}
            for control in CONTROLS
            for eps in theirs.controls[control]
            for name in PAPER_ORDER
        ],
        "caveats": list(theirs.caveats),
    }  # fmt: skip
    return json.dumps(portable(content), indent=1, allow_nan=False) + "\n"


def _beside(study: Study) -> dict[str, str] | None:
    """The run on the other data set, where the claims about both were judged."""
    if study.beside is None:
        return None
    other = study.beside
    return {"dataset": other.title, "evaluation_sha256": other.view.evaluation.sha256}


def _compared(cell: Cell) -> dict[str, float | None]:
    row, low, high = cell.row, None, None
    if row is not None and row.target is not None:
        low, high = row.tsr_low, row.tsr_high
    elif row is not None and row.uap_sha256 is not None:
        low, high = row.uer_low, row.uer_high
    elif row is not None and row.clean_accuracy_low is not None:
        assert row.clean_accuracy_high is not None
        low, high = 1 - row.clean_accuracy_high, 1 - row.clean_accuracy_low
    found = figures.difference(cell)
    return {"paper": cell.published, "here": cell.here, "here_low": low, "here_high": high,
            "difference": found}  # fmt: skip


def _claim(judged: Judged) -> dict[str, Any]:
    claim = judged.claim
    return {
        "claim": claim.anchor,
        "title": claim.title,
        "quote": claim.quote,
        "section": claim.section,
        "rule": claim.rule,
        "verdict": judged.word,
        "why_not": judged.why or None,
        "papers_own_numbers_agree": judged.supported,
        "comparisons": [
            {
                "compared": d.check.name,
                "claimed": d.check.expects,
                "factor": d.check.factor,
                "margin": d.check.margin,
                "paper": d.check.published_difference,
                "here": d.found.value,
                "low": d.found.low,
                "high": d.found.high,
                "p_adjusted": d.found.p,
                "n": d.found.n,
                "state": d.state,
            }
            for d in judged.decided
        ],
    }

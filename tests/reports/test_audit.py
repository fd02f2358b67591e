"""The audit's write-up on planted measurements: what is there is found, what is not is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.audit.contrasts import Contrast, Meeting, Question
from harness.audit.questions import QUESTIONS, SEEDS
from reports.audit import Answer, answers, json_text, markdown_text
from reports.inference import MARGIN
from reports.words import p_value

N = 4000
FACTS = ["planted"]
BUDGETS = (10.0, 4.0)
ASKED = [make(SEEDS) for make in QUESTIONS.values()]
Wrong = npt.NDArray[np.bool_]
Measured = Callable[[Meeting, float | None], Wrong]


def planted(rate: Callable[[Meeting], float], *, seed: int = 0) -> Measured:
    """Errors of each meeting, at its rate, the same images being hard for all."""
    hardness = np.random.default_rng(seed).random(N)

    def measured(meeting: Meeting, eps: float | None) -> Wrong:
        assert (eps is None) == (meeting.source is None)
        own = np.random.default_rng([seed, *repr((meeting, eps)).encode()]).random(N)
        wrong: Wrong = 0.5 * (hardness + own) < rate(meeting)
        return wrong

    return measured


def question(name: str) -> Question:
    return QUESTIONS[name](SEEDS)


def answered(questions: list[Question], measured: Callable[..., Wrong | None]) -> list[Answer]:
    return answers(questions, measured, budgets=BUDGETS)


def test_where_nothing_differs_nothing_is_claimed() -> None:
    found = answered(ASKED, planted(lambda _meeting: 0.5))
    verdicts = [finding.verdict for answer in found for finding in answer.findings]
    contrasts = [contrast for q in ASKED for contrast in q.contrasts]
    assert len(verdicts) == sum(1 if c.is_clean else len(BUDGETS) for c in contrasts)
    assert set(verdicts) <= {"none", "undecided"}
    assert "none" in verdicts


def test_a_planted_effect_is_found_with_its_sign_and_size() -> None:
    def rate(meeting: Meeting) -> float:
        return 0.7 if meeting.source_arm == "crafted_on_test" else 0.5

    (answer,) = answered([question("split")], planted(rate))
    for finding in answer.findings:
        assert finding.verdict == "raises"
        # P((a + b) / 2 < .7) - P((a + b) / 2 < .5) for uniform a, b.
        assert finding.difference.value == pytest.approx(1 - 2 * 0.3**2 - 0.5, abs=0.02)
        assert finding.difference.low <= finding.difference.value <= finding.difference.high
        assert len(finding.each) == finding.units
    means = answer.question.contrasts[0].means
    assert means is not None
    (line,) = answer.conclusions
    assert line.startswith(f"{means.raises} eps 10: +")


def test_what_is_shown_besides_the_first_contrast_is_said_with_its_training_runs() -> None:
    def rate(meeting: Meeting) -> float:
        changed = meeting.victim_arm.startswith("sfp_keep_") and meeting.source is None
        return 0.7 if changed else 0.5

    (answer,) = answered([question("sfp_training")], planted(rate))
    often, once = answer.shown
    assert often.startswith("clean error: SFP keeps 90 % of the filters: +3")
    assert often.endswith(")")
    assert once.startswith("clean error: SFP keeps 10 % of the filters: +3")
    assert once.endswith("), of one run")
    (line,) = answer.conclusions
    assert line.startswith("Augmentation does not carry what they found of SFP. eps 10: ")
    assert "; eps 4: " in line
    assert line.endswith("), inside \u00b15 points.")
    assert f"Shown besides:\n\n- {often}\n- {once}\n" in markdown_text([answer], facts=FACTS)
    (nothing,) = answered([question("sfp_training")], planted(lambda _meeting: 0.5))
    assert nothing.shown == []
    assert "Shown besides" not in markdown_text([nothing], facts=FACTS)


def test_budgets_that_say_different_things_are_told_apart() -> None:
    harder = planted(lambda meeting: 0.7 if meeting.source_arm == "no_clamp" else 0.5)
    alike = planted(lambda _meeting: 0.5)
    (answer,) = answered(
        [question("loss_and_step")], lambda m, eps: (harder if eps == 4 else alike)(m, eps)
    )
    clamp = [f for f in answer.findings if f.label == "white-box: loss not clamped"]
    assert {finding.eps: finding.verdict for finding in clamp} == {10: "none", 4: "raises"}
    clamp_lines = [line for line in answer.conclusions if "the clamp" in line]
    none, raised = clamp_lines
    assert none.startswith("Leaving out the clamp changes nothing that matters. eps 10: ")
    assert raised.startswith("Leaving out the clamp strengthens the attack. eps 4: +")
    assert any(line.startswith("Full's on the others: loss not clamped: eps 4:")
               for line in answer.shown)  # fmt: skip


def test_another_seed_is_told_from_another_method() -> None:
    """SFP as any other seed: their comparison shows a gap, the one with another Full none."""

    def rate(meeting: Meeting) -> float:
        shared = meeting.victim_arm == meeting.source_arm and meeting.victim != "sfp"
        return 0.8 if shared else 0.4

    (answer,) = answered([question("seeds")], planted(rate))
    verdicts = {finding.label: finding.verdict for finding in answer.findings}
    assert verdicts["Full's on SFP minus on Full itself (their comparison)"] == "lowers"
    assert verdicts["Full's on SFP minus on another seed's Full"] == "none"
    assert any(line.startswith("It harms another seed's Full as little as SFP: no merit")
               for line in answer.conclusions)  # fmt: skip
    assert verdicts["Full's on PP3 of another seed minus on PP3 made from it"] == "lowers"


@pytest.mark.parametrize("seeds", [3, 5])
def test_perturbations_that_several_models_meet_are_not_counted_as_several(seeds: int) -> None:
    """Sources of two kinds that differ by the luck of their seeds alone: shown in one case of 20.

    Were every victim a unit of its own, it would be one in five with three seeds, and every second
    with five.
    """
    question = QUESTIONS["seeds"](seeds)
    label = "SFP's minus another seed's Full's, both on Full"
    contrast = next(c for c in question.contrasts if c.label == label)
    shown, runs, n = 0, 150, 300
    for run in range(runs):
        rng = np.random.default_rng(run)
        hardness = rng.random(n)
        luck: dict[tuple[str, str | None], float] = {}

        def measured(meeting: Meeting, _eps: float | None) -> Wrong:
            parts = ((meeting.victim_arm, "victim"), (meeting.source_arm, meeting.source))
            rate = 0.5 + sum(luck.setdefault(part, rng.normal(0, 0.05)) for part in parts)  # noqa: B023
            wrong: Wrong = 0.5 * (hardness + rng.random(n)) < rate  # noqa: B023
            return wrong

        (answer,) = answers([replace(question, contrasts=(contrast,))], measured, budgets=[10.0])
        gap = answer.findings[0].difference
        shown += not gap.low <= 0 <= gap.high
    assert stats.binomtest(shown, runs, 0.05).pvalue > 0.01


def test_a_difference_of_one_kind_of_source_is_found_across_seeds() -> None:
    def rate(meeting: Meeting) -> float:
        return 0.35 if meeting.source == "sfp" else 0.5

    (answer,) = answered([question("seeds")], planted(rate))
    found = {(f.label, f.eps): f for f in answer.findings}
    finding = found["SFP's minus another seed's Full's, both on Full", 4.0]
    assert finding.verdict == "lowers"
    # P((a + b) / 2 < .35) - P((a + b) / 2 < .5) for uniform a, b.
    assert finding.difference.value == pytest.approx(2 * 0.35**2 - 0.5, abs=0.02)
    assert finding.rate == pytest.approx(2 * 0.35**2, abs=0.02)


def test_units_that_disagree_leave_it_undecided() -> None:
    up = {"full": 0.75, "sfp": 0.3, "pp3": 0.65, "q4": 0.35}

    def rate(meeting: Meeting) -> float:
        return up[meeting.victim] if meeting.source_arm == "crafted_on_test" else 0.5

    (answer,) = answered([question("split")], planted(rate))
    assert answer.findings[0].verdict == "undecided"
    (line,) = answer.conclusions
    assert line.startswith("Undecided: white-box: crafted on the evaluated images themselves. eps")
    assert f", {p_value(answer.findings[0].p_adjusted)}" in line


def test_what_was_not_measured_is_named_and_breaks_nothing() -> None:
    whole = planted(lambda _meeting: 0.5)
    (answer,) = answered(
        [question("seeds")],
        lambda m, eps: None if "seed2" in (m.victim_arm, m.source_arm) else whole(m, eps),
    )
    assert answer.findings == ()
    labels = [contrast.label for contrast in answer.question.contrasts]
    assert answer.missing == tuple((label, eps) for label in labels for eps in BUDGETS)
    assert answer.conclusions == []
    assert "\n- Not measured.\n" in markdown_text([answer], facts=FACTS)
    assert markdown_text([answer], facts=FACTS).count("not measured") == len(answer.missing)


def test_the_files_say_the_same_and_are_the_same_bytes_every_time() -> None:
    measured = planted(lambda meeting: 0.6 if meeting.source_arm == "no_clamp" else 0.5)
    texts = [
        (markdown_text(found, facts=FACTS), json_text(found, facts=FACTS))
        for found in (answered(ASKED, measured) for _ in range(2))
    ]
    assert texts[0] == texts[1]
    markdown, content = texts[0][0], json.loads(texts[0][1])
    for entry in content["questions"]:
        assert entry["conclusions"]
        assert all(f"\n- {line}\n" in markdown for line in entry["conclusions"])
        for contrast in entry["contrasts"]:
            assert f"| {contrast['label']} |" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len({row.count(" | ") for row in rows[1:]}) == 1, "a table with ragged rows"


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_a_verdict_agrees_with_its_interval(one: float, other: float, seed: int) -> None:
    meetings = [Meeting("base", v, "base", v) for v in ("full", "sfp", "pp3", "q4")]
    theirs = [Meeting("base", v, "no_clamp", v) for v in ("full", "sfp", "pp3", "q4")]
    asked = Question(
        *("x", "X?", "did"),
        (Contrast("c", tuple((m,) for m in theirs), tuple((m,) for m in meetings)),),
    )
    measured = planted(lambda m: one if m.source_arm == "no_clamp" else other, seed=seed)
    (answer,) = answers([asked], measured, budgets=[10.0])
    (finding,) = answer.findings
    low, high = finding.difference.low, finding.difference.high
    assert (
        finding.verdict
        in {
            "none": ["none"] if max(-low, high) < MARGIN else ["raises", "lowers", "undecided"],
        }["none"]
    )
    if finding.verdict == "raises":
        assert low > 0
    if finding.verdict == "lowers":
        assert high < 0

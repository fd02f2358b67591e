"""The audit's arms and questions: every arm can be configured, every meeting can be measured."""

from __future__ import annotations

import dataclasses

import pytest

from harness.audit.arms import ARMS, BASE, Arm, arm_named, config_of
from harness.audit.questions import QUESTIONS, Contrast, Question
from harness.config import Config, preset_named
from harness.records import BLOCKS_PER_STAGE, CONTROLS, variant_named

PRESETS = ("quickstart", "reduced", "paper-fast", "paper")


def flat(config: Config) -> dict[str, object]:
    found: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{k}": v for k, v in vars(value).items()}
        else:
            found[field.name] = value
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_changes_what_it_says_and_nothing_else(arm: Arm, preset: str) -> None:
    audited = preset_named(preset)
    before, after = flat(audited), flat(config_of(arm, audited))
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= set(arm.changes)
    assert all(after[key] == value for key, value in arm.changes.items())
    assert changed or preset != "reduced", "an arm that changes nothing is no arm"


def test_the_audited_workspace_is_an_arm_that_changes_nothing() -> None:
    audited = preset_named("reduced")
    assert config_of(arm_named(BASE), audited) == audited


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_every_meeting_is_of_models_that_its_arms_can_have(question: Question) -> None:
    for meeting in question.meetings:
        for arm, name in (
            (meeting.victim_arm, meeting.victim),
            (meeting.source_arm, meeting.source),
        ):
            if name is None or name in CONTROLS:
                continue
            arch = config_of(arm_named(arm), preset_named("reduced")).arch
            stage = variant_named(name).stage
            assert stage is None or stage <= len(BLOCKS_PER_STAGE[arch])


def test_every_arm_is_asked_about_and_names_are_unique() -> None:
    used = {a for q in QUESTIONS for m in q.meetings for a in (m.victim_arm, m.source_arm)}
    assert used == {BASE, *(arm.name for arm in ARMS)}
    labels = [(q.name, c.label) for q in QUESTIONS for c in q.contrasts]
    assert len(set(labels)) == len(labels)
    assert len({q.name for q in QUESTIONS}) == len(QUESTIONS)


def every_contrast() -> list[Contrast]:
    return [contrast for question in QUESTIONS for contrast in question.contrasts]


@pytest.mark.parametrize("contrast", every_contrast(), ids=lambda contrast: contrast.label)
def test_a_contrast_compares_different_things_unit_by_unit(contrast: Contrast) -> None:
    assert contrast.changed
    assert contrast.reference
    assert contrast.changed != contrast.reference
    if contrast.paired:
        assert len(contrast.changed) == len(contrast.reference)
    meetings = [m for unit in contrast.changed for m in unit]
    assert len(set(meetings)) == len(meetings), "one measurement counted twice"
    clean = {m.source is None for m in contrast.meetings}
    assert len(clean) == 1, "clean error against UER"


def test_claims_between_methods_have_three_training_seeds() -> None:
    for question in QUESTIONS:
        if question.name in ("seeds", "methods"):
            for contrast in question.contrasts:
                assert len(contrast.changed) == len(contrast.reference) == 3


def test_across_seeds_nothing_is_shared() -> None:
    (question,) = (q for q in QUESTIONS if q.name == "seeds")
    contrast = next(c for c in question.contrasts if "another seed's Full" in c.label)
    for unit in (*contrast.changed, *contrast.reference):
        assert len({m.victim_arm for m in unit}) == 1
        assert all(m.source_arm != m.victim_arm for m in unit)

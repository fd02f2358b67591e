"""The audit's arms and questions: every arm can be configured, every meeting can be measured."""

from __future__ import annotations

import dataclasses

import pytest

from harness.audit.arms import ARMS, BASE, Arm, arm_named, config_of, in_seed
from harness.audit.contrasts import Contrast, Question
from harness.audit.questions import QUESTIONS, SEEDS
from harness.config import Config
from harness.presets import preset_named
from harness.records import BLOCKS_PER_STAGE, CONTROLS, variant_named

PRESETS = ("quickstart", "reduced", "paper-fast", "paper")
ASKED = [make(SEEDS) for make in QUESTIONS.values()]


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


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("arm", [BASE, *(arm.name for arm in ARMS)])
def test_an_arm_in_another_seed_changes_the_seed_too(arm: str, seed: int) -> None:
    audited = dataclasses.replace(preset_named("reduced"), seed=seed)
    once, again = config_of(arm_named(arm), audited), config_of(arm_named(in_seed(arm, 2)), audited)
    assert in_seed(arm, 0) == arm
    assert once.seed == seed
    assert again == dataclasses.replace(once, seed=seed + 2)


@pytest.mark.parametrize("name", ["seed0", "seed", "base_s1", "full", "no_clamp_s", "no_clamp_s0"])
def test_what_no_arm_is_called_is_none(name: str) -> None:
    with pytest.raises(KeyError):
        arm_named(name)


@pytest.mark.parametrize("question", ASKED, ids=lambda question: question.name)
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
    used = {a for q in ASKED for m in q.meetings for a in (m.victim_arm, m.source_arm)}
    assert {arm.name for arm in ARMS} | {BASE} <= used
    assert {arm_named(name).seed_offset for name in used} == set(range(SEEDS))
    labels = [(q.name, c.label) for q in ASKED for c in q.contrasts]
    assert len(set(labels)) == len(labels)
    assert [q.name for q in ASKED] == list(QUESTIONS)


def every_contrast() -> list[Contrast]:
    return [contrast for question in ASKED for contrast in question.contrasts]


@pytest.mark.parametrize("contrast", every_contrast(), ids=lambda contrast: contrast.label)
def test_a_contrast_compares_different_things_unit_by_unit(contrast: Contrast) -> None:
    assert contrast.changed
    assert contrast.reference
    assert contrast.changed != contrast.reference
    assert len(contrast.changed) == len(contrast.reference)
    for units, crossed in zip(
        (contrast.changed, contrast.reference), contrast.crossed, strict=True
    ):
        apart = all(m.victim_arm != m.source_arm for unit in units for m in unit)
        assert not crossed or apart
        assert not crossed or {len(unit) for unit in units} == {len(units) - 1}
    meetings = [m for unit in contrast.changed for m in unit]
    assert len(set(meetings)) == len(meetings), "one measurement counted twice"
    assert len({m.source is None for m in contrast.meetings}) == 1, "clean error against UER"


TRAINED = ("unit_masks", "seeds", "methods", "architecture", "sfp_training")


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_otherwise_has_as_many_units_as_training_seeds(
    name: str, seeds: int
) -> None:
    for contrast in QUESTIONS[name](seeds).contrasts:
        if "10 %" in contrast.label:  # hardly a classifier is left
            assert len(contrast.changed) == 1
            continue
        assert len(contrast.changed) == len(contrast.reference) == seeds
        for changed, reference in zip(contrast.changed, contrast.reference, strict=True):
            # Unit i of both is of one seed: the audited one + i.
            offsets = {arm_named(m.victim_arm).seed_offset for m in (*changed, *reference)}
            assert len(offsets) == 1


@pytest.mark.parametrize("name", sorted(set(QUESTIONS) - set(TRAINED)))
def test_how_uaps_are_crafted_is_asked_of_one_seed(name: str) -> None:
    assert QUESTIONS[name](3) == QUESTIONS[name](7)


@pytest.mark.parametrize("seeds", [3, 5])
def test_across_seeds_every_victim_meets_every_other_seeds_source_in_order(seeds: int) -> None:
    contrasts = QUESTIONS["seeds"](seeds).contrasts
    arms = [in_seed(BASE, i) for i in range(seeds)]
    crossed = [c for c in contrasts if c.crossed[0]]
    assert len(crossed) == 4
    for contrast in crossed:
        for victim, unit in zip(arms, contrast.changed, strict=True):
            assert {m.victim_arm for m in unit} == {victim}
            assert [m.source_arm for m in unit] == [arm for arm in arms if arm != victim]


def test_attacks_are_compared_by_name_whatever_the_workspace_is_configured_for() -> None:
    for name in ("attack", "methods"):
        crafted = [m for m in QUESTIONS[name](3).meetings if m.source not in CONTROLS]
        assert {m.attack for m in crafted} == {"sgd", "momentum"}

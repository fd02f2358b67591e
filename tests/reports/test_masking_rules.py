"""One row a rule of docs/adr/0010: signs in, a word and what decided out."""

from __future__ import annotations

from typing import Any

import pytest

from reports.masking_rules import KINDS, Kind, Signal, State, judge

ALL_CLEAR: dict[Kind, Signal] = {kind: Signal(kind, "clear", 0.3, 0.6) for kind in KINDS}


def unclear(kind: Kind, low: float, high: float) -> dict[Kind, Signal]:
    """A comparison that shows nothing: 95 % interval of the other's rate less the own."""
    return {kind: Signal(kind, "unclear", 0.5, 0.5, low, high)}


def state(word: State, *kinds: Kind) -> dict[Kind, Signal]:
    return {kind: Signal(kind, word) for kind in kinds}


@pytest.mark.parametrize(
    ("changes", "options", "word", "because"),
    [
        ({}, {}, "not masked", ("gradient_free",)),
        # Something that takes no gradient does more, and gradients are no guide.
        (state("raised", "gradient_free", "slope"), {}, "masked", ("gradient_free", "slope")),
        (state("raised", "transfer", "agreement"), {}, "masked", ("transfer", "agreement")),
        (state("raised", "control", "no_gradient"), {}, "masked", ("control", "no_gradient")),
        # It does more, but gradients lead where they promise.
        (state("raised", "gradient_free"), {}, "undecided", ("gradient_free",)),
        (state("raised", "transfer"), {}, "undecided", ("transfer",)),
        # Gradients are no guide, and the attack is bounded by what takes none.
        (
            {**state("raised", "slope"), **unclear("gradient_free", -0.04, 0.04)},
            {},
            "masked",
            ("gradient_free", "slope"),
        ),
        (
            {**state("raised", "slope"), **unclear("gradient_free", -0.06, 0.04)},
            {},
            "undecided",
            ("slope",),
        ),
        (
            {**state("raised", "slope"), **unclear("gradient_free", -0.04, 0.04)},
            {"near_ceiling": True},
            "undecided",
            ("slope",),
        ),
        # A control is a low bar: only where there is no gradient at all.
        (
            {**state("raised", "no_gradient"), **unclear("control", -0.04, 0.04)},
            {},
            "masked",
            ("control", "no_gradient"),
        ),
        (
            {**state("raised", "agreement"), **unclear("control", -0.04, 0.04)},
            {},
            "undecided",
            ("agreement",),
        ),
        # Gradients guide; a search that does hardly more takes nothing from them.
        (unclear("gradient_free", -0.04, 0.04), {}, "not masked", ("gradient_free",)),
        (unclear("gradient_free", -0.04, 0.06), {}, "undecided", ("gradient_free",)),
        (
            unclear("gradient_free", -0.04, 0.06),
            {"near_ceiling": True},
            "not masked",
            ("gradient_free",),
        ),
        (unclear("control", -0.04, 0.04), {}, "undecided", ("control",)),
        (unclear("control", -0.04, 0.04), {"near_ceiling": True}, "not masked", ("gradient_free",)),
        # Silence is not a pass.
        (state("not measured", "agreement"), {}, "undecided", ("agreement",)),
        (
            state("not measured", "gradient_free"),
            {"near_ceiling": True},
            "undecided",
            ("gradient_free",),
        ),
        # What gradients reach is below the number that stands for them.
        ({}, {"pattern": True}, "undecided", ("gradient_free",)),
        (state("raised", "slope"), {"pattern": True}, "masked", ("slope",)),
        (state("raised", "slope"), {"pattern": True, "near_ceiling": True}, "masked", ("slope",)),
        (state("raised", "random"), {}, "undecided", ("random",)),
    ],
)
def test_a_rule(
    changes: dict[Kind, Signal], options: dict[str, Any], word: str, because: tuple[Kind, ...]
) -> None:
    signals = ALL_CLEAR | changes
    assert judge(signals, **{"near_ceiling": False, **options}) == (word, because)

"""From the signs of gradient masking to one of three words: the rules of docs/adr/0010.

Enters: signals, each raised, clear, unclear or not measured. Leaves: `masked`, `not masked` or
`undecided`, and the signals that decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EQUIVALENT = 0.05
"""A difference bounded within this is none: it would not change what anybody chooses."""

State = Literal["raised", "clear", "unclear", "not measured"]
Word = Literal["masked", "not masked", "undecided"]
Kind = Literal[
    "gradient_free", "transfer", "control", "no_gradient", "slope", "agreement", "random",
    "monotone", "saturated",
]  # fmt: skip
KINDS: tuple[Kind, ...] = (
    "gradient_free", "transfer", "control", "no_gradient", "slope", "agreement", "random",
    "monotone", "saturated",
)  # fmt: skip


@dataclass(frozen=True)
class Signal:
    """One sign and its numbers. What `value` and `reference` are depends on `kind`."""

    kind: Kind
    state: State
    value: float | None = None
    reference: float | None = None
    low: float | None = None
    """95 % interval: of the value, or where it is compared with another, of value - reference."""
    high: float | None = None
    other: str = ""
    """Source or control it is about; for `gradient_free` the wave, for `monotone` the budgets."""
    p: float | None = None
    """Adjusted."""
    family: int = 1
    """How many tests it was adjusted over."""


def judge(
    signals: dict[Kind, Signal], *, near_ceiling: bool, pattern: bool = False
) -> tuple[Word, tuple[Kind, ...]]:
    """The word and the signals that decided; for `undecided`, those that stand in the way.

    Args:
        signals: one of each kind.
        near_ceiling: whether the own perturbation leaves others no room to do more.
        pattern: whether it is one that no gradient made, since that did more.
    """
    raised = [kind for kind in KINDS if signals[kind].state == "raised"]
    no_guide: tuple[Kind, ...] = ("no_gradient", "slope", "agreement")
    bad_gradients = [kind for kind in no_guide if kind in raised]
    without: tuple[Kind, ...] = ("gradient_free", "transfer", "control")
    beaten = [kind for kind in without if kind in raised]
    if bad_gradients and beaten:
        return "masked", (*beaten, *bad_gradients)
    if bad_gradients and pattern:
        return "masked", tuple(bad_gradients)
    # Gradients that lead nowhere, and an attack that does no more than what takes none. A control
    # is a low bar: beside it, there has to be no gradient at all.
    bars: tuple[tuple[Kind, bool], ...] = (
        ("gradient_free", bool(bad_gradients)),
        ("control", "no_gradient" in raised),
    )
    for kind, bad in bars:
        if bad and not near_ceiling and _no_less(signals[kind]):
            return "masked", (kind, *bad_gradients)
    if raised:
        return "undecided", tuple(raised)
    open_questions = tuple(
        kind
        for kind in KINDS
        if signals[kind].state != "clear" and not _settled(signals[kind], near_ceiling)
    )
    if pattern and "gradient_free" not in open_questions:
        # What gradients reach is below what is called their number.
        open_questions = ("gradient_free", *open_questions)
    if open_questions:
        return "undecided", open_questions
    return "not masked", ("gradient_free",)


def _no_less(other: Signal) -> bool:
    """Bounded, not merely unshown."""
    return other.state == "unclear" and other.low is not None and other.low > -EQUIVALENT


def _settled(signal: Signal, near_ceiling: bool) -> bool:
    """Whether a comparison that is not shown either way leaves nothing open.

    A search that does hardly more than gradients that lead where they promise takes nothing from
    them; nor does a control where next to nothing is left to do.
    """
    if signal.state != "unclear" or signal.kind not in ("gradient_free", "control"):
        return False
    if near_ceiling:
        return True
    bounded = signal.high is not None and signal.high < EQUIVALENT
    return signal.kind == "gradient_free" and bounded

"""Suspected gradient masking in words, and the shape every group of sentences has.

Enters: a `View`. Leaves: a `Group` of plain-text sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reports.inference import ALPHA, MIN_GAIN_OVER_RANDOM, Flag, flags, saturated_fraction
from reports.view import VariantView, View
from reports.words import label_of, listed, p_value, percent, plural

Tone = Literal["plain", "warn"]


@dataclass(frozen=True)
class Sentence:
    """A statement; `lead` is what it is about, set apart where it is printed."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Group:
    """Sentences under one sub-heading."""

    anchor: str
    title: str
    sentences: tuple[Sentence, ...]
    tone: Tone = "plain"


def masking_group(view: View) -> Group:
    title = "Suspected gradient masking, or an attack that is too weak"
    checkable = [v for v in view.variants if v.white_box is not None]
    if not checkable:
        return Group(
            "masking",
            title,
            (Sentence("No variant was attacked with a perturbation crafted on itself."),),
        )
    said = []
    for variant in checkable:
        found = flags(view, variant)
        if found:
            reasons = "; ".join(flag_text(flag) for flag in found)
            said.append(Sentence(f"{reasons[0].upper()}{reasons[1:]}.", variant.label))
    unflagged = [v.label for v in checkable if not flags(view, v)]
    if said:
        said.append(
            Sentence(
                "A low white-box UER of a flagged variant is no evidence of robustness: read its"
                " worst case instead. Where a control wins, the attack is under-optimised.",
                "What it means",
            )
        )
    if unflagged:
        said.append(Sentence(f"{listed(unflagged)}.", "No sign of it"))
    said += [Sentence(text) for text in _unchecked(view, checkable)]
    return Group(
        "masking", title, tuple(said), "warn" if len(unflagged) < len(checkable) else "plain"
    )


def flag_text(flag: Flag) -> str:
    """A flag in words, with its numbers."""
    value, reference, other = percent(flag.value), percent(flag.reference), label_of(flag.other)
    if flag.kind == "transfer":
        return (
            f"the perturbation crafted on {other} makes it err on {value}, its own on {reference}"
            f" ({p_value(flag.p or 0.0)}, Holm over {plural(flag.family, 'source')})"
        )
    if flag.kind == "control":
        p = flag.p if flag.p is not None else 1.0
        shown = p_value(p) if p < ALPHA else "no difference shown"
        return (
            f"the {other} control, which attacks no model, does at least as well as its own"
            f" perturbation: {value} against {reference} ({shown})"
        )
    if flag.kind == "random":
        return (
            f"its own perturbation turns {value} of the correctly classified images, less than"
            f" {MIN_GAIN_OVER_RANDOM:g} times what random signs do ({reference})"
        )
    if flag.kind == "monotone":
        return (
            f"its white-box UER falls from {reference} to {value} as the budget grows from"
            f" {flag.other}, beyond the intervals"
        )
    return (
        f"{value} of the samples gave a saturated loss, hence no gradient, while crafting, but only"
        f" {reference} of the images are misclassified"
    )


def short_flag(flag: Flag) -> str:
    """Two or three words for a table cell."""
    other = label_of(flag.other)
    return {
        "transfer": f"{other} transfers better",
        "control": f"{other} does as well",
        "random": "barely beats random sign",
        "monotone": "not monotone in \u03b5",
        "saturated": "loss saturated",
    }[flag.kind]


def _unchecked(view: View, variants: list[VariantView]) -> list[str]:
    """The checks that could not be made, so that silence is not read as a pass."""
    missing = []
    if not any(v.transfers for v in variants):
        missing.append("transfer from other variants")
    if not any("random" in v.attacked or "chessboard" in v.attacked for v in variants):
        missing.append("random-sign and chessboard controls")
    elif not any("random" in v.attacked for v in variants):
        missing.append("the random-sign control")
    if not any(len(v.curve) > 1 for v in variants):
        missing.append("a sweep over \u03b5")
    if all(saturated_fraction(view, v) is None for v in variants):
        missing.append("the saturated fraction of the loss")
    return [f"Not checked, because it was not recorded: {listed(missing)}."] if missing else []

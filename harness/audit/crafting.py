"""Questions about how perturbations are crafted, asked of four models of one training seed.

Enters: nothing that changes them. Leaves: a `Question` each.
"""

from __future__ import annotations

from harness.audit.arms import BASE, arm_named
from harness.audit.contrasts import (
    COMPRESSED,
    SOURCES,
    STRONGEST,
    THEIRS,
    Contrast,
    Means,
    Meeting,
    Question,
    Unit,
    each,
    own,
)
from harness.records import CONTROLS


def _of_base(arm: str) -> tuple[Unit, ...]:
    """The audited models, each under what the arm crafts on it."""
    return each(Meeting(BASE, name, arm, name) for name in SOURCES)


def _from_full(arm: str) -> tuple[Unit, ...]:
    """The audited compressed models under the one perturbation that the arm crafts on Full."""
    return (tuple(Meeting(BASE, name, arm, "full") for name in COMPRESSED),)


def _crafting(arms: dict[str, Means], against: str) -> tuple[Contrast, ...]:
    contrasts = []
    for arm, means in arms.items():
        what = arm_named(arm).what
        contrasts += [
            Contrast(f"white-box: {what}", _of_base(arm), _of_base(against), means=means),
            Contrast(f"Full's on the others: {what}", _from_full(arm), _from_full(against)),
        ]
    return tuple(contrasts)


def attack(_seeds: int) -> Question:
    # Both by name: a workspace may be configured for either.
    reference = each(own(BASE, name, THEIRS) for name in SOURCES)
    stronger = each(own(BASE, name, STRONGEST) for name in SOURCES)
    means = Means(
        "A stronger attack is weaker here.",
        "White-box rates by their attack are no upper bound: rank methods by a stronger one.",
        "A stronger attack finds no more: their attack is strong enough here.",
    )
    contrasts = [
        Contrast(f"white-box: attack {STRONGEST} instead", stronger, reference, means=means)
    ]
    contrasts += [
        Contrast(
            f"{control}, which nobody crafted",
            each(Meeting(BASE, name, BASE, control) for name in SOURCES),
            reference,
        )
        for control in CONTROLS
    ]
    return Question(
        "attack",
        "Is the attack strong enough to compare methods by?",
        "SGD-UAP, one start; a chessboard beats their published UAP on five of ten CIFAR-10 models",
        tuple(contrasts),
    )


def split(_seeds: int) -> Question:
    means = Means(
        "Crafted on the test images, the attack is weaker.",
        "Their rates are partly fitted to the very images they are judged on.",
        "A universal perturbation gains nothing that matters by having seen the test images.",
    )
    return Question(
        "split",
        "Does it matter that UAPs were crafted on the test images?",
        "crafted and evaluated on the same test split",
        _crafting({"crafted_on_test": means}, "crafted_apart"),
    )


def batch_norm(_seeds: int) -> Question:
    means = Means(
        "UAPs were crafted on another function than the one they are judged on, and it shows.",
        "Crafted in train mode, the attack is stronger.",
        "Crafting in train mode does not carry their conclusions.",
    )
    return Question(
        "batch_norm",
        "Does it matter that batch norm was in train mode while crafting?",
        "batch statistics for all quantised, all SVHN and all targeted runs",
        _crafting({"crafted_in_train_mode": means}, "crafted_apart"),
    )


def loss_and_step(_seeds: int) -> Question:
    def means(what: str) -> Means:
        return Means(
            f"{what} weakens the attack.",
            f"{what} strengthens the attack.",
            f"{what} changes nothing that matters.",
        )

    arms = {
        "no_clamp": means("Leaving out the clamp"),
        "small_step": means("A quarter of the step"),
        "large_step": means("Four times the step, and clamp 12,"),
    }
    return Question(
        "loss_and_step",
        "Do the clamp and the step size matter?",
        "loss clamped at 8, steps of eps / 5 without decay",
        _crafting(arms, BASE),
    )

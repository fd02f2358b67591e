"""Questions of the audit: which models and perturbations of which arms are compared.

Enters: how many training seeds. Leaves: a `Question`. A difference between two methods that were
each trained once may be one between two seeds, so what is trained otherwise is compared over
several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.audit.arms import BASE, arm_named
from harness.audit.contrasts import (
    Contrast,
    Meeting,
    Question,
    Unit,
    across,
    arms_of,
    each,
    own,
    within,
)
from harness.records import CONTROLS

SEEDS = 3
"""Training runs of every method, unless more are asked for. Not fewer: where one is left out, two
must be left that can meet (`crossed` contrasts)."""
THEIRS, STRONGEST = "sgd", "momentum"
"""Attacks: the authors', and the strongest there is (docs/adr/0007)."""
SOURCES = ("full", "sfp", "pp3", "q4")
"""The whole model, and one variant of every method."""
COMPRESSED = SOURCES[1:]


# --- crafting ------------------------------------------------------------------------------------


def _of_base(arm: str) -> tuple[Unit, ...]:
    """The audited models, each under what the arm crafts on it."""
    return each(Meeting(BASE, name, arm, name) for name in SOURCES)


def _from_full(arm: str) -> tuple[Unit, ...]:
    """The audited compressed models under the one perturbation that the arm crafts on Full."""
    return (tuple(Meeting(BASE, name, arm, "full") for name in COMPRESSED),)


def _crafting(arms: tuple[str, ...], against: str) -> tuple[Contrast, ...]:
    contrasts = []
    for arm in arms:
        what = arm_named(arm).what
        contrasts += [
            Contrast(f"white-box: {what}", _of_base(arm), _of_base(against)),
            Contrast(f"Full's on the others: {what}", _from_full(arm), _from_full(against)),
        ]
    return tuple(contrasts)


def _attack(_seeds: int) -> Question:
    # Both by name: a workspace may be configured for either.
    reference = each(own(BASE, name, THEIRS) for name in SOURCES)
    stronger = each(own(BASE, name, STRONGEST) for name in SOURCES)
    contrasts = [Contrast(f"white-box: attack {STRONGEST} instead", stronger, reference)]
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
        "White-box rates by their attack are no upper bound: rank methods by a stronger one.",
        "A stronger attack finds no more: their attack is strong enough here.",
        tuple(contrasts),
    )


# --- what was trained ----------------------------------------------------------------------------


def _unit_masks(seeds: int) -> Question:
    pruned = ("pp2", "pp3", "pp4")
    pairs = list(zip(arms_of(seeds, "unit_masks"), arms_of(seeds), strict=True))

    def of_seeds(make: Callable[[str, str], Iterable[Meeting]]) -> tuple[Unit, ...]:
        """(arm of PP, arm of Full of the same seed) -> its unit."""
        return tuple(tuple(make(masked, full)) for masked, full in pairs)

    return Question(
        "unit_masks",
        "Does it matter that PP masked single activations, not channels?",
        "a fixed mask on single activations of Full, without fine-tuning; no computation is saved",
        "What they found of PP is of unit masks, which save nothing, not of pruned channels.",
        "Unit masks and channel masks are equally robust: the conclusion carries over.",
        (
            Contrast(
                "white-box",
                of_seeds(lambda masked, _full: (own(masked, p) for p in pruned)),
                of_seeds(lambda _masked, full: (own(full, p) for p in pruned)),
            ),
            Contrast(
                "PP's on Full",
                of_seeds(lambda masked, full: (Meeting(full, "full", masked, p) for p in pruned)),
                of_seeds(lambda _masked, full: (Meeting(full, "full", full, p) for p in pruned)),
            ),
            Contrast(
                "Full's on PP",
                of_seeds(lambda masked, full: (Meeting(masked, p, full, "full") for p in pruned)),
                of_seeds(lambda _masked, full: (Meeting(full, p, full, "full") for p in pruned)),
            ),
        ),
    )


def _architecture(seeds: int) -> Question:
    bits = ("q2", "q3", "q4")
    pairs = (
        ("both ResNet-18", BASE, BASE),
        ("both ResNet-20", "resnet20", "resnet20"),
        ("as theirs, Q ResNet-20 and Full ResNet-18", "resnet20", BASE),
    )
    contrasts = []
    for what, quantised, full in pairs:
        arms = list(zip(arms_of(seeds, quantised), arms_of(seeds, full), strict=True))
        theirs_own = tuple(tuple(own(q_arm, q) for q in bits) for q_arm, _ in arms)
        whole = each(own(arm, "full") for _, arm in arms)
        fulls = tuple(tuple(Meeting(q_arm, q, arm, "full") for q in bits) for q_arm, arm in arms)
        contrasts += [
            Contrast(f"white-box, Q minus Full: {what}", theirs_own, whole),
            Contrast(f"on Q, Full's minus its own: {what}", fulls, theirs_own),
        ]
    return Question(
        "architecture",
        "How much of what quantisation does is ResNet-20?",
        "their Q2-Q4 are ResNet-20, compared with a ResNet-18 Full: lower white-box UER, and Full's"
        " UAP beating their own, read as gradient masking",
        "Quantising Full itself changes its white-box robustness.",
        "Quantising Full itself leaves its white-box robustness as it is.",
        tuple(contrasts),
    )


def _sfp_training(seeds: int) -> Question:
    contrasts = []
    # At keep 0.1 hardly a classifier is left: one training run says so.
    for arm, runs in (("not_augmented", seeds), ("sfp_keep_90", seeds), ("sfp_keep_10", 1)):
        what, changed, as_is = arm_named(arm).what, arms_of(runs, arm), arms_of(runs)
        contrasts += [
            Contrast(
                f"white-box: {what}",
                each(own(one, "sfp") for one in changed),
                within(runs, "sfp", "sfp"),
            ),
            Contrast(
                f"Full's on SFP: {what}",
                each(
                    Meeting(one, "sfp", full, "full")
                    for one, full in zip(changed, as_is, strict=True)
                ),
                within(runs, "sfp", "full"),
            ),
            Contrast(
                f"SFP's on Full: {what}",
                each(
                    Meeting(full, "full", one, "sfp")
                    for one, full in zip(changed, as_is, strict=True)
                ),
                within(runs, "full", "sfp"),
            ),
            Contrast(
                f"clean error: {what}",
                each(Meeting(one, "sfp") for one in changed),
                each(Meeting(one, "sfp") for one in as_is),
            ),
        ]
    from_full = each(
        Meeting(arm, "sfp", seed, "full")
        for arm, seed in zip(arms_of(seeds, "sfp_from_full"), arms_of(seeds), strict=True)
    )
    contrasts.append(
        Contrast(
            "Full's on SFP that goes on from it minus on SFP from scratch",
            from_full,
            within(seeds, "sfp", "full"),
        )
    )
    return Question(
        "sfp_training",
        "Is it SFP, or how SFP was trained?",
        "SFP at 79.5 % clean accuracy on CIFAR-10, far below what pruning 10 % costs: probably "
        "without augmentation, or over-pruned",
        "How SFP is trained changes its robustness: a ranking of methods must fix it.",
        "Augmentation does not carry what they found of SFP.",
        tuple(contrasts),
    )


def _seeds(seeds: int) -> Question:
    fulls = across(seeds, "full", "full")
    return Question(
        "seeds",
        "How much of \u201cSFP blocks transfer\u201d is only \u201canother seed\u201d?",
        "SFP, trained apart from Full, is compared with PP and Q, which share Full's weights; one "
        "training run each",
        "A perturbation crafted on one Full harms SFP less than that Full, as they report.",
        "A perturbation crafted on one Full harms SFP as much as that Full: not as they report.",
        (
            Contrast(
                "Full's on SFP minus on Full itself (their comparison)",
                within(seeds, "sfp", "full"),
                within(seeds, "full", "full"),
            ),
            Contrast(
                "Full's on SFP minus on another seed's Full",
                across(seeds, "sfp", "full"),
                fulls,
                crossed=(True, True),
            ),
            Contrast(
                "SFP's minus another seed's Full's, both on Full",
                across(seeds, "full", "sfp"),
                fulls,
                crossed=(True, True),
            ),
            Contrast(
                "Full's on PP3 of another seed minus on PP3 made from it",
                across(seeds, "pp3", "full"),
                within(seeds, "pp3", "full"),
                crossed=(True, False),
            ),
            Contrast(
                "Full's on Q4 of another seed minus on Q4 made from it",
                across(seeds, "q4", "full"),
                within(seeds, "q4", "full"),
                crossed=(True, False),
            ),
        ),
    )


def _methods(seeds: int) -> Question:
    contrasts = []
    # The strongest first: what a weak attack leaves is no robustness.
    for attack in (STRONGEST, THEIRS):
        whole = within(seeds, "full", "full", attack)
        contrasts += [
            Contrast(
                f"white-box by {attack}, {name.upper()} minus Full",
                within(seeds, name, name, attack),
                whole,
            )
            for name in COMPRESSED
        ]
        contrasts.append(
            Contrast(
                f"on Q4, Full's minus its own, by {attack}",
                within(seeds, "q4", "full", attack),
                within(seeds, "q4", "q4", attack),
            )
        )
    return Question(
        "methods",
        "Do the methods differ in white-box robustness, over several training seeds?",
        "robustness of compressed models is comparable to Full's; quantisation masks gradients",
        "SFP and Full differ in white-box robustness, beyond the seed.",
        "SFP and Full are equally robust to white-box attack.",
        tuple(contrasts),
    )


def _split(_seeds: int) -> Question:
    return Question(
        "split",
        "Does it matter that UAPs were crafted on the test images?",
        "crafted and evaluated on the same test split",
        "Their rates are partly fitted to the very images they are judged on.",
        "A universal perturbation does not profit from having seen the test images.",
        _crafting(("crafted_on_test",), "crafted_apart"),
    )


def _batch_norm(_seeds: int) -> Question:
    return Question(
        "batch_norm",
        "Does it matter that batch norm was in train mode while crafting?",
        "batch statistics for all quantised, all SVHN and all targeted runs",
        "UAPs were crafted on another function than the one they are judged on, and it shows.",
        "Crafting in train mode does not carry their conclusions.",
        _crafting(("crafted_in_train_mode",), "crafted_apart"),
    )


def _loss_and_step(_seeds: int) -> Question:
    return Question(
        "loss_and_step",
        "Do the clamp and the step size matter?",
        "loss clamped at 8, steps of eps / 5 without decay",
        "The clamp decides how strong the attack is.",
        "The clamp changes nothing that matters.",
        _crafting(("no_clamp", "small_step", "large_step"), BASE),
    )


QUESTIONS: dict[str, Callable[[int], Question]] = {
    "split": _split,
    "batch_norm": _batch_norm,
    "attack": _attack,
    "loss_and_step": _loss_and_step,
    "unit_masks": _unit_masks,
    "seeds": _seeds,
    "methods": _methods,
    "architecture": _architecture,
    "sfp_training": _sfp_training,
}
"""Training seeds -> the question. How UAPs are crafted is asked of four models of one seed."""

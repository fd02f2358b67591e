"""Questions about what was trained: methods, seeds, architecture, masks, how SFP is trained.

Enters: how many training seeds. Leaves: a `Question` each. A difference between two methods that
were each trained once may be one between two seeds, so they are compared over several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.audit.arms import BASE, arm_named
from harness.audit.contrasts import (
    COMPRESSED,
    STRONGEST,
    THEIRS,
    Contrast,
    Means,
    Meeting,
    Question,
    Unit,
    across,
    arms_of,
    each,
    own,
    within,
)


def unit_masks(seeds: int) -> Question:
    pruned = ("pp2", "pp3", "pp4")
    pairs = list(zip(arms_of(seeds, "unit_masks"), arms_of(seeds), strict=True))

    def of_seeds(make: Callable[[str, str], Iterable[Meeting]]) -> tuple[Unit, ...]:
        """(arm of PP, arm of Full of the same seed) -> its unit."""
        return tuple(tuple(make(masked, full)) for masked, full in pairs)

    return Question(
        "unit_masks",
        "Does it matter that PP masked single activations, not channels?",
        "a fixed mask on single activations of Full, without fine-tuning; no computation is saved",
        (
            Contrast(
                "white-box",
                of_seeds(lambda masked, _full: (own(masked, p) for p in pruned)),
                of_seeds(lambda _masked, full: (own(full, p) for p in pruned)),
                means=Means(
                    "Unit masks, which save nothing, are more robust than pruned channels.",
                    "Unit masks are more fragile than pruned channels.",
                    "Unit masks and channel masks are equally robust: the conclusion carries over.",
                ),
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


def architecture(seeds: int) -> Question:
    # Of Q2 to Q4 the one whose accuracy is Full's: over several seeds all three are dear.
    alike = Means(
        "Quantising Full makes it more robust to white-box attack.",
        "Quantising Full makes it more fragile to white-box attack.",
        "Quantising Full leaves its white-box robustness as it is.",
    )
    unlike = Means(
        "Compared as theirs, with another architecture, quantised models seem more robust.",
        "Compared as theirs, with another architecture, quantised models seem more fragile.",
        "Compared as theirs, with another architecture, quantised models seem as robust.",
    )
    pairs = (
        ("both ResNet-18", BASE, BASE, alike),
        ("both ResNet-20", "resnet20", "resnet20", None),
        ("as theirs, Q4 ResNet-20 and Full ResNet-18", "resnet20", BASE, unlike),
    )
    contrasts = []
    for what, quantised, full, means in pairs:
        arms = list(zip(arms_of(seeds, quantised), arms_of(seeds, full), strict=True))
        q_own = each(own(q_arm, "q4") for q_arm, _ in arms)
        whole = each(own(arm, "full") for _, arm in arms)
        fulls = each(Meeting(q_arm, "q4", arm, "full") for q_arm, arm in arms)
        contrasts += [
            Contrast(f"white-box, Q4 minus Full: {what}", q_own, whole, means=means),
            Contrast(f"on Q4, Full's minus its own: {what}", fulls, q_own),
        ]
    return Question(
        "architecture",
        "How much of what quantisation does is ResNet-20?",
        "their Q2-Q4 are ResNet-20, compared with a ResNet-18 Full: lower white-box UER, and Full's"
        " UAP beating their own, read as gradient masking",
        tuple(contrasts),
    )


def sfp_training(seeds: int) -> Question:
    contrasts = []
    augmentation = Means(
        "Without augmentation SFP is more robust: a ranking must fix how it is trained.",
        "Without augmentation SFP is more fragile: a ranking must fix how it is trained.",
        "Augmentation does not carry what they found of SFP.",
    )
    arms = (("not_augmented", seeds, augmentation), ("sfp_keep_90", seeds, None))
    # At keep 0.1 hardly a classifier is left: one training run says so.
    for arm, runs, means in (*arms, ("sfp_keep_10", 1, None)):
        what, changed, as_is = arm_named(arm).what, arms_of(runs, arm), arms_of(runs)
        contrasts += [
            Contrast(
                f"white-box: {what}",
                each(own(one, "sfp") for one in changed),
                within(runs, "sfp", "sfp"),
                means=means,
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
        tuple(contrasts),
    )


def other_seeds(seeds: int) -> Question:
    fulls = across(seeds, "full", "full")
    return Question(
        "seeds",
        "How much of \u201cSFP blocks transfer\u201d is only \u201canother seed\u201d?",
        "SFP, trained apart from Full, is compared with PP and Q, which share Full's weights; one "
        "training run each",
        (
            Contrast(
                "Full's on SFP minus on Full itself (their comparison)",
                within(seeds, "sfp", "full"),
                within(seeds, "full", "full"),
                means=Means(
                    "A perturbation crafted on Full harms SFP less than Full, as they report.",
                    "A perturbation crafted on Full harms SFP more than Full: not as they report.",
                    "A perturbation crafted on Full harms SFP as much as Full: not as they report.",
                ),
            ),
            Contrast(
                "Full's on SFP minus on another seed's Full",
                across(seeds, "sfp", "full"),
                fulls,
                crossed=(True, True),
                means=Means(
                    "It harms another seed's Full more than SFP: the method protects.",
                    "It harms another seed's Full less than SFP: the method does not protect.",
                    "It harms another seed's Full as little as SFP: no merit of SFP's own.",
                ),
            ),
            Contrast(
                "SFP's minus another seed's Full's, both on Full",
                across(seeds, "full", "sfp"),
                fulls,
                crossed=(True, True),
                means=Means(
                    "SFP's carries over to Full less than that of another seed's Full.",
                    "SFP's carries over to Full more than that of another seed's Full.",
                    "SFP's carries over to Full as well as that of another seed's Full.",
                ),
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


def _robustness(variant: str) -> Means:
    name = variant.upper()
    return Means(
        f"{name} withstands white-box attack better than Full, beyond the seed.",
        f"{name} withstands white-box attack less than Full, beyond the seed.",
        f"{name} and Full are equally robust to white-box attack.",
    )


def methods(seeds: int) -> Question:
    contrasts = []
    masking = Means(
        "On Q4 its own perturbation does more than Full's: no sign of masked gradients.",
        "On Q4 Full's perturbation does more than its own: a sign of masked gradients.",
        "On Q4 Full's perturbation does as much as its own: no sign of masked gradients.",
    )
    # The strongest first: what a weak attack leaves is no robustness.
    for attack in (STRONGEST, THEIRS):
        whole = within(seeds, "full", "full", attack)
        contrasts += [
            Contrast(
                f"white-box by {attack}, {name.upper()} minus Full",
                within(seeds, name, name, attack),
                whole,
                means=_robustness(name) if attack == STRONGEST else None,
            )
            for name in COMPRESSED
        ]
        contrasts.append(
            Contrast(
                f"on Q4, Full's minus its own, by {attack}",
                within(seeds, "q4", "full", attack),
                within(seeds, "q4", "q4", attack),
                means=masking if attack == STRONGEST else None,
            )
        )
    return Question(
        "methods",
        "Do the methods differ in white-box robustness, over several training seeds?",
        "robustness of compressed models is comparable to Full's; quantisation masks gradients",
        tuple(contrasts),
    )

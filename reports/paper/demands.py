"""The paper's claims, each as the comparisons that decide it.

Enters: a `Study`. Leaves: demands, which are lists of checks on named quantities. One function a
claim; `reports.paper.claims` says which is which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.records import PAPER_ORDER
from reports.paper.checks import GREATLY, Check, Contrast, Expects
from reports.paper.study import Cell, Study
from reports.words import label_of

SFP = ("sfp", "sfp_mixup", "sfp_cutout")
REGULARISED = ("sfp_mixup", "sfp_cutout")
PP = ("pp2", "pp3", "pp4")
QUANTISED = ("q2", "q3", "q4")
HALF = (0.35, 0.65)
"""Shares that may be called "about half"."""


@dataclass(frozen=True)
class Demand:
    """A part of a claim: what all, or most, of its checks must show."""

    words: str
    checks: tuple[Check | Contrast, ...]
    need: Literal["all", "most"] = "all"


def _mean_transfer(study: Study, victim: str, sources: list[str]) -> tuple[Cell, ...]:
    return tuple(study.attacked(victim, source) for source in sources)


def _without(*names: str) -> list[str]:
    return [name for name in PAPER_ORDER if name not in names]


def _survives_transfer(study: Study, victim: str, other: str) -> Check:
    """One victim's mean over the sources that are neither of the two."""
    sources = _without(victim, other)
    return Check(
        f"{label_of(victim)} against {label_of(other)}",
        _mean_transfer(study, victim, sources),
        _mean_transfer(study, other, sources),
        "lower",
    )


def sfp_as_victim(study: Study) -> list[Demand]:
    """Section "UAP Transferability", Soft Filter Pruning, CIFAR-10."""
    checks = tuple(_survives_transfer(study, "sfp", other) for other in _without("sfp"))
    return [
        Demand("SFP errs less under transferred perturbations than every other variant", checks)
    ]


def sfp_models_as_victims(study: Study) -> list[Demand]:
    """The same paragraph, SVHN."""
    others = _without(*SFP)
    every = tuple(_survives_transfer(study, sfp, other) for sfp in SFP for other in others)
    more = tuple(_survives_transfer(study, name, "sfp") for name in REGULARISED)
    return [
        Demand("SFP, SFP+M and SFP+C each err less than every other variant", every),
        Demand("with mixup or cutout, still less than SFP alone", more),
    ]


def sfp_as_source(study: Study) -> list[Demand]:
    """Section "UAP Transferability", second paragraph."""
    crafted, own = (study.attacked("full", "sfp"),), (study.attacked("full", "full"),)
    low, high = HALF
    return [
        Demand(
            "the perturbation of SFP does about half of what Full\u2019s own does to Full",
            (
                Check(f"less than {high:g} times as much", crafted, own, "lower", high, 0.0),
                Check(f"more than {low:g} times as much", crafted, own, "higher", low, 0.0),
            ),
        )
    ]


def pp_changes_nothing(study: Study) -> list[Demand]:
    """Section "UAP Transferability", Post-training Pruning."""
    full = (study.attacked("full", "full"),)

    def same(victim: str, source: str, against: tuple[Cell, ...], name: str) -> Check:
        return Check(name, (study.attacked(victim, source),), against, "same")

    return [
        Demand(
            "crafted on a PP variant, as harmful to Full as Full\u2019s own",
            tuple(same("full", pp, full, f"from {label_of(pp)} on Full") for pp in PP),
        ),
        Demand(
            "crafted on Full, as harmful to a PP variant as its own",
            tuple(
                same(pp, "full", (study.attacked(pp, pp),), f"from Full on {label_of(pp)}")
                for pp in PP
            ),
        ),
        Demand(
            "white-box, a PP variant errs as often as Full",
            tuple(same(pp, pp, full, f"{label_of(pp)} white-box") for pp in PP),
        ),
    ]


def quantisation_masks(study: Study) -> list[Demand]:
    """Section "UAP Transferability", Quantization, CIFAR-10."""
    sources = ["full", *PP]
    return [
        Demand(
            "white-box, quantised variants err less than Full",
            tuple(
                Check(f"{label_of(q)} white-box", (study.attacked(q, q),),
                      (study.attacked("full", "full"),), "lower")
                for q in QUANTISED
            ),
        ),
        Demand(
            "perturbations of Full and PP do more to them than their own",
            tuple(
                Check(f"{label_of(q)}, from Full and PP", _mean_transfer(study, q, sources),
                      (study.attacked(q, q),), "higher")
                for q in QUANTISED
            ),
        ),
    ]  # fmt: skip


def quantisation_changes_nothing(study: Study) -> list[Demand]:
    """The same paragraph, SVHN."""
    full = (study.attacked("full", "full"),)
    return [
        Demand(
            "white-box, quantised variants err about as often as Full",
            tuple(
                Check(
                    f"{label_of(q)} white-box", (study.attacked(q, q),), full, "same", 1.0, GREATLY
                )
                for q in QUANTISED
            ),
        )
    ]


def regularised_sources(study: Study) -> list[Demand]:
    """Section "UAP Transferability", Soft Filter Pruning, SVHN."""

    def share(source: str, expects: Expects) -> Check:
        victims = _without(*REGULARISED, source)
        carried = tuple(study.attacked(victim, source) for victim in victims)
        own = tuple(study.attacked(victim, victim) for victim in victims)
        return Check(f"from {label_of(source)}", carried, own, expects, 0.5, 0.0)

    return [
        Demand(
            "perturbations of SFP+M and SFP+C do less than half of what the victims\u2019 own do",
            tuple(share(source, "lower") for source in REGULARISED),
        ),
        Demand(
            "those of every other variant do more than half",
            tuple(share(source, "higher") for source in _without(*REGULARISED)),
        ),
    ]


# --- targeted ------------------------------------------------------------------------------------


def _all_targets(study: Study, name: str) -> tuple[Cell, ...]:
    return tuple(study.targeted(name, target) for target in range(10))


def _class_by_class(study: Study, name: str) -> Demand:
    checks = tuple(
        Check(f"{label_of(name)}, class {target}", (study.targeted(name, target),),
              (study.targeted("full", target),), "lower")
        for target in range(10)
    )  # fmt: skip
    return Demand(f"{label_of(name)}: TSR below Full\u2019s for most classes", checks, "most")


def sfp_resists_targets(study: Study) -> list[Demand]:
    """Section "Targeted UAPs", CIFAR-10."""
    sfp = _all_targets(study, "sfp")
    more = tuple(
        Check(f"{label_of(name)}, mean TSR", _all_targets(study, name), sfp, "lower")
        for name in REGULARISED
    )
    return [
        *(_class_by_class(study, name) for name in SFP),
        Demand("with mixup or cutout, mean TSR is below that of SFP alone", more),
    ]


def pp_weakens(study: Study) -> list[Demand]:
    """Section "Targeted UAPs", CIFAR-10."""
    checks = tuple(
        Check(f"PP, class {target}", tuple(study.targeted(pp, target) for pp in PP),
              (study.targeted("full", target),), "higher")
        for target in (2, 3, 8)
    )  # fmt: skip
    return [Demand("mean TSR of PP2 to PP4 is above Full\u2019s for classes 2, 3 and 8", checks)]


def quantisation_resists_targets(study: Study) -> list[Demand]:
    """Section "Targeted UAPs", CIFAR-10."""
    return [_class_by_class(study, name) for name in QUANTISED]


def svhn_targets(study: Study) -> list[Demand]:
    """Section "Targeted UAPs", second paragraph."""
    full = _all_targets(study, "full")
    spared = tuple(
        Check(f"SFP+M, class {target}", (study.targeted("sfp_mixup", target),),
              (study.targeted("full", target),), "lower")
        for target in (3, 8)
    )  # fmt: skip
    worse = tuple(
        Check(f"{label_of(name)}, mean TSR", _all_targets(study, name), full, "higher")
        for name in ("sfp", "sfp_cutout")
    )
    return [
        Demand("SFP and SFP+C: mean TSR above Full\u2019s", worse),
        Demand("SFP+M: TSR below Full\u2019s for classes 3 and 8", spared),
    ]


# --- both data sets ------------------------------------------------------------------------------


def _across(
    study: Study, name: str, side: Callable[[Study], Check], expects: Literal["lower", "higher"]
) -> Contrast:
    """CIFAR-10 first, whichever of the two the page is about."""
    first, second = study.about("cifar10"), study.about("svhn")
    return Contrast(
        name,
        side(first), first.view, first.published.title,
        side(second), second.view, second.published.title,
        expects,
    )  # fmt: skip


def targeted_by_data_set(study: Study) -> list[Demand]:
    """Section "Introduction", second contribution."""

    def effect(name: str) -> Callable[[Study], Check]:
        return lambda on: Check("", _all_targets(on, name), _all_targets(on, "full"), "lower")

    return [
        Demand(
            "mean TSR of SFP and SFP+C, less Full\u2019s, is lower on CIFAR-10 than on SVHN",
            tuple(_across(study, label_of(n), effect(n), "lower") for n in ("sfp", "sfp_cutout")),
        )
    ]


def quantised_by_data_set(study: Study) -> list[Demand]:
    """Section "White-box UAPs"."""

    def effect(name: str) -> Callable[[Study], Check]:
        return lambda on: Check(
            "", (on.attacked(name, name),), (on.attacked("full", "full"),), "lower"
        )

    return [
        Demand(
            "white-box UER of Q2 to Q4, less Full\u2019s, is lower on CIFAR-10 than on SVHN",
            tuple(_across(study, label_of(q), effect(q), "lower") for q in QUANTISED),
        )
    ]


def errs_by_data_set(study: Study) -> list[Demand]:
    """Section "White-box UAPs"."""

    def rate(name: str) -> Callable[[Study], Check]:
        return lambda on: Check("", (on.attacked(name, name),), (), "higher")

    return [
        Demand(
            "white-box, every variant errs more on CIFAR-10 than on SVHN",
            tuple(_across(study, label_of(name), rate(name), "higher") for name in PAPER_ORDER),
        )
    ]

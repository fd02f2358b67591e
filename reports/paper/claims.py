"""What the paper claims: the words, where they stand, and the rule that decides.

Leaves: `CLAIMS`. To add one, write its function in `reports.paper.demands` and its entry here;
`reports.paper.judging` makes the verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reports.paper import demands
from reports.paper.checks import GREATLY, MARGIN
from reports.paper.demands import HALF, Demand
from reports.paper.study import Study

BOTH = ("cifar10", "svhn")
_M = f"{100 * MARGIN:g} points"


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what decides whether it is so here."""

    anchor: str
    title: str
    quote: str
    section: str
    rule: str
    datasets: tuple[str, ...]
    """Of which data sets the paper says it."""
    demands: Callable[[Study], list[Demand]]
    caution: str


_SEED = (
    "Each variant has one training seed, so a difference between methods cannot be told from one"
    " between seeds."
)
_APART = (
    " SFP is trained on its own while PP and Q start from Full\u2019s weights: two seeds"
    " of one method might transfer badly too."
)
_SHARED = (
    " PP starts from Full\u2019s weights, so that it stays close to Full is expected of any small"
    " change."
)
_QUANTISED = " The paper\u2019s quantised models were ResNet-20, so architecture differs there too."
_TWO_RUNS = (
    " The two data sets differ in their number of images too, and maybe in epochs of training."
)
_ACROSS = "compared between runs of one scale on both data sets (images drawn apart), is shown"
_TRANSFERS = (
    "Mean UER over the perturbations crafted on all variants but the two compared, shown lower in"
    " every comparison"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "sfp-victim",
        "SFP is the most robust against transfer from other models",
        "On CIFAR-10 dataset, the SFP model shows noticeably better robustness against UAP transfer"
        " attacks from all other models.",
        "UAP Transferability, Soft Filter Pruning; Figure 2",
        f"{_TRANSFERS}.",
        ("cifar10",),
        demands.sfp_as_victim,
        _SEED + _APART,
    ),
    Claim(
        "sfp-victims-svhn",
        "The SFP models are more robust against transfer, more so with mixup or cutout",
        "We see that SFP models trained on SVHN are more robust against UAP attacks from all other"
        " models. When adding regularization to SFP, this robustness becomes even more"
        " discernible.",
        "UAP Transferability, Soft Filter Pruning; Figure 2",
        f"{_TRANSFERS}.",
        ("svhn",),
        demands.sfp_models_as_victims,
        _SEED + _APART,
    ),
    Claim(
        "sfp-source",
        "Perturbations crafted on SFP are about half as harmful to Full",
        "However, the adversarial samples crafted from the SFP model are only about half"
        " as harmful.",
        "UAP Transferability; Figure 2",
        f"\u201cAbout half\u201d: UER of Full under SFP\u2019s perturbation is shown to be between"
        f" {HALF[0]:g} and {HALF[1]:g} times its white-box UER.",
        BOTH,
        demands.sfp_as_source,
        _SEED + _APART,
    ),
    Claim(
        "pp-same",
        "Post-training pruning changes neither robustness nor transferability",
        "Removing neurons post-training yields an adversarial attack as harmful as a white-box"
        " attack. \u2026 this form of pruning had little effect on the transferability of the"
        " generated UAPs. This also appears to be the case when looking at these models on the SVHN"
        " dataset.",
        "UAP Transferability, Post-training Pruning; Figure 2",
        f"All nine differences of UER lie within {_M}, interval included; it does not"
        " hold where one interval lies outside.",
        BOTH,
        demands.pp_changes_nothing,
        _SEED + _SHARED,
    ),
    Claim(
        "q-masking",
        "Quantisation improves white-box robustness, but transfer beats it: gradient masking",
        "Quantization appears to have improved robustness against white-box UAPs \u2026"
        " However, when considering transfer attacks from other models like the Full or"
        " PPi models, these UAPs achieve 67% and higher UER against the quantized models.",
        "UAP Transferability, Quantization; Figures 1 and 2",
        "For each of Q2 to Q4: its white-box UER is shown below Full\u2019s, and its mean UER under"
        " the perturbations of Full and PP2 to PP4 is shown above its white-box UER.",
        ("cifar10",),
        demands.quantisation_masks,
        _SEED + _QUANTISED,
    ),
    Claim(
        "q-same",
        "On SVHN, quantisation does not greatly change robustness",
        "On SVHN, quantization does not seem to greatly change the robustness to UAPs when compared"
        " to the full precision models.",
        "UAP Transferability, Quantization; Figures 1 and 2",
        f"White-box UER of each of Q2 to Q4 lies within {100 * GREATLY:g} points of Full\u2019s,"
        " interval included; it does not hold where one interval lies outside.",
        ("svhn",),
        demands.quantisation_changes_nothing,
        _SEED + _QUANTISED,
    ),
    Claim(
        "sfp-sources-svhn",
        "On SVHN, only perturbations of SFP+M and SFP+C lack transferability",
        "Only in the case of SFP plus regularization (mixup and cutout) we observe a lack of"
        " transferability to the other models.",
        "UAP Transferability, Soft Filter Pruning; Figure 2",
        "\u201cLack\u201d: mean UER on the variants other than SFP+M, SFP+C and the source is shown"
        " to be below half of those variants\u2019 mean white-box UER; for every other source it is"
        " shown to be above half.",
        ("svhn",),
        demands.regularised_sources,
        _SEED + _APART,
    ),
    Claim(
        "sfp-targeted",
        "SFP lowers targeted success for most classes, more so with mixup or cutout",
        "SFP increases the robustness of the model by reducing the targeted success rate"
        " on 7 out of the 10 classes \u2026 Adding regularization produces a sharp"
        " increase in robustness.",
        "Targeted UAPs; Figure 3",
        "For each of SFP, SFP+M and SFP+C, TSR is shown below Full\u2019s for more than half of the"
        " classes; and mean TSR of SFP+M and of SFP+C is shown below SFP\u2019s.",
        ("cifar10",),
        demands.sfp_resists_targets,
        _SEED + " SFP and Full are trained apart.",
    ),
    Claim(
        "pp-targeted",
        "PP weakens the model towards the target classes 2, 3 and 8",
        "In the case of PP, it appears to weaken the model against some targeted UAPs, particularly"
        " for labels 2 (bird), 3 (cat), 8 (ship).",
        "Targeted UAPs; Figure 3",
        "For each of the classes 2, 3 and 8, mean TSR of PP2 to PP4 is shown above Full\u2019s.",
        ("cifar10",),
        demands.pp_weakens,
        _SEED + _SHARED,
    ),
    Claim(
        "q-targeted",
        "Quantisation lowers targeted success for most classes",
        "For quantized models we observe a reduction of the TSR for most target classes compared to"
        " the Full model. However, this is likely due to the gradient masking effect \u2026",
        "Targeted UAPs; Figure 3",
        "For each of Q2 to Q4, TSR is shown below Full\u2019s for more than half of the classes.",
        ("cifar10",),
        demands.quantisation_resists_targets,
        _SEED + _QUANTISED,
    ),
    Claim(
        "sfp-targeted-svhn",
        "On SVHN, SFP and SFP+C are slightly weaker against targets; SFP+M resists two of them",
        "When we apply SFP or SFP+C, the model has slightly reduced robustness. However, SFP+M has"
        " contrasting results as targeted UAPs for class labels 3 and 8 have drastically reduced"
        " TSR.",
        "Targeted UAPs; Figure 4",
        "Mean TSR of SFP and of SFP+C is shown above Full\u2019s; TSR of SFP+M for the"
        " classes 3 and 8 is shown below Full\u2019s.",
        ("svhn",),
        demands.svhn_targets,
        _SEED + " SFP and Full are trained apart.",
    ),
    Claim(
        "datasets-targeted",
        "SFP helps against targeted perturbations on CIFAR-10 and not on SVHN",
        "While the same compression technique helps against targeted UAPs on the former dataset, it"
        " degrades the models\u2019 robustness on the latter. This shows that robustness to UAPs"
        " when using compression methods is really application dependant.",
        "Introduction, contribution 2; Discussion, CIFAR-10 vs SVHN",
        f"Mean TSR less Full\u2019s, {_ACROSS} lower on CIFAR-10, for SFP and SFP+C.",
        BOTH,
        demands.targeted_by_data_set,
        _SEED + _TWO_RUNS,
    ),
    Claim(
        "datasets-quantised",
        "Quantisation improves white-box robustness on CIFAR-10 and not on SVHN",
        "The only noticeable increase in robustness was for the quantized models on CIFAR-10"
        " \u2026 The same increase in robustness is not evident for the models trained on SVHN.",
        "White-box UAPs; Figure 1",
        f"White-box UER less Full\u2019s, {_ACROSS} lower on CIFAR-10, for each of Q2 to Q4.",
        BOTH,
        demands.quantised_by_data_set,
        _SEED + _QUANTISED + _TWO_RUNS,
    ),
    Claim(
        "datasets-uer",
        "Models err more under attack on CIFAR-10 than on SVHN",
        "Interestingly, models trained on CIFAR-10 display a much higher UER than models trained on"
        " SVHN for the same perturbation size \u03b5.",
        "White-box UAPs; Figure 1; Discussion, CIFAR-10 vs SVHN",
        f"White-box UER, {_ACROSS} higher on CIFAR-10, for every variant.",
        BOTH,
        demands.errs_by_data_set,
        _SEED + _TWO_RUNS,
    ),
)  # fmt: skip
"""In the paper's order."""

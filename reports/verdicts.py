"""What the reader should conclude, in sentences made from the numbers and their tests.

Enters: a `View`. Leaves: groups of plain-text sentences (escaped where printed). A difference is
claimed only where a paired test shows one; otherwise it says so.
"""

from __future__ import annotations

import numpy as np

from harness.seeds import METHOD
from reports import advice, fleet
from reports.estimates import sample_of
from reports.headline import names_of, rates_of
from reports.inference import ALPHA, Comparison, Measure, against_baseline, ceiling
from reports.masking import Group, Sentence, masking_group
from reports.view import View
from reports.words import interval, label_of, listed, p_value, percent, points, span

WIDE = 0.05
"""Half of an interval that a reader should be told of."""


def conclusions(view: View) -> list[Group]:
    """Every group that has something to say, in reading order."""
    deploy = advice.by_constraint(view) + advice.not_faster(view)
    groups = [
        Group("against-full", _against(view), tuple(_versus_baseline(view))),
        Group("reach", "How far this reaches", _bare(_reach(view))),
        masking_group(view),
        Group("advice", "Which to deploy", _bare(deploy)),
        Group("fleet", "Across a mixed fleet", _bare(fleet.fleet(view))),
    ]
    return [group for group in groups if group.sentences]


def _bare(texts: list[str]) -> tuple[Sentence, ...]:
    return tuple(Sentence(text) for text in texts)


def _against(view: View) -> str:
    full = view.baseline_name == "full"
    return f"Against {'the uncompressed model' if full else view.baseline_label}"


def _versus_baseline(view: View) -> list[Sentence]:
    base = view.baseline_label
    if view.baseline is None:
        return [Sentence(f"There is no {base} model here, so nothing is compared with it.")]
    said = []
    named: list[tuple[Measure, str]] = [
        ("clean", "Clean images"),
        ("white_box", "White-box perturbations"),
        ("worst", "Worst untargeted perturbation"),
    ]
    for measure, title in named:
        tests = against_baseline(view, measure)
        if tests:
            said.append(Sentence(_compared(base, tests), title))
    if view.set_apart:
        apart = listed([v.label for v in view.set_apart])
        text = f"{apart}, attacked with other perturbations than {base}."
        said.append(Sentence(text, "Left out"))
    if not said:
        return [Sentence(f"There is nothing to compare {base} with.")]
    if base != label_of("full"):
        said.append(
            Sentence(f"{base}; harness report --baseline NAME takes another.", "Compared with")
        )
    return [
        *said,
        Sentence(
            "Paired on the same images (exact McNemar; a bootstrap over images and crafting seeds"
            " where those are averaged), Holm-adjusted over the variants of each"
            f" line, at {percent(ALPHA)}. The worst perturbation is picked on these same images,"
            " so its line leans towards larger error rates for every model alike.",
            "Tests",
        ),
    ]


def _compared(label: str, tests: list[Comparison]) -> str:
    """`Full errs on ...; lower: ...; higher: ...; no difference shown: ...`."""
    base = tests[0].baseline_rate
    parts = [f"{label} errs on {percent(base)}."]
    lower = sorted((t for t in tests if t.shown and t.difference < 0), key=lambda t: t.rate)
    higher = sorted((t for t in tests if t.shown and t.difference > 0), key=lambda t: -t.rate)
    level = [t for t in tests if not t.shown]
    if lower:
        parts.append(f"Shown to err less: {listed([_detail(t) for t in lower])}.")
    if higher:
        parts.append(f"Shown to err more: {listed([_detail(t) for t in higher])}.")
    if level:
        everyone = "any variant" if len(level) == len(tests) and len(tests) > 1 else names_of(level)
        parts.append(f"No difference shown for {everyone} ({rates_of(level)}).")
    return " ".join(parts)


def _detail(test: Comparison) -> str:
    return (
        f"{test.variant.label} ({percent(test.rate)}, {points(test.difference)} points,"
        f" {p_value(test.p)})"
    )


def _no_better_than_a_guess(view: View) -> list[str]:
    shares = np.bincount(np.asarray(view.evaluation.labels)) / max(1, len(view.evaluation.labels))
    chance = max(1 - ceiling(view), float(shares.max()))
    guessing = [
        (v, v.clean.clean_accuracy)
        for v in view.variants
        if v.clean is not None
        and v.clean.clean_accuracy is not None
        and v.clean.clean_accuracy_low is not None
        and v.clean.clean_accuracy_low <= chance
    ]
    if not guessing:
        return []
    named = listed([f"{v.label} ({percent(accuracy)})" for v, accuracy in guessing])
    return [
        f"{named}: not shown to classify clean images better than a guess, or always the most"
        f" frequent class ({percent(chance)}), so"
        " error rates under attack say nothing of robustness there. Look at the training first."
    ]


def _half_width(view: View) -> float:
    """Of the widest 95 % interval among the worst error rates; 0 where there is none."""
    widths = [
        row.uer_high - row.uer_low
        for v in view.variants
        if (row := v.worst) is not None and row.uer_high is not None and row.uer_low is not None
    ]
    return max(widths, default=0.0) / 2


def _reach(view: View) -> list[str]:
    sample = sample_of(view)
    files, images = "files", f"these {len(view.evaluation.labels):,} images"
    if sample is not None and sample.judged_by_torch:
        files = "models, by PyTorch,"
    elif sample is not None:
        given = span(sample.fewest, sample.most)
        images = f"the images that both were given ({given} a model; all where files agree)"
    covered = "the choice of images" if sample is None else "what the sample leaves open"
    said = _no_better_than_a_guess(view)
    if (half := _half_width(view)) > WIDE:
        said.append(f"Error rates here are known to about \u00b1{100 * half:.0f} points only.")
    said += [
        "Each variant is one file from one training seed: the tests above speak about these"
        f" {files} on {images}, not about the compression methods. A claim about a method needs"
        f" at least three training seeds and an independently seeded {view.baseline_label}.",
    ]
    repeated = [
        f"{v.label} {percent(own.uer)} [{interval(own.uer_low, own.uer_high)}]"
        f" ({len(view.repeats(own))} seeds)"
        for v in view.variants
        if (own := v.white_box) is not None and len(view.repeats(own)) > 1
    ]
    if repeated:
        said.append(
            f"White-box UER over crafting seeds, mean and 95 % interval: {listed(repeated)}. These"
            f" intervals and the tests between them cover images and crafting seeds ({METHOD});"
            f" all others cover {covered} only."
        )
    elif view.craft is not None:
        said.append(
            "Each perturbation comes from one crafting seed, and all images share it: the"
            f" intervals cover {covered}, not the luck of the optimiser."
        )
    if {"pp", "full"} <= {v.method for v in view.variants}:
        said.append(
            "The PP and Q variants start from Full\u2019s weights while SFP is trained on its own:"
            " a perturbation that does not carry over between SFP and Full may show a different"
            " seed rather than a different method."
        )
    return said

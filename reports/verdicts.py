"""What the reader should conclude, in sentences made from the numbers and their tests.

Enters: a `View`. Leaves: a headline and groups of plain-text sentences (escaped where printed).
A difference is claimed only where a paired test shows one; otherwise it says so.
"""

from __future__ import annotations

from itertools import combinations

from harness.seeds import METHOD
from reports import advice
from reports.estimates import sample_sizes
from reports.inference import (
    ALPHA,
    Comparison,
    Measure,
    against_full,
    paired,
)
from reports.masking import Group, Sentence, masking_group
from reports.view import VariantView, View
from reports.words import epsilon, interval, listed, p_value, percent, plural, points, span

POOR = 0.5
"""Erring on this share of the images, nobody survived well."""


def headline(view: View) -> str:
    """The answer in a sentence or two."""
    rated = [v for v in view.variants if v.worst is not None and view.comparable(v)]
    if not rated or view.reference_eps is None:
        return (
            f"Nothing was attacked yet: {plural(len(view.variants), 'model')} measured on clean"
            " images only, so nothing can be said about robustness."
        )
    at = f"under the worst perturbation measured at {epsilon(view.reference_eps)}"
    if len(rated) == 1:
        only = rated[0]
        which = "was attacked in full" if view.set_apart else "was attacked"
        return (
            f"Only {only.label} {which}: {at} it errs on {_worst(only)} of the images."
            " There is nothing to compare it with."
        )
    if view.full not in rated:
        return f"There is no attacked Full model to compare with: {at} {_pairwise(view, rated)}"
    tests = sorted(against_full(view, "worst"), key=lambda test: test.rate)
    better = [test for test in tests if test.shown and test.difference < 0]
    worse = [test for test in tests if test.shown and test.difference > 0]
    text = _survivors(view, at, better) if better else _no_survivor(at, tests)
    if worse:
        text += f" {_names(worse)} {_verb(worse)} shown to be more fragile than Full."
    spared = [v.label for v in rated if v.white_box is None]
    if spared:
        text += (
            f" Mind that {listed(spared)} faced no perturbation crafted on"
            f" {'itself' if len(spared) == 1 else 'themselves'}, which may do more harm."
        )
    return text


def _pairwise(view: View, rated: list[VariantView]) -> str:
    """Who is shown to differ from whom, of all pairs: Holm over all of them."""
    ordered = sorted(rated, key=_worst_value)
    pairs = list(combinations(ordered, 2))
    rows = [(a.worst, b.worst) for a, b in pairs]
    p_values = paired(view, [(a, b) for a, b in rows if a is not None and b is not None])
    span = listed([f"{v.label} errs on {_worst(v)}" for v in (ordered[0], ordered[-1])])
    shown = [
        f"{a.label} less than {b.label}"
        for (a, b), p in zip(pairs, p_values, strict=True)
        if p < ALPHA and _worst_value(a) < _worst_value(b)
    ]
    if not shown:
        return f"{span} of the images, the extremes of what was measured; no difference is shown."
    return f"{span} of the images. Shown to err less: {listed(shown)}."


def _survivors(view: View, at: str, better: list[Comparison]) -> str:
    """Who beats Full; one is called the best only where it is shown to beat the next."""
    lowest, base = better[0].rate, better[0].baseline_rate
    poor = ", none of them well" if lowest >= POOR and len(better) > 1 else ""
    poor = ", though not well" if lowest >= POOR and len(better) == 1 else poor
    verb = "survives" if len(better) == 1 else "survive"
    text = (
        f"{_names(better)} {verb} better than the uncompressed Full model{poor}: {at}"
        f" {'it errs' if len(better) == 1 else 'they err'} on {_span(better)} of the images,"
        f" Full on {percent(base)}."
    )
    if len(better) > 1:
        first, rest = better[0], better[1:]
        rows = [(first.variant.worst, other.variant.worst) for other in rest]
        p_values = paired(view, [(a, b) for a, b in rows if a is not None and b is not None])
        if all(p < ALPHA for p in p_values):
            text += f" Of these {first.variant.label} is shown to err least."
        elif not any(p < ALPHA for p in p_values):
            text += " Between the first of these and the others no difference is shown."
    return text


def _no_survivor(at: str, tests: list[Comparison]) -> str:
    who = f"{tests[0].variant.label} errs" if len(tests) == 1 else "the others err"
    return (
        f"No compressed variant is shown to survive better than the uncompressed Full model: {at}"
        f" Full errs on {percent(tests[0].baseline_rate)} of the images, {who} on {_span(tests)}."
    )


def conclusions(view: View) -> list[Group]:
    """Every group that has something to say, in reading order."""
    deploy = advice.by_constraint(view) + advice.not_faster(view)
    groups = [
        Group("against-full", "Against the uncompressed model", tuple(_versus_full(view))),
        Group("reach", "How far this reaches", _bare(_reach(view))),
        masking_group(view),
        Group("advice", "Which to deploy", _bare(deploy)),
        Group("fleet", "Across a mixed fleet", _bare(advice.fleet(view))),
    ]
    return [group for group in groups if group.sentences]


def _bare(texts: list[str]) -> tuple[Sentence, ...]:
    return tuple(Sentence(text) for text in texts)


def _versus_full(view: View) -> list[Sentence]:
    if view.full is None:
        return [Sentence("There is no Full model here, so nothing is compared with it.")]
    said = []
    named: list[tuple[Measure, str]] = [
        ("clean", "Clean images"),
        ("white_box", "White-box perturbations"),
        ("worst", "Worst perturbation measured"),
    ]
    for measure, title in named:
        tests = against_full(view, measure)
        if tests:
            said.append(Sentence(_compared(tests), title))
    if view.set_apart:
        apart = listed([v.label for v in view.set_apart])
        said.append(Sentence(f"{apart}, attacked with other perturbations than Full.", "Left out"))
    if not said:
        return [Sentence("There is nothing to compare Full with.")]
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


def _compared(tests: list[Comparison]) -> str:
    """`Full errs on ...; lower: ...; higher: ...; no difference shown: ...`."""
    base = tests[0].baseline_rate
    parts = [f"Full errs on {percent(base)}."]
    lower = sorted((t for t in tests if t.shown and t.difference < 0), key=lambda t: t.rate)
    higher = sorted((t for t in tests if t.shown and t.difference > 0), key=lambda t: -t.rate)
    level = [t for t in tests if not t.shown]
    if lower:
        parts.append(f"Shown to err less: {listed([_detail(t) for t in lower])}.")
    if higher:
        parts.append(f"Shown to err more: {listed([_detail(t) for t in higher])}.")
    if level:
        everyone = "any variant" if len(level) == len(tests) and len(tests) > 1 else _names(level)
        parts.append(f"No difference shown for {everyone} ({_span(level)}).")
    return " ".join(parts)


def _detail(test: Comparison) -> str:
    return (
        f"{test.variant.label} ({percent(test.rate)}, {points(test.difference)} points,"
        f" {p_value(test.p)})"
    )


def _reach(view: View) -> list[str]:
    sizes = sample_sizes(view)
    images = f"these {len(view.evaluation.labels):,} images"
    if sizes is not None:
        images = f"the images that both were given ({span(*sizes)} a model)"
    said = [
        "Each variant is one file from one training seed: the tests above speak about these files"
        f" on {images}, not about the compression methods. A claim about a method needs"
        " at least three training seeds and an independently seeded Full.",
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
            " all others cover the choice of images only."
        )
    elif view.craft is not None:
        said.append(
            "Each perturbation comes from one crafting seed, and all images share it: the"
            " intervals cover the choice of images, not the luck of the optimiser."
        )
    if any(v.method == "pp" for v in view.variants) and view.full is not None:
        said.append(
            "The PP and Q variants start from Full\u2019s weights while SFP is trained on its own:"
            " a perturbation that does not carry over between SFP and Full may show a different"
            " seed rather than a different method."
        )
    return said


def _worst_value(variant: VariantView) -> float:
    row = variant.worst
    return row.uer if row is not None and row.uer is not None else 2.0


def _worst(variant: VariantView) -> str:
    return percent(_worst_value(variant))


def _span(tests: list[Comparison]) -> str:
    low, high = percent(min(t.rate for t in tests)), percent(max(t.rate for t in tests))
    return low if low == high else f"{low} to {high}"


def _names(tests: list[Comparison]) -> str:
    return listed([test.variant.label for test in tests])


def _verb(tests: list[Comparison]) -> str:
    return "is" if len(tests) == 1 else "are"

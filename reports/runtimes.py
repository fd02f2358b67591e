"""x86 is not ARM: what one runtime predicts after another, from PyTorch to every other device.

Enters: a `View`. Leaves: a table and its sentence; nothing where there is only one device.
Each step is judged on the images that both runs saw; p-values are Holm-adjusted over the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from harness import metrics
from harness.records import ResultRow
from reports.inference import ALPHA, bound_of_none, holm
from reports.method import TextTable
from reports.view import DeviceId, VariantView, View
from reports.words import DASH, label_of, listed, p_value, paper_rank, percent

LOCAL = DeviceId("local", emulated=False)
HEAD = (
    "Variant", "From", "To", "Differ, clean", "Differ, attacked",
    "UER before", "UER after", "Paired test", "Predictions",
)  # fmt: skip


@dataclass(frozen=True)
class Shift:
    """How many predictions of the images that both runs saw are not the same."""

    differing: int
    n: int
    wrong_before: float
    wrong_after: float
    p: float


@dataclass(frozen=True)
class Step:
    """One variant on one runtime and on the next."""

    variant: str
    before: str
    after: str
    to_device: bool
    """Whether the step is to another device, not from PyTorch to this one."""
    clean: Shift | None
    attacked: Shift | None
    """Under its own perturbation, or the first that both were attacked with."""
    source: str
    """Whose perturbation that is."""
    p: float
    """Of the error rates under attack, or clean where there is no attack; adjusted."""

    @property
    def differing(self) -> int:
        return sum(shift.differing for shift in (self.clean, self.attacked) if shift)

    @property
    def images(self) -> int:
        """An image counts once, clean and attacked: its two predictions are not independent."""
        return min(shift.n for shift in (self.clean, self.attacked) if shift)

    @property
    def n(self) -> int:
        """Predictions compared."""
        return sum(shift.n for shift in (self.clean, self.attacked) if shift)


def runtime_steps(view: View) -> list[Step]:
    """PyTorch -> onnxruntime here -> onnxruntime on every other device, for every variant."""
    others = [place for place in view.devices if place != LOCAL]
    if LOCAL not in view.devices or not others:
        return []
    here = {variant.name: variant for variant in view.by_device[LOCAL]}
    arch = {place: m.arch for place, runtime, m in view.machines if runtime == "onnxruntime"}
    ours = _labelled(LOCAL, arch)
    found: list[Step] = []
    for name in sorted(here, key=paper_rank):
        there = {
            place: variant
            for place in others
            for variant in view.by_device[place]
            if variant.name == name and variant.model.sha256 == here[name].model.sha256
        }
        if not there:
            continue
        steps = [_step(view, here[name], here[name], "PyTorch", ours, torch=True)]
        steps += [
            _step(view, here[name], variant, ours, _labelled(place, arch))
            for place, variant in there.items()
        ]
        found += [step for step in steps if step is not None]
    adjusted = holm([step.p for step in found])
    return [replace(step, p=p) for step, p in zip(found, adjusted, strict=True)]


def runtime_table(view: View) -> TextTable | None:
    """The steps as text; None where there is no other device."""
    steps = runtime_steps(view)
    return TextTable(HEAD, tuple(_cells(step) for step in steps)) if steps else None


def runtime_text(view: View) -> str:
    """What the table says, in a sentence or two; empty where there is none."""
    onward = [step for step in runtime_steps(view) if step.to_device]
    if not onward:
        return ""
    text = (
        "The same file predicts with other kernels on another processor. Each row compares two"
        " runs on the images that both saw, clean and under the variant\u2019s own perturbation"
        " (or the one named); p-values are paired tests, Holm-adjusted over the table."
    )
    changed = list(dict.fromkeys(label_of(s.variant) for s in onward if s.differing))
    kept = list(dict.fromkeys(label_of(s.variant) for s in onward if not s.differing))
    kept = [label for label in kept if label not in changed]
    if changed:
        text += f" Predictions change on another device for {listed(changed)}."
    if kept:
        text += f" {listed(kept)} {'predicts' if len(kept) == 1 else 'predict'} the same on every"
        text += " device, on all images compared."
    shown = list(dict.fromkeys(label_of(s.variant) for s in onward if s.p < ALPHA))
    if shown:
        text += f" The error rate is shown to differ for {listed(shown)}."
    elif changed:
        text += " No error rate is shown to differ."
    return text.strip()


def _step(
    view: View,
    first: VariantView,
    second: VariantView,
    before: str,
    after: str,
    *,
    torch: bool = False,
) -> Step | None:
    clean = _shift(view, first.clean, second.clean, torch=torch)
    source, attacked = _attacked(view, first, second, torch=torch)
    judged = attacked or clean
    if judged is None:
        return None
    return Step(
        variant=first.name,
        before=before,
        after=after,
        to_device=not torch,
        clean=clean,
        attacked=attacked,
        source=source,
        p=judged.p,
    )


def _attacked(
    view: View, first: VariantView, second: VariantView, *, torch: bool
) -> tuple[str, Shift | None]:
    """(source, shift) of the variant's own perturbation, else of the first that both met."""
    both = [source for source in first.attacked if source in second.attacked]
    for source in sorted(both, key=lambda s: (s != first.name, paper_rank(s))):
        shift = _shift(view, first.attacked[source], second.attacked[source], torch=torch)
        if shift is not None:
            return source, shift
    return "", None


def _shift(
    view: View, first: ResultRow | None, second: ResultRow | None, *, torch: bool
) -> Shift | None:
    if first is None or second is None or first.uap_sha256 != second.uap_sha256:
        return None
    pair = view.answered(second, first, torch=torch)
    if pair is None:
        return None
    after, before = pair.first != pair.labels, pair.second != pair.labels
    return Shift(
        differing=int(np.count_nonzero(pair.first != pair.second)),
        n=pair.labels.size,
        wrong_before=float(np.mean(before)),
        wrong_after=float(np.mean(after)),
        p=metrics.mcnemar(after, before),
    )


def _cells(step: Step) -> tuple[str, ...]:
    attacked = _differ(step.attacked)
    if step.source and step.source != step.variant:
        attacked += f" ({label_of(step.source)})"
    if step.differing == 0:
        verdict = f"identical; at most {percent(bound_of_none(step.images))} differ"
    else:
        verdict = f"CHANGE: {percent(step.differing / step.n)} differ"
    return (
        label_of(step.variant),
        step.before,
        step.after,
        _differ(step.clean),
        attacked,
        percent(step.attacked.wrong_before if step.attacked else None),
        percent(step.attacked.wrong_after if step.attacked else None),
        p_value(step.p) if step.p < ALPHA else f"not shown ({p_value(step.p)})",
        verdict,
    )


def _differ(shift: Shift | None) -> str:
    return DASH if shift is None else f"{shift.differing:,} of {shift.n:,}"


def _labelled(place: DeviceId, arch: dict[DeviceId, str]) -> str:
    said = (["emulated"] if place.emulated else []) + [arch.get(place, "unknown")]
    return f"{label_of(place.name)} ({', '.join(said)})"

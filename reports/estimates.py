"""What a sample says of the whole set, and the sentence that says what was measured where.

Enters: rows of a device that evaluated a part of the images, and PyTorch's predictions of all.
Leaves: the same rows as estimates of the whole set, so that models stand beside each other though
one was given more images than another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.metrics import UNSEEN, Classes, corrected_rate
from harness.records import ResultRow
from reports.agreed import differing, unseen_share
from reports.view import RunKey, VariantView, View, by_torch, run_of
from reports.words import clean_text, percent, span


def estimated(
    row: ResultRow, *, answers: Mapping[RunKey, Classes], labels: npt.NDArray[np.int64]
) -> ResultRow:
    """The row with accuracy, UER and TSR estimated for all images, where PyTorch predicted them.

    Args:
        row: of a whole set or a sample.
        answers: int64 [N] of every run; `UNSEEN` outside a sample.
        labels: int64 [N].
    """
    if row.n == row.n_of:
        return row
    device, torch = answers.get(run_of(row)), answers.get(by_torch(run_of(row)))
    if device is None or torch is None or bool((torch == UNSEEN).any()):
        return row
    seen = np.flatnonzero(device != UNSEEN)
    if seen.size == 0:
        return row
    found = corrected_rate(torch != labels, device[seen] != labels[seen], seen)
    if row.uap_sha256 is None:
        return replace(
            row,
            clean_accuracy=1 - found.value,
            clean_accuracy_low=1 - found.high,
            clean_accuracy_high=1 - found.low,
        )
    row = replace(row, uer=found.value, uer_low=found.low, uer_high=found.high)
    if row.target is None:
        return row
    found = corrected_rate(torch == row.target, device[seen] == row.target, seen)
    return replace(row, tsr=found.value, tsr_low=found.low, tsr_high=found.high)


@dataclass(frozen=True)
class Sample:
    """What exported models were given of the images, and what that means for tests."""

    fewest: int
    most: int
    """Images behind a rate."""
    compared: int
    differing: int
    """Predictions that could be compared with PyTorch's, and how many of them are not its."""
    judged_by_torch: bool
    """Whether every test is of PyTorch's predictions of all images (`reports.agreed`)."""
    unseen: float
    """Share of all images on which a file so judged may differ, at most; 95 % for each run."""


def sample_of(view: View) -> Sample | None:
    """None where every rate is of all images."""
    shown = [row for variant in view.variants for row in _rows_of(variant)]
    sizes = [row.n for row in shown]
    if not sizes or min(sizes) == len(view.evaluation.labels):
        return None
    keys = {run_of(repeat) for row in shown for repeat in view.repeats(row)}
    answers = {key: found for key in keys if (found := view.answers.get(key)) is not None}
    torch = [(found, view.answers.get(by_torch(key))) for key, found in answers.items()]
    seen = [int(np.count_nonzero(found != UNSEEN)) for found in answers.values()]
    return Sample(
        fewest=min(sizes),
        most=max(sizes),
        compared=sum(
            int(np.count_nonzero((found != UNSEEN) & (other != UNSEEN)))
            for found, other in torch
            if other is not None
        ),
        differing=sum(differing(key, found, view.answers) for key, found in answers.items()),
        judged_by_torch=all(view.judged.get(key) is not view.answers.get(key) for key in keys),
        unseen=max((unseen_share(n, len(view.evaluation.labels)) for n in seen if n), default=1.0),
    )


def _rows_of(variant: VariantView) -> list[ResultRow]:
    measured = [variant.clean, *variant.curve, *variant.targeted.values(), *variant.searches]
    measured += [*variant.left_out.values()]
    measured += [row for attacked in variant.by_eps.values() for row in attacked.values()]
    return [row for row in measured if row is not None]


def where_measured(view: View) -> str:
    """One sentence: on what, of how many images, and what the numbers are then."""
    whole = len(view.evaluation.labels)
    place = clean_text(view.device.name)
    machine = next((m for at, _, m in view.machines if at == view.device), None)
    if view.device.name != "local" and not view.device.emulated and machine is not None:
        place += f" ({clean_text(machine.arch)}, {clean_text(machine.cpu)})"
    if view.device.emulated:
        place = f"an emulated {place} (the board's own instructions under QEMU: its predictions,"
        place += " not its speed)"
    sample = sample_of(view)
    if sample is None:
        return f"Measured on {place}, on all {whole:,} images."
    images = span(sample.fewest, sample.most)
    text = f"Measured on {place}, on a sample of {images} of {whole:,} images."
    if not sample.compared:
        return f"{text} Rates are the sample\u2019s own; tests compare models on what both saw."
    if sample.judged_by_torch:
        return (
            f"{text} There exported models predict what PyTorch does, every time"
            f" ({sample.compared:,} predictions), and are taken to do so on the others: rates and"
            f" tests are of PyTorch\u2019s predictions of all {whole:,}. A file may differ on up to"
            f" {percent(sample.unseen)} of them, which the intervals of rates cover and tests do"
            f" not: of two files, differences below {100 * 2 * sample.unseen:.1f} points are"
            " PyTorch\u2019s."
        )
    return (
        f"{text} Rates are estimates for all {whole:,}: PyTorch\u2019s, corrected by where the"
        f" sample differs from it ({sample.differing:,} of {sample.compared:,} predictions), with"
        " intervals that say how sure that is; where PyTorch was not run they are the"
        " sample\u2019s own. Tests compare models on the images that both were given, and on all"
        " of them, by PyTorch, where neither file ever differed from it, on enough of them."
    )

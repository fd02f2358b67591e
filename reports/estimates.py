"""What a sample says of the whole set, and the sentence that says what was measured where.

Enters: rows of a device that evaluated a part of the images, and PyTorch's predictions of all.
Leaves: the same rows as estimates of the whole set, so that models stand beside each other though
one was given more images than another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from harness.metrics import UNSEEN, Classes, corrected_uer
from harness.records import ResultRow
from reports.agreed import agreements
from reports.view import RunKey, View
from reports.words import clean_text, span


def estimated(
    row: ResultRow, *, answers: Mapping[RunKey, Classes], labels: npt.NDArray[np.int64]
) -> ResultRow:
    """The row with its rates estimated for the whole set, where PyTorch predicted all of it.

    Args:
        row: of a whole set or a sample.
        answers: int64 [N] of every run; `UNSEEN` outside a sample.
        labels: int64 [N].
    """
    if row.n == row.n_of:
        return row
    device = answers.get((row.model_sha256, row.uap_sha256, row.device, row.emulated, row.runtime))
    torch = answers.get((row.model_sha256, row.uap_sha256, "local", False, "torch"))
    if device is None or torch is None or bool((torch == UNSEEN).any()):
        return row
    seen = np.flatnonzero(device != UNSEEN)
    if seen.size == 0:
        return row
    found = corrected_uer(torch != labels, device[seen] != labels[seen], seen)
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
    found = corrected_uer(torch == row.target, device[seen] == row.target, seen)
    return replace(row, tsr=found.value, tsr_low=found.low, tsr_high=found.high)


def sample_sizes(view: View) -> tuple[int, int] | None:
    """Fewest and most images behind a number; None where all are of the whole set."""
    rows = [r for v in view.variants for r in (v.clean, *v.attacked.values(), *v.curve) if r]
    sizes = [row.n for row in rows]
    if not sizes or min(sizes) == len(view.evaluation.labels):
        return None
    return min(sizes), max(sizes)


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
    sizes = sample_sizes(view)
    if sizes is None:
        return f"Measured on {place}, on all {whole:,} images."
    text = f"Measured on {place}, on a sample of {span(*sizes)} of {whole:,} images."
    compared, differing = agreements(view.answers, view.device)
    if not compared:
        return f"{text} Rates are the sample\u2019s own; tests compare models on what both saw."
    if judged_by_torch(view):
        return (
            f"{text} On it, exported models predict what PyTorch does, every time ({compared:,}"
            f" predictions): tests compare PyTorch\u2019s predictions of all {whole:,}. Rates are"
            " PyTorch\u2019s too; their intervals say what the sample leaves open of the exported"
            " files."
        )
    return (
        f"{text} Rates are estimates for all {whole:,}: PyTorch\u2019s, corrected by where the"
        f" sample differs from it ({differing:,} of {compared:,} predictions), with intervals that"
        " say how sure that is; where PyTorch was not run they are the sample\u2019s own. Tests"
        " compare models on the images that both saw, or on all of them by PyTorch where a file"
        " never differed on enough of them."
    )


def judged_by_torch(view: View) -> bool:
    """Whether every test is of all images though models were given some (`reports.agreed`)."""
    rows = [r for v in view.variants for r in (v.clean, *v.attacked.values(), *v.curve) if r]
    found = [view.predictions(row) for row in rows]
    return all(p is not None and not bool((p == UNSEEN).any()) for p in found)

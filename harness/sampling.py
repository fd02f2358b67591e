"""Samples of an evaluation set: which images come first, what is known of them, when to stop.

Enters: labels and a seed; stored prediction runs; a budget. Leaves: one order of the images for
every model, of which every sample is a prefix; prediction runs put together; the next images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.metrics import UNSEEN, Classes
from harness.records import Machine, PredictionRun
from harness.store_rows import StoredPrediction

Indices = npt.NDArray[np.int64]
_STREAM = 0x5A3F1E


@dataclass(frozen=True)
class Budget:
    """What one model's evaluation on a device may cost; neither: every image, however long."""

    seconds: float | None = None
    """Time inside the evaluation, set-up excluded; over all commands that add to the sample."""
    until_ci: float | None = None
    """Half-width of the UER's 95 % interval that is precise enough, in percentage points."""
    images: int | None = None
    """So many are enough: the head of the order."""

    @property
    def limited(self) -> bool:
        """Whether it depends on how the measurement goes when it ends."""
        return self.seconds is not None or self.until_ci is not None

    def of(self, images: int) -> int:
        """How many of so many images are evaluated at most."""
        return images if self.images is None else min(images, self.images)


@dataclass(frozen=True)
class RunKey:
    """What makes prediction runs one measurement, of the whole set or of a growing sample."""

    model: str
    evaluation: str
    uap: str | None
    device: str
    emulated: bool
    runtime: str


@dataclass(frozen=True)
class Merged:
    """What one machine knows of a measurement: its newest complete run, or its sample."""

    key: RunKey
    machine: Machine
    predictions: Classes
    """int64 [N], in the order of the evaluation set; `UNSEEN` where an image was not evaluated."""
    seconds: float
    created_at: str
    git_commit: str | None

    @property
    def seen(self) -> Indices:
        """Positions that were evaluated, ascending."""
        return np.flatnonzero(self.predictions != UNSEEN)

    @property
    def complete(self) -> bool:
        """Whether every image was evaluated."""
        return bool((self.predictions != UNSEEN).all())


def sample_order(labels: Classes, *, seed: int) -> Indices:
    """All positions, in a random order whose every prefix has the classes in their proportion.

    Each class is shuffled and spread evenly over the order from a random start, so that a prefix
    of n images holds floor or ceil of n times a class's share, give or take one.

    Args:
        labels: int64 [N].
        seed: of the workspace: the same images for every model and perturbation.
    """
    generator = np.random.default_rng([seed, _STREAM])
    place = np.empty(labels.size)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(members.size) + generator.random()) / members.size
    return np.argsort(place, kind="stable")


def key_of(run: PredictionRun) -> RunKey:
    """The measurement that a run belongs to."""
    return RunKey(
        run.model_sha256,
        run.evaluation_sha256,
        run.uap_sha256,
        run.device,
        run.emulated,
        run.runtime,
    )


def same_machine(first: Machine, second: Machine) -> bool:
    """Whether predictions of both belong together: the same processor and runtime."""
    return _identity(first) == _identity(second)


def by_machine(
    stored: Iterable[StoredPrediction], *, images: dict[str, int]
) -> dict[RunKey, list[Merged]]:
    """Prediction runs, oldest first, put together by measurement and by processor and runtime.

    On one machine a complete run replaces what was before it, and a sample adds to it: what was
    predicted twice counts once, as it was the last time.

    Args:
        stored: runs, oldest first.
        images: size of every evaluation set, by sha256.

    Returns:
        Of every measurement what each machine knows: the newest complete one first, or where none
        is complete the newest. A few images on another machine hide no whole evaluation set.
    """
    groups: dict[tuple[RunKey, tuple[str, str, str]], list[StoredPrediction]] = {}
    for item in stored:
        group = groups.setdefault((key_of(item.run), _identity(item.run.machine)), [])
        if item.run.indices is None:
            group.clear()
        group.append(item)
    newest_first = sorted(groups.items(), key=lambda entry: entry[1][-1].id, reverse=True)
    found: dict[RunKey, list[Merged]] = {}
    for (key, _machine), group in newest_first:
        found.setdefault(key, []).append(_merge(key, group, images[key.evaluation]))
    for known in found.values():
        known.sort(key=lambda run: not run.complete)  # stable: the newest first within each
    return found


def merged(stored: Iterable[StoredPrediction], *, images: dict[str, int]) -> dict[RunKey, Merged]:
    """The first of `by_machine` for every measurement."""
    return {key: known[0] for key, known in by_machine(stored, images=images).items()}


def _merge(key: RunKey, group: list[StoredPrediction], images: int) -> Merged:
    predictions = np.full(images, UNSEEN, dtype=np.int64)
    for item in group:
        where = slice(None) if item.run.indices is None else np.asarray(item.run.indices)
        predictions[where] = item.run.predictions
    last = group[-1]
    return Merged(
        key=key,
        machine=last.run.machine,
        predictions=predictions,
        seconds=sum(item.run.seconds for item in group),
        created_at=last.created_at,
        git_commit=last.git_commit,
    )


def _identity(machine: Machine) -> tuple[str, str, str]:
    return machine.arch, machine.cpu, machine.runtime_version


# --- how far to go -------------------------------------------------------------------------------


def lead(order: Indices, predictions: Classes) -> int:
    """How many images at the head of `order` were evaluated."""
    unseen = np.flatnonzero(predictions[order] == UNSEEN)
    return int(unseen[0]) if unseen.size else order.size


def behind(
    leads: Sequence[int], seconds: Sequence[float], *, images: int, budget: Budget
) -> list[int]:
    """Which of several measurements want the next images; none when the sample is finished.

    Those that lead least go on, so that all keep to the same images. Each has an equal part of
    the budget, and goes on while one image more fits into it.

    Args:
        leads: images at the head of the order that each has.
        seconds: what each has taken.
        images: how many there are.
        budget: of all of them together; its interval is the caller's to judge.
    """
    least = min(leads)
    if least >= budget.of(images):
        return []
    last = [i for i, at in enumerate(leads) if at == least]
    return last if least == 0 or seconds_left(leads, seconds, last, budget=budget) >= 0 else []


def seconds_left(
    leads: Sequence[int], seconds: Sequence[float], last: Sequence[int], *, budget: Budget
) -> float:
    """What is left of the part of `last` after one image more; infinite without a limit."""
    if budget.seconds is None:
        return math.inf
    spent = sum(seconds[i] for i in last)
    one_more = spent / max(1, min(leads[i] for i in last))
    return budget.seconds * len(last) / len(leads) - spent - one_more

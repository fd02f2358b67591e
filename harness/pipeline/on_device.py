"""A model's predictions on a device: all images, or as many as a budget or an interval asks for.

Enters: what is stored of a measurement, a device. Leaves: prediction runs in the store, added to
every few seconds. Clean and attacked images advance together, chunk by chunk through one order of
the images: whenever it stops, what is stored is complete pairs of one random sample.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from devices.session import Device, DeviceSession
from harness import metrics
from harness.metrics import UNSEEN, Classes
from harness.pipeline.context import Context
from harness.pipeline.tasks import Progress
from harness.records import DeviceUnreachable, Machine, PredictionRun
from harness.results import corrected_uer
from harness.sampling import (
    Budget,
    Indices,
    Merged,
    RunKey,
    behind,
    lead,
    same_machine,
    seconds_left,
)
from harness.store import Store

CHUNK_S, UNHURRIED_CHUNK_S = 2.0, 10.0
"""How long all of a chunk's images take, with a budget and without: a stop loses one at most."""
FIRST_IMAGES = 8
"""Of the first chunk with a budget, when nobody knows how slow the device is."""
GROWTH = 4
CI_STEP = 8
"""With an interval to reach, a chunk is at most this fraction of the sample: little too far."""
STORE_S = 10.0
"""How much work a kill may cost."""

Deltas = Mapping[str | None, npt.NDArray[np.integer] | None]


@dataclass(frozen=True)
class Sample:
    """What is known of one model on one device: clean, and under each UAP."""

    keys: dict[str | None, RunKey]
    """UAP sha256, or None for clean -> the measurement."""
    labels: Classes
    order: Indices
    predictions: dict[str | None, Classes]
    """int64 [N] each, `UNSEEN` where not evaluated; in the order of the evaluation set."""
    seconds: dict[str | None, float]
    known: dict[str | None, list[Merged]]
    """As stored, by machine; the first of each is taken until the machine is known."""
    in_torch: dict[str | None, Merged]
    budget: Budget

    @staticmethod
    def of(
        keys: dict[str | None, RunKey],
        *,
        labels: Classes,
        order: Indices,
        known: dict[str | None, list[Merged]],
        in_torch: dict[str | None, Merged],
        budget: Budget,
    ) -> Sample:
        """The state that is stored."""
        nothing = np.full(labels.size, UNSEEN, dtype=np.int64)
        taken = {uap: runs[0] for uap, runs in known.items() if runs}
        return Sample(
            keys=keys,
            labels=labels,
            order=order,
            predictions={u: (taken[u].predictions if u in taken else nothing).copy() for u in keys},
            seconds={u: taken[u].seconds if u in taken else 0.0 for u in keys},
            known=known,
            in_torch=in_torch,
            budget=budget,
        )

    def on(self, machine: Machine) -> Sample:
        """Without what another processor or runtime than the device's predicted."""
        return Sample.of(
            self.keys,
            labels=self.labels,
            order=self.order,
            known={
                uap: [run for run in runs if same_machine(run.machine, machine)]
                for uap, runs in self.known.items()
            },
            in_torch=self.in_torch,
            budget=self.budget,
        )

    @property
    def uaps(self) -> list[str | None]:
        return list(self.keys)

    @property
    def leads(self) -> list[int]:
        """Images at the head of the order that each of `uaps` has."""
        return [lead(self.order, self.predictions[uap]) for uap in self.uaps]

    def behind(self) -> list[str | None]:
        """Of `uaps`, those to evaluate more images under; none when the sample is finished."""
        leads, seconds = self.leads, [self.seconds[uap] for uap in self.uaps]
        last = behind(leads, seconds, images=self.labels.size, budget=self.budget)
        return [] if last and self._precise() else [self.uaps[i] for i in last]

    def left_s(self, uaps: Sequence[str | None]) -> float:
        """Seconds left for `uaps`, which lead least, after one image more."""
        last = [self.uaps.index(uap) for uap in uaps]
        seconds = [self.seconds[uap] for uap in self.uaps]
        return seconds_left(self.leads, seconds, last, budget=self.budget)

    def _precise(self) -> bool:
        """Whether every UER's interval, or the clean error's alone, is as narrow as asked for."""
        target = self.budget.until_ci
        judged = [uap for uap in self.uaps if uap is not None] or self.uaps
        return target is not None and all(100 * self._half_width(uap) <= target for uap in judged)

    def _half_width(self, uap: str | None) -> float:
        """Of the corrected error rate where there is one, else of the sample's own (Wilson)."""
        run = Merged(self.keys[uap], _NOWHERE, self.predictions[uap], 0.0, "", None)
        seen = run.seen
        if seen.size == 0:
            return 1.0
        corrected = corrected_uer(run, self.in_torch.get(uap), self.labels)
        if corrected is not None:
            return (corrected.high - corrected.low) / 2
        wrong = int(np.count_nonzero(run.predictions[seen] != self.labels[seen]))
        low, high = metrics.wilson(wrong, seen.size)
        return (high - low) / 2


_NOWHERE = Machine("", "", 0, "", "", "")


@dataclass
class _Writer:
    """Chunks on their way to the store."""

    store: Store
    device: Device
    machine: Machine
    images: int
    chunks: dict[RunKey, list[tuple[Indices, Classes, float]]] = field(default_factory=dict)
    stored_s: float = field(default_factory=time.monotonic)

    def add(self, chunk: Mapping[RunKey, tuple[Indices, Classes, float]]) -> None:
        for key, part in chunk.items():
            self.chunks.setdefault(key, []).append(part)
        if time.monotonic() - self.stored_s > STORE_S:
            self.flush()

    def flush(self) -> None:
        """Everything so far, in one transaction: pairs stay pairs."""
        runs = [self._run(key, parts) for key, parts in self.chunks.items()]
        # Forgotten first: an interrupt right after storing must not store them, and their
        # seconds, once more.
        kept, self.chunks, self.stored_s = self.chunks, {}, time.monotonic()
        if runs:
            try:
                self.store.add_prediction_runs(runs)
            except Exception:
                self.chunks = kept
                raise

    def _run(self, key: RunKey, parts: list[tuple[Indices, Classes, float]]) -> PredictionRun:
        indices = np.concatenate([where for where, _, _ in parts])
        predictions = np.concatenate([classes for _, classes, _ in parts])
        everything = indices.size == self.images
        if everything:  # in one go: a complete run
            predictions = predictions[np.argsort(indices)]
        return PredictionRun(
            model_sha256=key.model,
            evaluation_sha256=key.evaluation,
            uap_sha256=key.uap,
            device=self.device.name,
            emulated=self.device.emulated,
            runtime="onnxruntime",
            machine=self.machine,
            predictions=tuple(predictions.tolist()),
            seconds=sum(seconds for _, _, seconds in parts),
            indices=None if everything else tuple(indices.tolist()),
        )


def sample_on_device(
    context: Context,
    store: Store,
    model: Path,
    device: Device,
    sample: Sample,
    deltas: Deltas,
    progress: Progress,
    *,
    threads: int | None = None,
) -> None:
    """Evaluate what the sample lacks, until it is finished; what was evaluated is stored.

    Raises:
        DeviceUnreachable: the device stayed away; the message says how much is safe.
    """
    images = context.data.evaluation.images
    progress(_fraction(sample), "")  # from here on the device's time passes
    with device.open() as session:
        session.load(model, threads=threads or context.config.eval.threads)
        session.set_images(images[sample.order])
        sample = sample.on(session.machine)
        writer = _Writer(store, device, session.machine, len(images))
        try:
            _advance(context, session, sample, deltas, writer, progress)
        except DeviceUnreachable as lost:
            writer.flush()
            raise DeviceUnreachable(
                f"{lost}; {min(sample.leads):,} of {len(images):,} images of {model.stem} are "
                "safely stored, and the same command goes on from there"
            ) from None
        finally:
            writer.flush()


def _advance(
    context: Context,
    session: DeviceSession,
    sample: Sample,
    deltas: Deltas,
    writer: _Writer,
    progress: Progress,
) -> None:
    batch_size, limited = context.config.eval.batch_size, sample.budget.limited
    images, size, rate = sample.budget.of(sample.labels.size), 0, 0.0
    while uaps := sample.behind():
        leads = sample.leads
        start = min(leads)
        size = _next_size(sample, uaps, size=size, rate=rate, batch_size=batch_size)
        stop = min([start + size, images, *(at for at in leads if at > start)])
        chunk: dict[RunKey, tuple[Indices, Classes, float]] = {}
        for uap in uaps:
            began_s = time.monotonic()
            predicted = session.predict(deltas[uap], start=start, stop=stop, batch_size=batch_size)
            seconds = time.monotonic() - began_s
            chunk[sample.keys[uap]] = (sample.order[start:stop], predicted, seconds)
        for uap in uaps:
            where, predicted, seconds = chunk[sample.keys[uap]]
            sample.predictions[uap][where] = predicted
            sample.seconds[uap] += seconds
        rate = sum(seconds for _, _, seconds in chunk.values()) / (stop - start)
        writer.add(chunk)
        progress(_fraction(sample), f"{min(sample.leads)} images" if limited else "")


def _next_size(
    sample: Sample, uaps: list[str | None], *, size: int, rate: float, batch_size: int
) -> int:
    """Images of the next chunk; `rate` is seconds an image under all of `uaps`, 0 if unknown."""
    budget = sample.budget
    if size == 0 or rate == 0:
        return FIRST_IMAGES if budget.limited else batch_size
    seconds = CHUNK_S if budget.limited else UNHURRIED_CHUNK_S
    # What is left holds one image beyond itself.
    seconds = min(seconds, sample.left_s(uaps) + rate)
    wanted = min(GROWTH * size, int(seconds / rate))
    if budget.until_ci is not None:
        wanted = min(wanted, max(FIRST_IMAGES, min(sample.leads) // CI_STEP))
    if wanted > batch_size:
        wanted -= wanted % batch_size
    return max(1, wanted)


def _fraction(sample: Sample) -> float:
    """How far it is: in images, or in time where that is spent first."""
    wanted = sample.budget.of(sample.labels.size)
    done = sum(min(at, wanted) for at in sample.leads) / (wanted * len(sample.uaps))
    if sample.budget.seconds is not None:
        done = max(done, sum(sample.seconds.values()) / sample.budget.seconds)
    return min(1.0, done)

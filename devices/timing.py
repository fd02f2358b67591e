"""The latency protocol (FACTS G): fresh processes, models interleaved, every sample kept.

Enters: a device, model files, images. Leaves: raw `LatencyProcess` records; percentiles and
verdicts are derived from them elsewhere, later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from devices.model_file import check_model_file
from devices.perturbation import Images, checked_images
from devices.session import Device
from harness.records import (
    LATENCY_PROCESSES,
    LatencyProcess,
    Machine,
    MeasurementInvalid,
    UsageError,
)

MAX_IMAGES = 64
"""Images that a latency process cycles over: enough variety, too few to show in its peak RSS."""


@dataclass(frozen=True)
class LatencySettings:
    """How much to measure. Counts and seconds are per process; both minimums must be reached."""

    mode: Literal["quick", "full"]
    processes: int
    """Fresh processes per model: `LATENCY_PROCESSES` in both modes."""
    warmup_runs: int
    warmup_seconds: float
    min_seconds: float
    """Time inside the model, so that it can be verified from the stored samples."""
    min_runs: int
    threads: int = 1

    def __post_init__(self) -> None:
        counts = (self.processes, self.min_runs, self.threads)
        if min(counts) < 1 or min(self.warmup_runs, self.warmup_seconds, self.min_seconds) < 0:
            raise UsageError(
                "latency needs at least one process, run and thread, and no negative minimum;"
                f" got {self}"
            )


QUICK = LatencySettings(
    mode="quick",
    processes=LATENCY_PROCESSES,
    warmup_runs=10,
    warmup_seconds=0.1,
    min_seconds=0.25,
    min_runs=30,
)
"""A second or two a model, on an unsettled machine: labelled, never compared with `FULL`."""
FULL = LatencySettings(
    mode="full",
    processes=LATENCY_PROCESSES,
    warmup_runs=10,
    warmup_seconds=2.0,
    min_seconds=12.0,
    min_runs=205,
)
"""5 x 12 s = 60 s and 5 x 205 = 1,025 samples, at least."""


def interleaved(names: Iterable[str], *, processes: int, seed: int) -> tuple[str, ...]:
    """The order of `processes` rounds, each with every name once, shuffled anew.

    A drift of the machine (heat, a neighbour) then falls on all models, not on the last.
    """
    generator = np.random.default_rng(seed)
    pool = sorted(names)  # the order of the caller's mapping must not matter
    return tuple(
        pool[index] for _ in range(processes) for index in generator.permutation(len(pool))
    )


def measure_latency(
    device: Device,
    models: Mapping[str, Path],
    images: Images,
    *,
    settings: LatencySettings,
    seed: int,
    delta_255: npt.NDArray[np.integer] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[Machine, tuple[LatencyProcess, ...]]]:
    """Batch-1 latency of every model: one process at a time, in random order.

    Args:
        device: where to measure; an emulated one is refused, its times mean nothing.
        models: name -> ONNX file.
        images: uint8 [N, C, H, W]; at most `MAX_IMAGES` of them, drawn with `seed`, are used.
        settings: `QUICK`, `FULL`, or others.
        seed: of the order of the processes and of the draw of the images.
        delta_255: integers [C, H, W] in 1/255 units; with it clean and attacked images take turns,
            so that both meet the same machine. None: clean images only.
        on_progress: called with the number of processes done, of
            `settings.processes * len(models)`.

    Returns:
        Name -> the machine and its processes, in the order they ran; names as in `models`.

    Raises:
        UsageError: an emulated device, no model, a bad model file, or images that do not fit.
        MeasurementInvalid: the machine was not the same in all processes.

    Every process knows the boot it belongs to (`devices.session`); processes of several boots are
    no valid measurement together, which is for whoever summarises them to say.
    """
    if device.emulated:
        raise UsageError(f"{device.name} is emulated: it has predictions, but no latency")
    if not models:
        raise UsageError("no model to measure")
    images = _drawn(checked_images(images), seed=seed)
    for model in models.values():  # before the first minute is spent
        check_model_file(model)
    machines: list[Machine] = []
    measured: dict[str, list[LatencyProcess]] = {name: [] for name in models}
    order = interleaved(models, processes=settings.processes, seed=seed)
    for done, name in enumerate(order, start=1):
        with device.open() as session:
            session.load(models[name], threads=settings.threads)
            session.set_images(images)
            process = session.measure(
                warmup_runs=settings.warmup_runs,
                warmup_seconds=settings.warmup_seconds,
                min_runs=settings.min_runs,
                min_seconds=settings.min_seconds,
                delta_255=delta_255,
            )
            machines.append(session.machine)
        if machines[-1] != machines[0]:
            raise MeasurementInvalid(
                f"{device.name} changed while it was measured: {machines[0]} became {machines[-1]}"
            )
        measured[name].append(process)
        if on_progress is not None:
            on_progress(done)
    return {name: (machines[0], tuple(processes)) for name, processes in measured.items()}


def _drawn(images: Images, *, seed: int) -> Images:
    """At most `MAX_IMAGES` of the images, in their order."""
    if len(images) <= MAX_IMAGES:
        return images
    chosen = np.random.default_rng(seed).choice(len(images), size=MAX_IMAGES, replace=False)
    return images[np.sort(chosen)]

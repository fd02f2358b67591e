"""Stage `evaluate`: exported model + perturbations -> device -> results store.

Enters: exported models, UAP files, a device. Leaves: prediction runs and latency runs in the
store, PyTorch's predictions on the same bytes beside them. Nothing that is stored is measured
again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from devices.session import Device, DeviceSession
from devices.timing import FULL, QUICK, LatencySettings, measure_latency
from harness.crafting.perturbation import Perturbation, check_fits, load_perturbation, uap_record
from harness.inference import predict, torch_machine
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.checkpoints import reference_form
from harness.pipeline.context import Context
from harness.pipeline.exports import model_record
from harness.pipeline.tasks import Progress, Task
from harness.records import LatencyRun, ModelRecord, PredictionRun, Runtime, UapRecord
from harness.store import Store

EVALUATE_COST = 1.5
"""Forward passes per image: PyTorch's, and onnxruntime's at about half of one."""
LATENCY_SECONDS_OVERHEAD = 1.0
"""Seconds to start a process and load a model, per repetition."""


@dataclass(frozen=True)
class Victim:
    """A model to attack: its ONNX file, and the checkpoint behind it unless a user brought it."""

    name: str
    onnx: Path
    checkpoint: Path | None


@dataclass(frozen=True)
class Attack:
    """A perturbation with its file's identity."""

    perturbation: Perturbation
    record: UapRecord


def load_attack(context: Context, path: Path) -> Attack:
    """Read a UAP file and check that it fits this workspace.

    Raises:
        UsageError: unreadable, damaged, over budget, or made for other images.
    """
    perturbation = load_perturbation(path)
    check_fits(
        perturbation,
        path,
        dataset=context.data.name,
        image_shape=context.image_shape,
        classes=len(context.data.classes),
    )
    return Attack(perturbation, uap_record(path, perturbation))


def evaluate_task(
    context: Context,
    victim: Victim,
    uap_paths: Sequence[Path],
    device: Device,
) -> Task:
    """Evaluate one victim, clean and under each UAP, on the device and in PyTorch."""

    def is_done() -> bool:
        if not victim.onnx.exists() or any(not path.exists() for path in uap_paths):
            return False
        if not context.workspace.results.exists():
            return False
        with context.open_store() as store:
            return not _missing(context, store, victim, uap_paths, device)

    return Task(
        stage="evaluate",
        name=f"attack {victim.name} on {device.name}",
        work=EVALUATE_COST * (1 + len(uap_paths)) * len(context.data.evaluation),
        is_done=is_done,
        run=lambda progress: evaluate(context, victim, uap_paths, device, progress),
    )


def evaluate(
    context: Context,
    victim: Victim,
    uap_paths: Sequence[Path],
    device: Device,
    progress: Progress,
) -> None:
    """Measure what the store lacks, and store it."""
    with context.open_store() as store:
        model = model_record(context, victim.name, victim.onnx)
        attacks = [load_attack(context, path) for path in uap_paths]
        store.add_evaluation_set(context.evaluation_set())
        store.add_model(model)
        for attack in attacks:
            store.add_uap(attack.record)
        missing = _missing(context, store, victim, uap_paths, device)
        by_sha256 = {attack.record.sha256: attack for attack in attacks}
        total = len(missing) * len(context.data.evaluation)
        meter = _Meter(total, progress)
        on_torch = [uap for uap, runtime in missing if runtime == "torch"]
        on_device = [uap for uap, runtime in missing if runtime == "onnxruntime"]
        if on_device:
            _on_device(context, store, victim, model, device, on_device, by_sha256, meter)
        if on_torch:
            _in_torch(context, store, victim, model, on_torch, by_sha256, meter)


def _missing(
    context: Context,
    store: Store,
    victim: Victim,
    uap_paths: Sequence[Path],
    device: Device,
) -> list[tuple[str | None, Runtime]]:
    """(UAP sha256 or None for clean, runtime) of every evaluation the store lacks."""
    model_sha256 = context.sha256(victim.onnx)
    uaps: list[str | None] = [None, *(context.sha256(path) for path in uap_paths)]
    runtimes: list[tuple[Runtime, str, str]] = [
        ("onnxruntime", device.name, onnxruntime.__version__)
    ]
    if victim.checkpoint is not None:
        runtimes.append(("torch", "local", torch.__version__))
    return [
        (uap, runtime)
        for runtime, device_name, version in runtimes
        for uap in uaps
        if not store.has_prediction(
            model_sha256=model_sha256,
            evaluation_sha256=context.data.digests["evaluation"],
            uap_sha256=uap,
            device=device_name,
            runtime=runtime,
            runtime_version=version,
        )
    ]


@dataclass
class _Meter:
    """Images evaluated so far, as a fraction."""

    total: int
    progress: Progress
    base: int = 0

    def at(self, images: int) -> None:
        self.progress((self.base + images) / max(self.total, 1), "")

    def close_run(self, images: int) -> None:
        self.base += images
        self.at(0)


def _on_device(
    context: Context,
    store: Store,
    victim: Victim,
    model: ModelRecord,
    device: Device,
    uaps: list[str | None],
    attacks: dict[str, Attack],
    meter: _Meter,
) -> None:
    config, images = context.config, context.data.evaluation.images
    with device.open() as session:
        session.load(victim.onnx, threads=config.eval.threads)
        session.set_images(images)
        for uap in uaps:
            began = time.monotonic()
            predictions = session.predict(
                attacks[uap].perturbation.delta_255 if uap is not None else None,
                batch_size=config.eval.batch_size,
                on_progress=meter.at,
            )
            seconds = time.monotonic() - began
            run = _run(context, model, uap, predictions, seconds)
            store.add_prediction_runs([_placed(run, device, session)])
            meter.close_run(len(images))


def _in_torch(
    context: Context,
    store: Store,
    victim: Victim,
    model: ModelRecord,
    uaps: list[str | None],
    attacks: dict[str, Attack],
    meter: _Meter,
) -> None:
    assert victim.checkpoint is not None
    images = context.data.evaluation.images
    reference = reference_form(load_checkpoint(victim.checkpoint).build())
    reference.to(context.accelerator)
    for uap in uaps:
        began = time.monotonic()
        predictions = predict(
            reference,
            images,
            attacks[uap].perturbation.delta_255 if uap is not None else None,
            device=context.accelerator,
        )
        run = _run(context, model, uap, predictions, time.monotonic() - began)
        store.add_prediction_runs([run])
        meter.close_run(len(images))


def _run(
    context: Context,
    model: ModelRecord,
    uap: str | None,
    predictions: npt.NDArray[np.int64],
    seconds: float,
) -> PredictionRun:
    """A run in PyTorch on this machine; `_placed` says when it was elsewhere."""
    return PredictionRun(
        model_sha256=model.sha256,
        evaluation_sha256=context.data.digests["evaluation"],
        uap_sha256=uap,
        device="local",
        emulated=False,
        runtime="torch",
        machine=torch_machine(context.accelerator),
        predictions=tuple(int(p) for p in predictions),
        seconds=seconds,
    )


def _placed(run: PredictionRun, device: Device, session: DeviceSession) -> PredictionRun:
    return replace(
        run,
        device=device.name,
        emulated=device.emulated,
        runtime="onnxruntime",
        machine=session.machine,
    )


# --- latency -------------------------------------------------------------------------------------


def latency_task(context: Context, victims: Sequence[Victim], device: Device) -> Task:
    """Batch-1 latency of all victims, interleaved; every raw sample into the store."""
    settings = latency_settings(context)
    seconds = settings.processes * (
        settings.warmup_seconds + settings.min_seconds + LATENCY_SECONDS_OVERHEAD
    )

    def is_done() -> bool:
        if not context.workspace.results.exists():
            return False
        if any(not victim.onnx.exists() for victim in victims):
            return False
        with context.open_store() as store:
            have = {
                (s.run.model_sha256, s.run.device, s.run.mode, s.run.threads)
                for s in store.latencies()
            }
        return all(
            (context.sha256(v.onnx), device.name, settings.mode, settings.threads) in have
            for v in victims
        )

    return Task(
        stage="latency",
        name=f"latency on {device.name} ({settings.mode})",
        work=seconds * len(victims) * FORWARDS_PER_SECOND,
        is_done=is_done,
        run=lambda progress: measure(context, victims, device, settings, progress),
    )


FORWARDS_PER_SECOND = 1000.0
"""Turns the latency protocol's fixed seconds into the unit of work; corrected as tasks finish."""


def latency_settings(context: Context) -> LatencySettings:
    """The protocol the configuration asks for."""
    config = context.config.latency
    return replace(FULL if config.mode == "full" else QUICK, threads=config.threads)


def measure(
    context: Context,
    victims: Sequence[Victim],
    device: Device,
    settings: LatencySettings,
    progress: Progress,
) -> None:
    """Measure latency and store it, raw."""
    total = settings.processes * len(victims)
    measured = measure_latency(
        device,
        {victim.name: victim.onnx for victim in victims},
        context.data.evaluation.images,
        settings=settings,
        seed=context.config.seed,
        on_progress=lambda done: progress(done / total, f"{done}/{total} processes"),
    )
    with context.open_store() as store:
        for victim in victims:
            machine, processes = measured[victim.name]
            store.add_model(model_record(context, victim.name, victim.onnx))
            store.add_latency_run(
                LatencyRun(
                    model_sha256=context.sha256(victim.onnx),
                    device=device.name,
                    emulated=device.emulated,
                    runtime="onnxruntime",
                    machine=machine,
                    mode=settings.mode,
                    threads=settings.threads,
                    processes=processes,
                )
            )

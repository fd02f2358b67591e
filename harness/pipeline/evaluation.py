"""Stage `evaluate`: exported model + perturbations -> device -> results store.

Enters: exported models, UAP files, a device. Leaves: prediction runs and latency runs in the
store, PyTorch's predictions on the same bytes beside them. Nothing that is stored is measured
again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch

from devices.session import Device
from harness.crafting.perturbation import Perturbation, check_fits, load_perturbation, uap_record
from harness.inference import predict, torch_machine
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.checkpoints import reference_form
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.exports import model_record
from harness.pipeline.tasks import Progress, Task
from harness.records import ModelRecord, PredictionRun, Runtime, UapRecord
from harness.store import Store

EVALUATE_COST = 1.5
"""Forward passes per image: PyTorch's, and onnxruntime's at about half of one."""


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
    own = path.resolve().parent == context.workspace.cache.resolve() and "key" in perturbation.meta
    return Attack(perturbation, uap_record(path, perturbation, own=own))


def register(
    context: Context, store: Store, victims: Sequence[Victim], attacks: Sequence[Attack]
) -> None:
    """Make these the current images, models and perturbations of the store.

    Done by every command, measured anew or not: what is current is what was asked for last.
    """
    store.add_evaluation_set(context.evaluation_set())
    for victim in victims:
        store.add_model(model_record(context, victim.name, victim.onnx))
    for attack in attacks:
        store.add_uap(attack.record)


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
    use_cpu_threads(CPU_THREADS)
    with context.open_store() as store:
        model = model_record(context, victim.name, victim.onnx)
        attacks = [load_attack(context, path) for path in uap_paths]
        register(context, store, [victim], attacks)
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
    uaps = list(dict.fromkeys([None, *(context.sha256(path) for path in uap_paths)]))
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
            run = PredictionRun(
                model_sha256=model.sha256,
                evaluation_sha256=context.data.digests["evaluation"],
                uap_sha256=uap,
                device=device.name,
                emulated=device.emulated,
                runtime="onnxruntime",
                machine=session.machine,
                predictions=tuple(int(p) for p in predictions),
                seconds=time.monotonic() - began,
            )
            store.add_prediction_runs([run])
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
        run = PredictionRun(
            model_sha256=model.sha256,
            evaluation_sha256=context.data.digests["evaluation"],
            uap_sha256=uap,
            device="local",
            emulated=False,
            runtime="torch",
            machine=torch_machine(context.accelerator),
            predictions=tuple(int(p) for p in predictions),
            seconds=time.monotonic() - began,
        )
        store.add_prediction_runs([run])
        meter.close_run(len(images))

"""Stage `evaluate`: exported model + perturbations -> device -> results store.

Enters: exported models, UAP files, a device. Leaves: prediction runs and latency runs in the
store, PyTorch's predictions on the same bytes beside them. Nothing that is stored is measured
again: a sample that is to be larger goes on where it ended.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from devices.session import Device
from harness.inference import predict, torch_machine
from harness.pipeline.attacks import Attack, load_attack
from harness.pipeline.context import (
    CPU_THREADS,
    MAX_EVALUATIONS,
    Context,
    use_cpu_threads,
)
from harness.pipeline.exports import model_record
from harness.pipeline.on_device import Sample, sample_on_device
from harness.pipeline.tasks import FORWARDS_PER_SECOND, Progress, Task
from harness.records import ModelRecord, PredictionRun
from harness.sampling import Budget, RunKey, by_machine, sample_order
from harness.store import Store

DEVICE_COST = 0.5
"""Of onnxruntime's forward pass on one core, in PyTorch's."""
_TURN = threading.Lock()
"""A GPU predicts for one model after another: the first goes on to the cores while others wait."""


@dataclass(frozen=True)
class Victim:
    """A model to attack: its ONNX file, and what PyTorch says beside it."""

    name: str
    onnx: Path
    reference: Callable[[], nn.Module] | None
    """Makes the PyTorch model that the file is of, on the CPU: pixels float [N, C, H, W] in
    [0, 255] -> logits. None: there is none at hand."""
    of_code: bool = False
    """Exported here from a user's own code; its manifest says so."""


def register(
    context: Context, store: Store, victims: Sequence[Victim], attacks: Sequence[Attack]
) -> None:
    """Make these the current images, models and perturbations of the store.

    Done by every command, measured anew or not: what is current is what was asked for last.
    """
    store.add_evaluation_set(context.evaluation_set())
    for victim in victims:
        store.add_model(model_record(context, victim.name, victim.onnx, of_code=victim.of_code))
    for attack in attacks:
        store.add_uap(attack.record)


def budget_for(
    device: Device,
    models: int,
    *,
    images: int | None = None,
    seconds: float | None = None,
    until_ci: float | None = None,
) -> Budget:
    """Each model's equal share of what the user allows, by default of what the device does.

    An interval to reach has no time limit unless one is given, too; and what the command asks for
    goes before the number of images that the configuration has.
    """
    if seconds is not None or until_ci is not None:
        images = None
    else:
        seconds = device.default_budget_s
    return Budget(None if seconds is None else seconds / max(1, models), until_ci, images)


def evaluate_task(
    context: Context,
    victim: Victim,
    uap_paths: Sequence[Path],
    device: Device,
    budget: Budget,
    *,
    beside: int = MAX_EVALUATIONS,
) -> Task:
    """Evaluate one victim, clean and under each UAP, on the device and in PyTorch.

    On this machine models are evaluated side by side, up to `beside` of them, each on its share of
    the cores: small models are faster so. Where PyTorch has a GPU, they take turns there first. A
    board has one runner, and a time budget is of a machine that does nothing else.
    """
    if victim.reference is None and not victim.of_code:
        # PyTorch has no say about a file that a user brought: nothing would correct a sample.
        budget = replace(budget, images=None)
    in_crew = device.name == "local" and not budget.limited
    # From a GPU they come to the cores one after the other.
    staggered = victim.reference is not None and context.accelerator.type != "cpu"
    threads = context.threads_of_each(beside, staggered=staggered) if in_crew else None
    conditions = 1 + len(uap_paths)
    images = len(context.data.evaluation)
    on_cores = DEVICE_COST * conditions * budget.of(images) / (threads or 1)
    known_s = 0.0
    if budget.seconds is not None:
        known_s, on_cores = budget.seconds, 0.0
        if device.name == "local":  # how slow another is, nobody knows before it is asked
            known_s = min(known_s, DEVICE_COST * conditions * images / FORWARDS_PER_SECOND)

    def is_done() -> bool:
        if not victim.onnx.exists() or any(not path.exists() for path in uap_paths):
            return False
        if not context.workspace.results.exists():
            return False
        with context.open_store() as store:
            plan = _plan(context, store, victim, uap_paths, device, budget)
        return not plan.in_torch and plan.finished

    task = Task(
        stage="evaluate",
        name=f"attack {victim.name} on {device.name}",
        work=float(conditions * images) if victim.reference else 0.0,
        core_work=on_cores,
        known_s=known_s,
        is_done=is_done,
        run=lambda progress: evaluate(
            context,
            victim,
            uap_paths,
            device,
            budget,
            progress,
            threads=threads,
            torch_share=task.work / task.weight if task.weight else 0.0,
        ),
        beside="cores" if in_crew else None,
        after=(f"export {victim.onnx.stem}", *(f"craft {path.stem}" for path in uap_paths)),
    )
    return task


def evaluate(
    context: Context,
    victim: Victim,
    uap_paths: Sequence[Path],
    device: Device,
    budget: Budget,
    progress: Progress,
    *,
    threads: int | None = None,
    torch_share: float = 0.5,
) -> None:
    """Measure what the store lacks, and store it.

    Args:
        context: the workspace.
        victim: whom to attack.
        uap_paths: what with, besides clean images.
        device: where.
        budget: how long.
        progress: told how far it is.
        threads: of PyTorch and onnxruntime both; None: as usual. Predictions do not depend on it.
        torch_share: how far it is when PyTorch is done, whether now or before.
    """
    use_cpu_threads(threads or CPU_THREADS)
    with context.open_store() as store:
        model = model_record(context, victim.name, victim.onnx, of_code=victim.of_code)
        attacks = [load_attack(context, path) for path in uap_paths]
        register(context, store, [victim], attacks)
        by_sha256 = {attack.record.sha256: attack for attack in attacks}
        plan = _plan(context, store, victim, uap_paths, device, budget)
        lacking = len(plan.in_torch)
        begin = torch_share * (1 - lacking / (1 + len(uap_paths)))
        # PyTorch first: what it says of the whole set makes the device's sample say more.
        if plan.in_torch:
            meter = _Meter(
                lacking, lambda done, note: progress(begin + done * (torch_share - begin), note)
            )
            with _TURN if context.accelerator.type != "cpu" else contextlib.nullcontext():
                progress(begin, "")  # it may be time to stop
                _in_torch(context, store, victim, model, plan.in_torch, by_sha256, meter)
            plan = _plan(context, store, victim, uap_paths, device, budget)
        if not plan.finished:
            deltas = {
                uap: by_sha256[uap].perturbation.delta_255 if uap is not None else None
                for uap in plan.sample.uaps
            }
            sample_on_device(
                context,
                store,
                victim.onnx,
                device,
                plan.sample,
                deltas,
                lambda done, note: progress(torch_share + done * (1 - torch_share), note),
                threads=threads,
            )


@dataclass(frozen=True)
class _Plan:
    """What is stored of one victim, and what is still to be done."""

    in_torch: list[str | None]
    """UAP sha256, None for clean, of what PyTorch has not predicted."""
    sample: Sample

    @property
    def finished(self) -> bool:
        return not self.sample.behind()


def _plan(
    context: Context,
    store: Store,
    victim: Victim,
    uap_paths: Sequence[Path],
    device: Device,
    budget: Budget,
) -> _Plan:
    model, evaluation = context.sha256(victim.onnx), context.data.digests["evaluation"]
    uaps = list(dict.fromkeys([None, *(context.sha256(path) for path in uap_paths)]))
    labels = context.data.evaluation.labels
    known = by_machine(
        store.predictions_of(model_sha256=model, evaluation_sha256=evaluation),
        images={evaluation: len(labels)},
    )
    torch_keys = {uap: RunKey(model, evaluation, uap, "local", False, "torch") for uap in uaps}
    in_torch = {
        uap: run
        for uap, key in torch_keys.items()
        for run in reversed(known.get(key, []))  # the first, which counts, comes last
        if run.machine.runtime_version == torch.__version__
    }
    keys = {
        uap: RunKey(model, evaluation, uap, device.name, device.emulated, "onnxruntime")
        for uap in uaps
    }
    # Only of this machine is the runtime known before it is asked. What another device is, it
    # says when it is connected, and what another runtime predicted then counts no more.
    here = onnxruntime.__version__ if device.name == "local" else None
    on_device = {
        uap: [run for run in known.get(key, []) if here in (None, run.machine.runtime_version)]
        for uap, key in keys.items()
    }
    lacking = [uap for uap in uaps if uap not in in_torch] if victim.reference else []
    sample = Sample.of(
        keys,
        labels=labels,
        order=sample_order(labels, seed=context.config.seed),
        known=on_device,
        in_torch=in_torch,
        budget=budget,
    )
    return _Plan(lacking, sample)


@dataclass
class _Meter:
    """Runs over the whole set done so far, as a fraction."""

    total: int
    progress: Progress
    done: int = 0

    def close_run(self) -> None:
        self.done += 1
        self.progress(self.done / self.total, "")


def _in_torch(
    context: Context,
    store: Store,
    victim: Victim,
    model: ModelRecord,
    uaps: list[str | None],
    attacks: dict[str, Attack],
    meter: _Meter,
) -> None:
    assert victim.reference is not None
    images = context.data.evaluation.images
    reference = victim.reference().to(context.accelerator)
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
        meter.close_run()

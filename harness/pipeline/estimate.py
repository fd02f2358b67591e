"""How long work will take here: two short measurements, times the tasks' estimated work.

Enters: a context. Leaves: seconds of a forward pass of one image where PyTorch runs, and on one
core of the processor, where exported models run whatever PyTorch has. An estimate, said to be one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from harness.crafting.arithmetic import images_at_once
from harness.models.folded import fold
from harness.models.resnet import ModelSpec, build_model
from harness.pipeline.context import TRAIN_THREADS, Context, use_cpu_threads
from harness.pipeline.running import phases
from harness.pipeline.tasks import Shared, Task

BATCH = 64
REPETITIONS = 5


@dataclass(frozen=True)
class Rates:
    """Seconds of one image's forward pass through the model that the work is about."""

    accelerator: float
    core: float

    def seconds(self, task: Task) -> float:
        """What a task takes, alone on what it needs."""
        return task.work * self.accelerator + task.core_work * self.core + task.known_s


def measured_rates(context: Context, model: nn.Module | None = None) -> Rates:
    """Median times, measured now; on a CPU both are of one core.

    Args:
        context: the workspace.
        model: pixels float [N, C, H, W] in [0, 255] -> logits; None: as the configuration has it.
    """
    use_cpu_threads(TRAIN_THREADS)
    model = model or _configured(context)
    core = _seconds_per_forward(context, model, torch.device("cpu"))
    if context.accelerator.type == "cpu":
        return Rates(core, core)
    return Rates(_seconds_per_forward(context, model, context.accelerator), core)


def _configured(context: Context) -> nn.Module:
    config, data = context.config, context.data
    spec = ModelSpec(
        arch=config.arch,
        width=config.width,
        in_channels=context.image_shape[0],
        classes=len(data.classes),
        mean_255=data.mean_255,
        std_255=data.std_255,
    )
    return fold(build_model(spec, seed=0).eval())


def _seconds_per_forward(context: Context, model: nn.Module, device: torch.device) -> float:
    images = torch.from_numpy(context.data.train.images[:1])
    batch = min(BATCH, images_at_once(images), len(context.data.train))
    pixels = torch.from_numpy(context.data.train.images[:batch]).float().to(device)
    model, seconds = model.to(device), []
    with torch.inference_mode():
        for _ in range(REPETITIONS + 1):  # the first warms up
            began = time.perf_counter()
            model(pixels).sum().item()  # .item() waits for a GPU
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:])) / batch


def elapsed_seconds(
    tasks: Sequence[Task], rates: Rates, *, speedups: Mapping[Shared, int]
) -> float:
    """Time until all are done: those that run side by side share what they run on.

    Tasks beside each other end no sooner than the longest chain of those that wait for another,
    no sooner than all of them spread evenly, and no sooner than PyTorch is done with its part.

    Args:
        tasks: in the order of `run_tasks`.
        rates: of this machine.
        speedups: `Context.speedups`.
    """
    return sum(_phase_seconds(lanes, rates, speedups) for lanes in phases(tasks))


def _phase_seconds(
    lanes: Sequence[Sequence[Sequence[Task]]], rates: Rates, speedups: Mapping[Shared, int]
) -> float:
    """The longest lane; and what waits for another's group cannot all be done when that is."""
    ends: dict[str, float] = {}
    longest = 0.0
    for lane in lanes:
        at = 0.0
        for group in lane:
            at += _group_seconds(group, rates, speedups)
            ends.update((task.name, at) for task in group)
        longest = max(longest, at)
    for group in (group for lane in lanes for group in lane):
        own = {task.name for task in group}
        begins = {
            task.name: max((ends[n] for n in task.after if n in ends and n not in own), default=0.0)
            for task in group
        }
        last = max(begins.values())
        shortest = min(rates.seconds(task) for task in group if begins[task.name] == last)
        longest = max(longest, last + shortest)
    return longest


def _group_seconds(tasks: Sequence[Task], rates: Rates, speedups: Mapping[Shared, int]) -> float:
    cost, shared = rates.seconds, tasks[0].beside
    if shared is None:
        return sum(map(cost, tasks))
    beside = {task.name: task for task in tasks}

    def chain(task: Task) -> float:
        waits = [chain(beside[name]) for name in task.after if name in beside]
        return cost(task) + max(waits, default=0.0)

    longest = max(map(chain, tasks))
    evenly = sum(map(cost, tasks)) / speedups.get(shared, 1)
    in_torch = sum(task.work for task in tasks) * rates.accelerator
    return max(longest, evenly, in_torch / speedups.get("accelerator", 1))

"""How long work will take here: one short measurement, times the tasks' estimated work.

Enters: a context. Leaves: seconds per forward pass of one image. An estimate, said to be one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from harness.models.folded import fold
from harness.models.resnet import ModelSpec, build_model
from harness.pipeline.context import Context
from harness.pipeline.tasks import Task

BATCH = 64
REPETITIONS = 5


def seconds_per_forward(context: Context) -> float:
    """Median time of one image's forward pass through the configured model, measured now."""
    config, data = context.config, context.data
    spec = ModelSpec(
        arch=config.arch,
        width=config.width,
        in_channels=context.image_shape[0],
        classes=len(data.classes),
        mean_255=data.mean_255,
        std_255=data.std_255,
    )
    model = fold(build_model(spec, seed=0).eval()).to(context.accelerator)
    batch = min(BATCH, len(data.train))
    pixels = torch.from_numpy(data.train.images[:batch]).float().to(context.accelerator)
    seconds = []
    with torch.inference_mode():
        for _ in range(REPETITIONS + 1):  # the first warms up
            began = time.perf_counter()
            model(pixels).sum().item()  # .item() waits for a GPU
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:])) / batch


def elapsed_work(tasks: Sequence[Task], *, jobs: int) -> float:
    """Forward passes until all are done: those that run side by side share the cores.

    Tasks beside each other end no sooner than the longest chain of those that wait for another,
    and no sooner than all of them spread evenly.
    """
    beside = {task.name: task for task in tasks if task.side_by_side}
    in_turn = sum(task.work for task in tasks if not task.side_by_side)

    def chain(task: Task) -> float:
        waits = [chain(beside[name]) for name in task.after if name in beside]
        return task.work + max(waits, default=0.0)

    longest = max((chain(task) for task in beside.values()), default=0.0)
    return in_turn + max(longest, sum(task.work for task in beside.values()) / jobs)

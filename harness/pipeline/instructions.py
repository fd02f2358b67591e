"""Stage `instructions`: exported models -> ARM instructions of one inference, in the store.

Enters: exported models, an emulated device. Leaves: one count a model. A count is no time: it
stands in a column of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime

from devices.emulated import EmulatedDevice
from devices.session import Device
from harness.pipeline.context import Context
from harness.pipeline.evaluation import Victim, register
from harness.pipeline.tasks import Progress, Task
from harness.records import UsageError

FORWARDS_PER_MODEL = 10_000.0
"""Rough cost of a count: an emulated Python starts, and runs the model four times."""


def instructions_task(context: Context, victims: Sequence[Victim], device: Device) -> Task:
    """Count the instructions of the victims that have no count yet.

    Raises:
        UsageError: the device is not emulated.
    """
    if not isinstance(device, EmulatedDevice):
        raise UsageError(f"{device.name} is not emulated: instructions are counted by an emulator")
    return Task(
        stage="instructions",
        name=f"count instructions on {device.name}",
        work=0.0,
        core_work=FORWARDS_PER_MODEL * len(victims),
        is_done=lambda: not _missing(context, victims, device),
        run=lambda progress: _count(context, victims, device, progress),
    )


def _missing(context: Context, victims: Sequence[Victim], device: Device) -> list[Victim]:
    if not context.workspace.results.exists():
        return list(victims)
    with context.open_store() as store:
        counted = store.instruction_counts()
    return [
        victim
        for victim in victims
        if not victim.onnx.exists()
        or (context.sha256(victim.onnx), device.name, onnxruntime.__version__) not in counted
    ]


def _count(
    context: Context, victims: Sequence[Victim], device: EmulatedDevice, progress: Progress
) -> None:
    missing = _missing(context, victims, device)
    for done, victim in enumerate(missing):
        progress(done / len(missing), victim.name)
        instructions = device.instructions(victim.onnx)
        with context.open_store() as store:
            register(context, store, [victim], [])
            store.add_instruction_count(
                context.sha256(victim.onnx),
                device=device.name,
                runtime_version=onnxruntime.__version__,
                instructions=instructions,
            )

"""Stage `latency`: exported models -> batch-1 timings in the results store.

Enters: exported models, a device. Leaves: latency runs, every raw sample, stored round by round:
one fresh process of every model a round, so a kill loses a round at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from devices.session import Device
from devices.timing import FULL, QUICK, LatencySettings, measure_latency
from harness.pipeline.context import Context
from harness.pipeline.evaluation import Victim, register
from harness.pipeline.tasks import Progress, Task
from harness.records import LatencyRun

OVERHEAD_SECONDS = 1.0
"""To start a process and load a model, per repetition."""
FORWARDS_PER_SECOND = 1000.0
"""Turns the protocol's fixed seconds into the unit of work; corrected as tasks finish."""


def latency_settings(context: Context) -> LatencySettings:
    """The protocol the configuration asks for."""
    config = context.config.latency
    return replace(FULL if config.mode == "full" else QUICK, threads=config.threads)


def latency_task(context: Context, victims: Sequence[Victim], device: Device) -> Task:
    """Batch-1 latency of all victims, interleaved."""
    settings = latency_settings(context)
    seconds = settings.warmup_seconds + settings.min_seconds + OVERHEAD_SECONDS
    return Task(
        stage="latency",
        name=f"latency on {device.name} ({settings.mode})",
        work=settings.processes * seconds * len(victims) * FORWARDS_PER_SECOND,
        is_done=lambda: _rounds_done(context, victims, device, settings) >= settings.processes,
        run=lambda progress: _measure(context, victims, device, settings, progress),
    )


def _rounds_done(
    context: Context, victims: Sequence[Victim], device: Device, settings: LatencySettings
) -> int:
    """Processes stored of the victim that has fewest."""
    if not context.workspace.results.exists() or any(not v.onnx.exists() for v in victims):
        return 0
    counts: Counter[str] = Counter()
    with context.open_store() as store:
        for stored in store.latencies():
            run = stored.run
            if (run.device, run.mode, run.threads) == (
                device.name,
                settings.mode,
                settings.threads,
            ):
                counts[run.model_sha256] += len(run.processes)
    return min((counts[context.sha256(victim.onnx)] for victim in victims), default=0)


def _measure(
    context: Context,
    victims: Sequence[Victim],
    device: Device,
    settings: LatencySettings,
    progress: Progress,
) -> None:
    files = {victim.name: victim.onnx for victim in victims}
    images = context.data.evaluation.images
    total = settings.processes * len(victims)
    for done in range(_rounds_done(context, victims, device, settings), settings.processes):
        base = done * len(victims)

        def advance(finished: int, base: int = base) -> None:
            progress((base + finished) / total, f"{base + finished}/{total} processes")

        measured = measure_latency(
            device,
            files,
            images,
            settings=replace(settings, processes=1),
            seed=context.config.seed + done,
            on_progress=advance,
        )
        with context.open_store() as store:
            register(context, store, victims, [])
            for victim in victims:
                machine, processes = measured[victim.name]
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

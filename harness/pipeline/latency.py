"""Stage `latency`: exported models -> batch-1 timings in the results store.

Enters: exported models, a device. Leaves: latency runs, every raw sample, stored round by round:
one fresh process of every model a round, so a kill loses a round at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnxruntime

from devices.session import Device
from devices.timing import FULL, QUICK, LatencySettings, measure_latency
from harness.latencies import LatencyKey, boot_of, newest_latencies
from harness.pipeline.attacks import load_attack
from harness.pipeline.context import Context
from harness.pipeline.evaluation import Victim, register
from harness.pipeline.tasks import Progress, Task
from harness.records import LatencyRun, MeasurementInvalid

OVERHEAD_SECONDS = 1.0
"""To start a process and load a model, per repetition."""
MAX_RESTARTS = 2
"""How often a device may be rebooted while it is measured."""


def latency_settings(context: Context, mode: str | None = None) -> LatencySettings:
    """The protocol `mode` names, or else the configuration; threads as configured."""
    config = context.config.latency
    return replace(FULL if (mode or config.mode) == "full" else QUICK, threads=config.threads)


def latency_task(
    context: Context,
    victims: Sequence[Victim],
    device: Device,
    *,
    uap: Path,
    mode: str | None = None,
) -> Task:
    """Batch-1 latency of all victims, interleaved, and of clean and attacked images in turn.

    Args:
        context: the workspace.
        victims: the models.
        device: where to measure.
        uap: the perturbation of the attacked images.
        mode: the protocol; None: as configured.
    """
    settings = latency_settings(context, mode)
    seconds = settings.warmup_seconds + settings.min_seconds + OVERHEAD_SECONDS
    return Task(
        stage="latency",
        name=f"latency on {device.name} ({settings.mode})",
        work=0.0,
        known_s=settings.processes * seconds * len(victims),
        after=tuple(f"export {victim.onnx.stem}" for victim in victims),
        is_done=lambda: _rounds_done(context, victims, device, settings) >= settings.processes,
        run=lambda progress: _measure(context, victims, device, uap, settings, progress),
    )


def _rounds_done(
    context: Context, victims: Sequence[Victim], device: Device, settings: LatencySettings
) -> int:
    """Rounds stored of all victims: on one machine, each victim's without a reboot between."""
    if not context.workspace.results.exists() or any(not v.onnx.exists() for v in victims):
        return 0
    with context.open_store() as store:
        newest = newest_latencies(store)
    keys = [LatencyKey(context.sha256(v.onnx), device.name, "onnxruntime") for v in victims]
    groups = [newest[key] for key in keys if key in newest]
    # Of this machine alone is the runtime known before it is asked.
    here = onnxruntime.__version__ if device.name == "local" else None
    fitting = [
        group
        for group in groups
        if (group.mode, group.threads, group.alternating) == (settings.mode, settings.threads, True)
        and here in (None, group.machine.runtime_version)
    ]
    if len(fitting) < len(victims) or len({repr(group.machine) for group in fitting}) != 1:
        return 0
    return min(len(group.processes) for group in fitting)


def _measure(
    context: Context,
    victims: Sequence[Victim],
    device: Device,
    uap: Path,
    settings: LatencySettings,
    progress: Progress,
) -> None:
    """Round by round, until there are enough on one machine since one boot.

    Raises:
        MeasurementInvalid: the device does not stay up, or the same, for a measurement.
    """
    delta_255 = load_attack(context, uap).perturbation.delta_255
    files = {victim.name: victim.onnx for victim in victims}
    images = context.data.evaluation.images
    total = settings.processes * len(victims)
    done = _rounds_done(context, victims, device, settings)
    progress(done / settings.processes, "")
    lives: set[tuple[str, str | None]] = set()  # machines and boots met
    while done < settings.processes:
        base = done * len(victims)

        def advance(finished: int, base: int = base) -> None:
            progress((base + finished) / total, f"{base + finished}/{total} processes")

        measured = measure_latency(
            device,
            files,
            images,
            settings=replace(settings, processes=1),
            seed=context.config.seed + done,
            delta_255=delta_255,
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
        lives |= {(repr(machine), boot_of(p)) for machine, ps in measured.values() for p in ps}
        if len(lives) > 1 + MAX_RESTARTS:
            raise MeasurementInvalid(
                f"{device.name} was rebooted, or changed, {len(lives) - 1} times while its latency"
                " was measured, which is stored as INVALID: check its power supply"
            )
        # After a reboot it begins again: rounds are counted since the last one.
        done = _rounds_done(context, victims, device, settings)

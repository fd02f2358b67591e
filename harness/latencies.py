"""Latency runs of the store, put together: one process a round, until something changes.

Enters: an open `Store`. Leaves: for every model, device and runtime its newest measurement: the
processes of one protocol, on one machine, since one boot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness import metrics
from harness.metrics import Latency
from harness.records import LATENCY_PROCESSES, LatencyProcess, LatencyRun, Machine
from harness.store import Store

ALTERNATING, BOOT_ID = "alternating", "boot_id"
"""What `devices.session` adds to the first reading of a process."""


@dataclass(frozen=True)
class LatencyKey:
    """What is timed, and where."""

    model: str
    device: str
    runtime: str


@dataclass(frozen=True)
class LatencyGroup:
    """The newest processes that can be one measurement, in the order they ran."""

    mode: str
    threads: int
    machine: Machine
    alternating: bool
    """Whether clean and attacked images took turns."""
    processes: tuple[LatencyProcess, ...]
    """Since the last boot of the device."""
    before_boot: tuple[LatencyProcess, ...]
    """What a reboot cut off, if the processes since do not make up for it."""

    @property
    def measured(self) -> tuple[LatencyProcess, ...]:
        """All that a summary must know of: a run that was cut off by a reboot is not valid."""
        return self.before_boot + self.processes


def newest_latencies(store: Store) -> dict[LatencyKey, LatencyGroup]:
    """The newest measurement of every model. Emulated devices have none: their times mean nothing.

    A measurement is stored process by process, so that a kill loses one of them at most.
    """
    runs: dict[LatencyKey, list[LatencyRun]] = {}
    for stored in store.latencies():
        run = stored.run
        if not run.emulated and run.processes:
            key = LatencyKey(run.model_sha256, run.device, run.runtime)
            runs.setdefault(key, []).append(run)
    return {key: _newest(found) for key, found in runs.items()}


def latest_latencies(store: Store) -> dict[tuple[str, str, str], tuple[str, Latency]]:
    """(mode, summary) of the newest measurement of each (model sha256, device, runtime)."""
    return {
        (key.model, key.device, key.runtime): (
            group.mode,
            metrics.summarise_latency(group.measured, cores=group.machine.cores),
        )
        for key, group in newest_latencies(store).items()
    }


def _newest(runs: list[LatencyRun]) -> LatencyGroup:
    last = runs[-1]
    same = [p for run in runs if _protocol(run) == _protocol(last) for p in run.processes]
    boot = boot_of(same[-1])
    since = len(same)
    while since and boot_of(same[since - 1]) == boot:
        since -= 1
    made_up_for = len(same) - since >= LATENCY_PROCESSES
    return LatencyGroup(
        mode=last.mode,
        threads=last.threads,
        machine=last.machine,
        alternating=_alternating(last.processes),
        processes=tuple(same[since:]),
        before_boot=() if made_up_for else tuple(same[:since]),
    )


def boot_of(process: LatencyProcess) -> str | None:
    """The boot of the device that a process belongs to; None where the device has no such name."""
    for reading in process.telemetry:
        if BOOT_ID in reading:
            return None if reading[BOOT_ID] is None else str(reading[BOOT_ID])
    return None


def _protocol(run: LatencyRun) -> tuple[object, ...]:
    return run.mode, run.threads, repr(run.machine), _alternating(run.processes)


def _alternating(processes: Iterable[LatencyProcess]) -> bool:
    return any(reading.get(ALTERNATING) for p in processes for reading in p.telemetry)

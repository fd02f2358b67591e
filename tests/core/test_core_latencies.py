"""Latency runs put together: what a reboot, another protocol or another machine cuts off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from core_cases import digest, latency_process, latency_run, machine, model_record

from harness.latencies import LatencyKey, latest_latencies, newest_latencies
from harness.records import LatencyProcess
from harness.store import Store, open_store

KEY = LatencyKey(digest("m"), "local", "onnxruntime")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "results.db") as opened:
        opened.add_model(model_record())
        yield opened


def since(boot: str | None, ms: int = 1, *, alternating: bool = True) -> LatencyProcess:
    reading = {"boot_id": boot, "alternating": alternating}
    return latency_process((ms * 1_000_000,) * 64, telemetry=(reading,))


def test_a_run_that_a_reboot_cut_off_is_invalid_until_it_was_measured_again(store: Store) -> None:
    for boot in ("a", "a", "a", "b", "b"):
        store.add_latency_run(latency_run(since(boot)))
    group = newest_latencies(store)[KEY]
    assert (len(group.before_boot), len(group.processes)) == (3, 2)
    _, summary = latest_latencies(store)[digest("m"), "local", "onnxruntime"]
    assert summary.verdict == "INVALID"
    assert "the device was rebooted while it was measured" in summary.reasons
    for _ in range(3):
        store.add_latency_run(latency_run(since("b", ms=2)))
    group = newest_latencies(store)[KEY]
    assert (len(group.before_boot), len(group.processes)) == (0, 5)
    _, summary = latest_latencies(store)[digest("m"), "local", "onnxruntime"]
    assert "rebooted" not in " ".join(summary.reasons)
    assert summary.n == 5 * 64


def test_a_finished_run_stays_valid_beside_what_was_measured_before_another_boot(
    store: Store,
) -> None:
    for boot in ("a",) * 5 + ("b",) * 5 + ("b",):
        store.add_latency_run(latency_run(since(boot)))
    _, summary = latest_latencies(store)[digest("m"), "local", "onnxruntime"]
    assert (summary.verdict, summary.n) == ("VALID", 6 * 64)


def test_a_device_without_boots_is_one_measurement(store: Store) -> None:
    for _ in range(3):
        store.add_latency_run(latency_run(since(None)))
    assert len(newest_latencies(store)[KEY].processes) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": machine(runtime_version="9")},
        {"mode": "full"},
        {"threads": 4},
        "clean images only",
    ],
    ids=["runtime", "mode", "threads", "alternating"],
)
def test_another_protocol_or_machine_begins_anew(store: Store, changed: object) -> None:
    store.add_latency_run(latency_run(since("a"), since("a")))
    if isinstance(changed, dict):
        store.add_latency_run(latency_run(since("a"), **changed))
    else:
        store.add_latency_run(latency_run(since("a", alternating=False)))
    assert len(newest_latencies(store)[KEY].processes) == 1

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from devices import timing
from devices.local import LocalDevice
from devices.timing import FULL, QUICK, LatencySettings, interleaved, measure_latency
from harness.metrics import PERCENTILE_MIN_N, summarise_latency
from harness.records import MeasurementInvalid, UsageError

TINY = LatencySettings(
    mode="quick", processes=2, warmup_runs=3, warmup_seconds=0.01, min_seconds=0.02, min_runs=7
)


def test_full_is_what_the_protocol_asks_and_quick_supports_p90() -> None:
    assert FULL.processes >= 5
    assert FULL.processes * FULL.min_seconds >= 60
    assert FULL.processes * FULL.min_runs >= 1024
    assert FULL.warmup_runs >= 10
    assert FULL.warmup_seconds >= 2
    assert QUICK.processes >= 5
    assert QUICK.processes * QUICK.min_runs >= PERCENTILE_MIN_N[90]


@pytest.mark.parametrize(
    "change", [{"processes": 0}, {"min_runs": 0}, {"threads": 0}, {"warmup_seconds": -1.0}]
)
def test_settings_that_measure_nothing_are_refused(change: dict) -> None:
    with pytest.raises(UsageError):
        replace(QUICK, **change)


def test_every_round_has_every_model_once_in_a_new_order() -> None:
    names = ["a", "b", "c", "d"]
    order = interleaved(names, processes=20, seed=3)
    rounds = [order[i : i + 4] for i in range(0, 80, 4)]
    assert all(Counter(r) == Counter(names) for r in rounds)
    assert len(set(rounds)) > 5
    assert order == interleaved(reversed(names), processes=20, seed=3)
    assert order != interleaved(names, processes=20, seed=4)


def test_both_minimums_hold_and_nothing_is_lost(make_model, images) -> None:
    models = {"b": make_model("b").path, "a": make_model("a", seed=1).path}
    done: list[int] = []
    results = measure_latency(
        LocalDevice(), models, images, settings=TINY, seed=0, on_progress=done.append
    )
    assert list(results) == ["b", "a"]
    assert done == [1, 2, 3, 4]
    for machine, processes in results.values():
        assert machine == results["a"][0]
        assert len(processes) == TINY.processes
        for process in processes:
            assert len(process.samples_ns) >= TINY.min_runs
            assert sum(process.samples_ns) >= TINY.min_seconds * 1e9
            assert len(process.warmup_ns) >= TINY.warmup_runs
            assert sum(process.warmup_ns) >= TINY.warmup_seconds * 1e9
            assert min(process.load_ns, process.first_ns, *process.samples_ns) > 0
            assert len(process.telemetry) >= 2
            assert {"load_1m", "governor", "frequency_mhz", "temperature_c", "throttled"} <= set(
                process.telemetry[0]
            )
            assert process.rss_load_bytes is None or process.rss_load_bytes > 1e6
            assert process.rss_peak_bytes is None or process.rss_peak_bytes < 1e9
        summary = summarise_latency(processes, cores=machine.cores)
        assert summary.p50_ms is not None
        assert summary.p50_ms > 0


def test_the_count_rules_when_the_time_is_short(model, images) -> None:
    settings = replace(TINY, min_seconds=0.0, min_runs=11, warmup_seconds=0.0, processes=1)
    results = measure_latency(
        LocalDevice(), {"m": model.path}, images[:1], settings=settings, seed=0
    )
    (process,) = results["m"][1]
    assert (len(process.samples_ns), len(process.warmup_ns)) == (11, 3)


def test_telemetry_is_read_about_once_a_second_while_measuring(model, images) -> None:
    settings = replace(TINY, processes=1, min_seconds=1.5)
    results = measure_latency(LocalDevice(), {"m": model.path}, images, settings=settings, seed=0)
    elapsed = [reading["elapsed_ns"] for reading in results["m"][1][0].telemetry]
    assert len(elapsed) >= 3
    assert elapsed == sorted(elapsed)
    assert elapsed[1] >= 0.9e9


class WatchedDevice:
    """A local device that keeps the pids, what was loaded, and how many ran at a time."""

    name = "watched"
    emulated = False

    def __init__(self) -> None:
        self.open_now = self.most = 0
        self.pids: list[int] = []
        self.loaded: list[str] = []

    @contextmanager
    def open(self):
        with LocalDevice().open() as session:
            self.open_now += 1
            self.most = max(self.most, self.open_now)
            self.pids.append(session.pid)
            load = session.load

            def watched(path, **options):
                self.loaded.append(path.stem)
                return load(path, **options)

            session.load = watched
            yield session
            self.open_now -= 1


def test_fresh_processes_one_at_a_time_in_the_seeded_order(make_model, images) -> None:
    models = {name: make_model(name).path for name in ("x", "y", "z")}
    device = WatchedDevice()
    measure_latency(device, models, images, settings=TINY, seed=9)
    assert device.most == 1
    assert len(set(device.pids)) == 6
    assert tuple(device.loaded) == interleaved(models, processes=2, seed=9)


def test_only_a_few_images_travel() -> None:
    many = np.arange(500, dtype=np.uint8).reshape(500, 1, 1, 1)
    drawn = timing._drawn(many, seed=0)
    assert len(drawn) == timing.MAX_IMAGES
    assert (drawn == timing._drawn(many, seed=0)).all()
    assert len(timing._drawn(many[:5], seed=0)) == 5


def test_emulated_devices_report_no_latency(model, images) -> None:
    with pytest.raises(UsageError, match="emulated"):
        measure_latency(
            LocalDevice(name="rpi4", emulated=True),
            {"m": model.path},
            images,
            settings=TINY,
            seed=0,
        )


def test_bad_input_fails_before_anything_runs(model, images, tmp_path) -> None:
    device = WatchedDevice()
    with pytest.raises(UsageError, match="no model"):
        measure_latency(device, {}, images, settings=TINY, seed=0)
    with pytest.raises(UsageError, match="cannot read the model"):
        measure_latency(
            device, {"m": model.path, "n": tmp_path / "none"}, images, settings=TINY, seed=0
        )
    assert device.pids == []


def test_a_machine_that_changes_is_refused(model, images) -> None:
    class Changing(LocalDevice):
        opened = 0

        @contextmanager
        def open(self):
            with super().open() as session:
                type(self).opened += 1
                session.machine = replace(session.machine, cores=self.opened)
                yield session

    with pytest.raises(MeasurementInvalid, match="changed while"):
        measure_latency(Changing(), {"m": model.path}, images, settings=TINY, seed=0)


def test_a_perturbation_reaches_every_process(model, images, delta_255) -> None:
    measured = measure_latency(
        LocalDevice(), {"a": model.path}, images, settings=TINY, seed=0, delta_255=delta_255
    )
    _, processes = measured["a"]
    assert [len(process.samples_ns) >= TINY.min_runs for process in processes] == [True, True]
    too_tall = np.zeros((3, 9, 8), dtype=np.int16)
    with pytest.raises(UsageError, match="9"):
        measure_latency(
            LocalDevice(), {"a": model.path}, images, settings=TINY, seed=0, delta_255=too_tall
        )

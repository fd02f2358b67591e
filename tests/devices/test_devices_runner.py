"""The runner alone, spoken to as a board would be: one file, a pipe, nothing of the project."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices import runner
from devices.local import RUNNER


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Board:
    """A copy of runner.py, alone in a folder, under `python -I` and an empty environment."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-I", shutil.copy(RUNNER, folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"id": 1, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def load(self, path: Path, **changes: Any) -> dict[str, Any]:
        request = {"path": str(path), "sha256": sha256(path), "threads": 1, "max_bytes": 1 << 20}
        return self.ask(op="load", **{**request, **changes})

    def images(self, array: np.ndarray, folder: Path) -> dict[str, Any]:
        np.save(folder / "images.npy", array)
        path = folder / "images.npy"
        return self.ask(op="images", path=str(path), sha256=sha256(path))

    def end(self) -> tuple[int, str | None, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path / "board")
    yield board
    board.process.kill()
    board.end()


def test_it_is_python_3_9_and_imports_only_what_a_board_has() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_hello_describes_the_machine(board: Board) -> None:
    facts = board.ask(op="hello")
    assert facts["ok"] is True
    assert facts["pid"] == board.process.pid
    assert facts["pointer_bits"] in (32, 64)
    assert facts["cores"] >= 1
    assert all(facts[key] for key in ("arch", "cpu", "os", "python", "onnxruntime", "numpy"))


@pytest.mark.parametrize("goodbye", ["end of input", "quit"])
def test_it_ends_cleanly(board: Board, goodbye: str) -> None:
    assert board.ask(op="hello")["ok"]
    if goodbye == "quit":
        assert board.ask(op="quit") == {"id": 1, "ok": True, "op": "quit"}
    assert board.end() == (0, "", "")


def test_nonsense_is_answered_and_survived(board: Board) -> None:
    board.process.stdin.write("nonsense\n[]\n\n")
    assert board.ask(op="dance")["id"] is None
    for _ in range(2):
        assert json.loads(board.process.stdout.readline())["ok"] is False
    reply = json.loads(board.process.stdout.readline())
    assert reply["error"] == "unknown operation 'dance'"
    assert board.ask(op="load")["error"] == "KeyError: 'path'"
    assert board.ask(op="hello")["ok"] is True


def test_a_file_that_is_not_the_one_meant_is_refused(board: Board, model, tmp_path: Path) -> None:
    reply = board.load(model.path, sha256="0" * 64)
    assert (reply["ok"], reply["kind"]) == (False, "checksum")
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.uint8))
    reply = board.ask(op="images", path=str(tmp_path / "x.npy"), sha256="0" * 64)
    assert (reply["ok"], reply["kind"]) == (False, "checksum")


def test_pickles_are_never_opened(board: Board, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    path = tmp_path / "x.npy"
    reply = board.ask(op="images", path=str(path), sha256=sha256(path))
    assert reply["ok"] is False
    assert "allow_pickle=False" in reply["error"]


def test_bad_models_get_one_line(board: Board, make_model, tmp_path: Path) -> None:
    tiny = make_model("tiny").path
    assert "the limit is 10" in board.load(tiny, max_bytes=10)["error"]
    assert "threads" in board.load(tiny, threads=0)["error"]
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(b"nonsense" * 10)
    reply = board.load(corrupt)
    assert (reply["ok"], reply["kind"]) == (False, "usage")
    assert "\n" not in reply["error"]
    assert "uint8" in board.load(make_model("f", input_type=1).path)["error"]
    missing = {"op": "load", "path": "none.onnx", "sha256": "", "threads": 1, "max_bytes": 10}
    assert "FileNotFound" in board.ask(**missing)["error"]
    assert board.load(tiny)["classes"] == 5


def test_order_of_operations_is_checked(board: Board, model, images, tmp_path: Path) -> None:
    timing = {"warmup_runs": 0, "warmup_seconds": 0, "min_runs": 1, "min_seconds": 0}
    assert "first" in board.ask(op="predict", start=0, stop=1, batch_size=1)["error"]
    board.load(model.path)
    board.images(images, tmp_path)
    assert board.ask(op="predict", start=0, stop=1, batch_size=1)["ok"]
    assert "not run since" in board.ask(op="latency", **timing)["error"]
    board.load(model.path)
    assert board.ask(op="latency", **timing)["ok"]


def test_a_range_outside_the_images_is_refused(board: Board, model, images, tmp_path: Path) -> None:
    board.load(model.path)
    board.images(images, tmp_path)
    for start, stop, batch_size in [(0, 38, 1), (-1, 2, 1), (3, 3, 1), (0, 1, 0)]:
        reply = board.ask(op="predict", start=start, stop=stop, batch_size=batch_size)
        assert "no range" in reply["error"]


def test_prints_do_not_break_the_protocol(tmp_path: Path) -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(RUNNER.parent)!r}); import runner\n"
        "def noisy(*_): print('python'); os.write(1, b'native'); return {}\n"
        "runner.OPERATIONS['noisy'] = noisy\n"
        "sys.exit(runner.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input='{"id": 7, "op": "noisy"}\n',
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout) == {"id": 7, "ok": True, "op": "noisy"}
    assert "native" in done.stderr
    assert "python" in done.stderr


def test_a_reader_that_left_ends_it(board: Board) -> None:
    board.process.stdout.close()
    board.process.stdin.write('{"id": 1, "op": "hello"}\n' * 3)
    board.process.stdin.close()
    board.process.stdin = board.process.stdout = None
    assert board.end() == (0, None, "")


# --- memory and telemetry ----------------------------------------------------------------------


def test_peak_memory_is_not_that_of_a_large_parent(model, images, tmp_path: Path) -> None:
    """Linux hands ru_maxrss down through fork and exec; the runner must not believe it."""
    np.save(tmp_path / "images.npy", images)
    requests = [
        {"op": "load", "path": str(model.path), "sha256": sha256(model.path), "threads": 1}
        | {"max_bytes": 1 << 20},
        {"op": "images", "path": str(tmp_path / "images.npy")}
        | {"sha256": sha256(tmp_path / "images.npy")},
        {"op": "latency", "warmup_runs": 1, "warmup_seconds": 0, "min_runs": 3, "min_seconds": 0},
    ]
    lines = "".join(json.dumps({"id": i, **request}) + "\n" for i, request in enumerate(requests))
    parent = (
        "import subprocess, sys\n"
        "ballast = b'x' * 500_000_000\n"
        f"subprocess.run([sys.executable, '-I', {str(RUNNER)!r}], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], input=lines, capture_output=True, text=True, check=True
    )
    reply = json.loads(done.stdout.splitlines()[-1])
    assert reply["ok"] is True
    assert 10e6 < reply["rss_load_bytes"] <= reply["rss_peak_bytes"] < 400e6


def test_without_vmhwm_only_growth_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "status_bytes", lambda _key: None)
    monkeypatch.setattr(runner, "maxrss_bytes", lambda: 700)
    assert runner.rss_peak_bytes(700) is None
    assert runner.rss_peak_bytes(600) == 700


def test_telemetry_of_a_raspberry_pi(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "600000\n",
        "sys/class/thermal/thermal_zone0/temp": "48686\n",
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd08\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    reading = runner.read_telemetry(tmp_path)
    assert reading["governor"] == "ondemand"
    assert reading["frequency_mhz"] == 1500
    assert reading["temperature_c"] == 48.686


def test_telemetry_unknown_is_none_and_x86_has_megahertz(tmp_path: Path) -> None:
    reading = runner.read_telemetry(tmp_path)
    assert (reading["governor"], reading["frequency_mhz"], reading["temperature_c"]) == (None,) * 3
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t: 2100.5\ncpu MHz\t: 800\n")
    assert runner.read_telemetry(tmp_path)["frequency_mhz"] == 2100.5


@pytest.mark.parametrize(
    ("before", "bits", "verdict"),
    [
        (None, None, None),
        (0, 0, False),
        (0x50000, 0x50000, False),  # sticky since long before us
        (0x10000, 0x50000, True),  # throttled while we measured
        (0x50000, 0x50004, True),  # throttled at this moment
    ],
)
def test_throttling_counts_only_if_it_is_ours(
    before: int | None, bits: int | None, verdict: bool | None
) -> None:
    assert runner.is_throttled(before, bits) is verdict


@pytest.mark.parametrize(
    ("script", "bits"),
    [
        ("echo throttled=0x50005", 0x50005),
        ("echo nonsense", None),
        ("exit 255", None),
    ],
)
def test_vcgencmd_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, bits: int | None
) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runner.throttled_bits() == bits

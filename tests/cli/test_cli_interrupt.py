"""Kill it at any moment: the same command continues, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_cases import Outcome, Tiny, artefacts, contents, environment, raw_predictions, succeeded

from harness.training import loop

# Unfinished work is saved every few seconds; here every epoch, so that epochs of milliseconds are
# continued from the middle too.
SAVING_EVERY_EPOCH = """
from harness import unfinished
unfinished.SAVE_INTERVAL_SECONDS = -1.0
from harness.cli.main import main
main()
"""
COMMAND = (
    *("attack-device", "--model", "full", "--model", "q4"),
    *("--uap", "cache/full_eps10.pt", "--uap", "cache/q4_eps10.pt"),
    *("--uap", "cache/random_eps10.pt"),
)  # trains, exports, crafts and attacks
FILES = {
    *("full.pt", "full.onnx", "full.json", "q4.pt", "q4.onnx", "q4.json"),
    *("full_eps10.pt", "q4_eps10.pt", "random_eps10.pt"),
}
PATIENCE_S = 120.0


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SAVING_EVERY_EPOCH, *arguments],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def end(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Outcome(process.returncode, out, err)


def runners_of(pid: int) -> list[int]:
    """The runners whose parent is `pid`; not what libraries start, such as `uname`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_bytes()
        except OSError:  # ended in between
            continue
        if int(fields[1]) == pid and b"runner.py" in command:
            found.append(int(stat.parent.name))
    return found


def test_killed_at_many_moments(empty: Path, tiny: Tiny) -> None:
    rng = random.Random(20)
    cache = empty / "cache"
    moments: list[tuple[Callable[[], bool], float]] = [
        # What must be there, and at most how many seconds later.
        ((empty / ".lock").exists, 0.3),
        ((cache / ".partial" / "train_full.pt").exists, 0.1),
        ((cache / "full.pt").exists, 0.3),
        ((cache / "q4.pt").exists, 0.3),
        ((cache / ".partial" / "craft_full_eps10.pt").exists, 0.05),
        ((empty / "results.db").exists, 0.6),
    ]
    killed = 0
    continued = False
    for condition, at_most in moments:
        process = start(empty, *COMMAND)
        wait_for(condition, process)
        time.sleep(rng.uniform(0.0, at_most))
        runners = runners_of(process.pid)
        process.kill()
        killed += end(process).code == -signal.SIGKILL
        continued |= bool(list((cache / ".partial").glob("*.pt")))
        deadline = time.monotonic() + PATIENCE_S
        while any(Path(f"/proc/{pid}").exists() for pid in runners):
            assert time.monotonic() < deadline, "a runner outlived the command"
            time.sleep(0.02)
    assert killed >= 4
    assert continued, "no kill left unfinished work to continue from"
    # What a kill between a temporary file and its rename leaves.
    for folder in (cache, cache / ".partial"):
        folder.mkdir(exist_ok=True)
        (folder / ".full.pt.k1ll3d.tmp").write_bytes(b"half a che")

    outcome = succeeded(end(start(empty, *COMMAND)))

    assert "full" in outcome.out.lower()
    assert artefacts(empty).keys() == FILES
    uninterrupted = contents(artefacts(tiny.root))
    assert contents(artefacts(empty)) == {name: uninterrupted[name] for name in FILES}
    assert not list((cache / ".partial").glob("*"))  # nothing unfinished, no temporary file
    expected, found = raw_predictions(tiny.root), raw_predictions(empty)
    assert len(found) == 2 * 4 * 2  # victims, clean and three UAPs, runtimes
    for key, predictions in found.items():
        assert predictions.tolist() == expected[key].tolist()


def test_killed_while_continuing(
    empty: Path, tiny: Tiny, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unfinished training really is continued: from the saved step on, not from the start."""
    partial = empty / "cache" / ".partial" / "train_full.pt"
    process = start(empty, "train", "--model", "full")
    wait_for(partial.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    end(process)
    saved = torch.load(partial, weights_only=True)["state"]
    taken = []

    def counted(*arguments: object) -> None:
        taken.append(1)
        train_step(*arguments)

    train_step = loop._train_step
    monkeypatch.setattr(loop, "_train_step", counted)
    succeeded(run("train", "--model", "full", cwd=empty))
    continued = len(taken)
    assert not partial.exists()
    assert contents(artefacts(empty))["full.pt"] == contents(artefacts(tiny.root))["full.pt"]

    (empty / "cache" / "full.pt").unlink()
    taken.clear()
    succeeded(run("train", "--model", "full", cwd=empty))
    steps_each = len(taken) // 2  # of two epochs
    assert continued == len(taken) - (saved["epoch"] * steps_each + saved["step"])
    assert 0 < continued < len(taken)


@pytest.mark.parametrize("garbage", [b"", b"not a partial", b"PK\x03\x04 cut"])
def test_damaged_unfinished_work_is_worth_nothing(
    garbage: bytes, run: Callable[..., Outcome], workspace: Path
) -> None:
    before = contents(artefacts(workspace))
    (workspace / "cache" / "pp2.pt").unlink()
    partial = workspace / "cache" / ".partial" / "train_pp2.pt"
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(garbage)
    succeeded(run("train", "--model", "pp2", cwd=workspace))
    assert contents(artefacts(workspace)) == before
    assert not partial.exists()


@pytest.mark.parametrize("stage", ["train", "attack"])
def test_control_c_is_one_line_and_130(stage: str, empty: Path, workspace: Path) -> None:
    root = empty if stage == "train" else workspace
    if stage == "train":
        process = start(root, *COMMAND)
        wait_for((root / "cache" / ".partial" / "train_full.pt").exists, process)
    else:
        for leftover in root.glob("results.db*"):
            leftover.unlink()
        process = start(root, *COMMAND)
        wait_for(lambda: bool(runners_of(process.pid)), process)  # a runner has started
    assert process.poll() is None, end(process)
    process.send_signal(signal.SIGINT)
    outcome = end(process)
    assert outcome.code == 130, outcome.err
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert outcome.err.count("interrupted") == 1
    assert "Traceback" not in outcome.err
    assert not list((root / "cache").glob(".*.tmp"))
    assert not runners_of(process.pid)

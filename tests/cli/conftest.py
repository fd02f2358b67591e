from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_cases import CONFIG, DATASET, Outcome, Tiny, environment, write_npz
from factory_cases import MODULES, OWN_CONFIG, Lab, make_lab

from harness.cli.main import main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """All ten variants, made by one real `harness run`. Read-only: take `workspace` to change."""
    base = tmp_path_factory.getbasetemp()
    # Tests that run side by side have a folder each, in one of their own: made by the first.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    folder.mkdir(exist_ok=True)
    root, said = folder / "workspace", folder / "said.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            root.mkdir()
            npz = write_npz(folder / f"{DATASET}.npz")
            (root / "harness.toml").write_text(CONFIG.format(npz=npz))
            run = subprocess.run(
                [sys.executable, "-m", "harness", "run"],
                cwd=root,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=500,
                check=False,
            )
            assert run.returncode == 0, run.stderr
            said.write_text(json.dumps([run.args, run.returncode, run.stdout, run.stderr]))
    run = subprocess.CompletedProcess(*json.loads(said.read_text()))
    return Tiny(root, folder / f"{DATASET}.npz", run)


def _copy(tiny: Tiny, to: Path) -> Path:
    shutil.copytree(tiny.root, to, ignore=shutil.ignore_patterns("report", ".lock"))
    return to


@pytest.fixture
def workspace(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the finished workspace, without its report, to do anything with."""
    return _copy(tiny, tmp_path / "workspace")


@pytest.fixture(scope="module")
def module_workspace(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that the tests of a module share; they add rows to it."""
    return _copy(tiny, tmp_path_factory.mktemp("shared") / "workspace")


@pytest.fixture
def empty(tiny: Tiny, tmp_path: Path) -> Path:
    """A workspace with the tiny configuration, and nothing built."""
    root = tmp_path / "empty"
    root.mkdir()
    shutil.copy(tiny.root / "harness.toml", root)
    return root


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Run the command line in this process: seconds quicker than a child that imports torch."""
    threads = torch.get_num_threads()  # commands set their own number
    monkeypatch.delenv("HARNESS_DEBUG", raising=False)

    def run_here(*arguments: object, cwd: Path) -> Outcome:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capfd.readouterr())

    yield run_here
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A user's folder; what commands import from it is forgotten afterwards."""
    path = list(sys.path)
    yield make_lab(tmp_path_factory.mktemp("user"))
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def root(lab: Lab, tmp_path: Path) -> Path:
    """A workspace for their own models, with nothing in it."""
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "harness.toml").write_text(
        OWN_CONFIG.format(npz=lab.root / "gray.npz", latency="off")
    )
    return folder


@pytest.fixture
def pruned(lab: Lab, tmp_path: Path) -> Path:
    """A checkpoint of theirs with half of the weights gone."""
    state = torch.load(lab.root / "gray.pt")
    for values in state.values():
        if values.ndim > 1:
            values[values.abs() < values.abs().median()] = 0
    torch.save(state, tmp_path / "pruned.pt")
    return tmp_path / "pruned.pt"

"""A workspace: names of files, and one writer at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.presets import preset_named
from harness.records import CONTROLS, PAPER_ORDER, HarnessError, UsageError
from harness.workspace import (
    DEFAULT_ATTACK,
    UapName,
    Workspace,
    create_workspace,
    open_workspace,
    parse_uap_name,
)

ROOT = Path(__file__).resolve().parents[2]


@settings(deadline=None)
@given(
    source=st.sampled_from(PAPER_ORDER),
    eps=st.floats(1e-7, 255),
    target=st.none() | st.integers(0, 10**6),
    attack=st.sampled_from([DEFAULT_ATTACK, "sga", "s", "t"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_name_is_read_back_from_its_file(
    source: str, eps: float, target: int | None, attack: str, seed: int
) -> None:
    name = UapName(source, eps, target=target, attack=attack, seed=seed)
    assert parse_uap_name(Path("any/where/cache") / f"{name.stem}.pt") == name


@given(st.sampled_from(CONTROLS), st.integers(1, 255), st.integers(0, 99))
def test_the_name_of_a_control_is_read_back(source: str, eps: int, seed: int) -> None:
    name = UapName(source, float(eps), seed=seed)
    assert parse_uap_name(Path("cache") / f"{name.stem}.pt") == name


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        (UapName("full", 10.0), "full_eps10"),
        (UapName("full", 10.0, target=4), "full_eps10_t4"),
        (UapName("full", 10.0, target=0), "full_eps10_t0"),
        (UapName("sfp_mixup", 2.5), "sfp_mixup_eps2.5"),
        (UapName("q2", 100.0, attack="sga", seed=3), "q2_eps100_sga_s3"),
        (UapName("q2", 10.0, target=1, attack="sga", seed=3), "q2_eps10_t1_sga_s3"),
        (UapName("random", 10.0, attack="sga", seed=1), "random_eps10_s1"),
        (UapName("chessboard", 0.00001), "chessboard_eps0.00001"),
    ],
)
def test_what_is_the_default_is_left_out(name: UapName, stem: str) -> None:
    assert name.stem == stem


def test_budgets_that_nearly_agree_have_files_of_their_own() -> None:
    assert UapName("full", 10.1234567).stem != UapName("full", 10.1234568).stem


@pytest.mark.parametrize(
    "path",
    [
        "full_eps10.pt",
        "cached/full_eps10.pt",
        "cache/full_eps10.onnx",
        "cache/full_eps.pt",
        "cache/full_eps-3.pt",
        "cache/full_eps1e1.pt",
        "cache/full_eps10_T4.pt",
        "cache/full_eps10_s3_t4.pt",
        "cache/full.pt",
        "cache/_eps10.pt",
        "cache/9_eps10.pt",
        "cache/fu.ll_eps10.pt",
    ],
)
def test_other_paths_are_no_names(path: str) -> None:
    assert parse_uap_name(Path(path)) is None


def test_paths(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, preset_named("quickstart"))
    assert workspace.checkpoint("q2") == tmp_path / "cache" / "q2.pt"
    assert workspace.onnx("q2") == tmp_path / "cache" / "q2.onnx"
    assert workspace.uap(UapName("q2", 4.0)) == tmp_path / "cache" / "q2_eps4.pt"
    assert workspace.partial("q2") == tmp_path / "cache" / ".partial" / "q2.pt"
    assert workspace.results == tmp_path / "results.db"
    assert workspace.report == tmp_path / "report"


def test_a_workspace_is_created_once_and_opened(tmp_path: Path) -> None:
    config = preset_named("paper", dataset="svhn")
    root = tmp_path / "new"
    assert create_workspace(root, config) == open_workspace(root) == Workspace(root, config)
    with pytest.raises(UsageError, match="exists: edit it"):
        create_workspace(root, preset_named("quickstart"))
    assert open_workspace(root).config == config


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no harness.toml in .*harness init"):
        open_workspace(tmp_path)


def test_a_workspace_has_one_writer(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, preset_named("quickstart"))
    with (
        workspace.locked(),
        pytest.raises(HarnessError, match="another harness is working in"),
        workspace.locked(),
    ):
        pass
    with workspace.locked():
        pass


def test_a_lock_is_released_when_its_holder_fails(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, preset_named("quickstart"))
    with pytest.raises(ZeroDivisionError), workspace.locked():
        raise ZeroDivisionError
    with workspace.locked():
        pass


def test_the_lock_keeps_out_another_process_until_it_is_killed(tmp_path: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from harness.presets import preset_named;"
        "from harness.workspace import Workspace;"
        "workspace = Workspace(Path(sys.argv[1]), preset_named('quickstart'));"
        "lock = workspace.locked(); lock.__enter__(); print('held', flush=True); sys.stdin.read()"
    )
    workspace = Workspace(tmp_path, preset_named("quickstart"))
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(HarnessError, match="another harness"), workspace.locked():
            pass
        process.kill()  # SIGKILL: nothing in it can tidy up
        process.wait()
        with workspace.locked():
            pass


def test_a_folder_that_does_not_exist_cannot_be_locked(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "gone", preset_named("quickstart"))
    with pytest.raises(HarnessError, match="cannot write in"), workspace.locked():
        pass

"""scripts/gpu_session.sh, on a processor: parts go in, small files come out, the next goes on."""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cli_cases import REPO, Tiny, environment

SCRIPT = REPO / "scripts" / "gpu_session.sh"


def session(machine: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=machine,
        env=environment(GPU_SESSION=str(machine), PYTHON=sys.executable, **env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def parts(tiny: Tiny, tmp_path: Path) -> list[Path]:
    """The data and the configuration, as they are carried."""
    config = tmp_path / "harness.toml"
    text = (tiny.root / "harness.toml").read_text()
    config.write_text(text.replace(str(tiny.npz), f"./{tiny.npz.name}"))
    return [*halves(tiny.npz, tmp_path / tiny.npz.name), config]


def halves(file: Path, name: Path) -> list[Path]:
    content = file.read_bytes()
    cut = len(content) // 2
    made = [name.with_name(f"{name.name}.{end}") for end in ("aa", "ab")]
    made[0].write_bytes(content[:cut])
    made[1].write_bytes(content[cut:])
    return made


def keep(machine: Path, files: list[Path]) -> None:
    machine.mkdir()
    for file in files:  # a call a part
        done = session(machine, "keep", file)
        assert done.returncode == 0, done.stderr


def test_slices_on_one_machine_and_on_the_next(
    tiny: Tiny, parts: list[Path], tmp_path: Path
) -> None:
    first, out, data = tmp_path / "first", tmp_path / "out", {"DATASET": tiny.npz.name}
    keep(first, parts)
    cut = session(first, "run", out, "1s", "full", "q4", **data)
    assert cut.returncode == 124, cut.stderr
    done = session(first, "run", out, "10m", "full", "q4", **data)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in out.iterdir()}
    assert {"run.log", "published.tar.xz", "state.tar.aa"} <= names
    assert len(names) <= 8
    with lzma.open(out / "published.tar.xz") as unpacked, tarfile.open(fileobj=unpacked) as kept:
        inside = set(kept.getnames())
    assert {
        "published/README.md",
        "published/report/index.html",
        "published/results.db.xz",
    } <= inside
    # What was trained there is what a workspace here trains, byte for byte.
    trained = (first / "workspace" / "cache" / "q4.pt").read_bytes()
    assert trained == (tiny.root / "cache" / "q4.pt").read_bytes()

    second, later = tmp_path / "second", tmp_path / "later"
    cut_off = tmp_path / "state.tar.aa"
    cut_off.write_bytes((out / "state.tar.aa").read_bytes()[:20_000])
    packed = tmp_path / f"{tiny.npz.stem}.packed"
    pack = [sys.executable, REPO / "scripts" / "pack_images.py", tiny.npz, packed]
    subprocess.run(pack, check=True)
    keep(second, [*halves(packed, packed), parts[-1], cut_off])
    half = session(second, "run", later, "10m", "full", "q4", **data)
    assert half.returncode == 1
    assert half.stderr.splitlines()[-1].startswith(
        "error: the parts of state.tar are not one whole"
    )
    assert not (second / "workspace" / "cache").exists()
    for part in sorted(out.glob("state.tar.*")):
        assert session(second, "keep", part).returncode == 0
    again = session(second, "run", later, "10m", "full", "q4", **data)
    assert again.returncode == 0, again.stderr
    # Nothing was trained, crafted, exported or evaluated again.
    log = (later / "run.log").read_text().splitlines()
    assert [line for line in log if "not built again" not in line] == ["report/index.html"]
    assert (second / "workspace" / "cache" / "q4.pt").read_bytes() == trained
    kept_runs, again_runs = (runs(machine / "workspace") for machine in (first, second))
    assert kept_runs == again_runs > 0


def runs(workspace: Path) -> int:
    with contextlib.closing(sqlite3.connect(workspace / "results.db")) as store:
        (count,) = store.execute("SELECT count(*) FROM prediction_run").fetchone()
    return int(count)


def test_a_slice_that_ends_before_there_is_a_report_keeps_what_it_built(
    tiny: Tiny, parts: list[Path], tmp_path: Path
) -> None:
    machine, out, data = tmp_path / "machine", tmp_path / "out", {"DATASET": tiny.npz.name}
    keep(machine, parts)
    done = session(machine, "run", out, "10m", "full", **data)
    assert done.returncode == 0, done.stderr
    # As where the time was over while PyTorch predicted: no exported model was run yet.
    with contextlib.closing(sqlite3.connect(machine / "workspace" / "results.db")) as store:
        store.execute("DELETE FROM prediction_run WHERE runtime = 'onnxruntime'")
        store.commit()
    (machine / "workspace" / "harness.toml").unlink()
    config = machine / "kept" / "harness.toml"
    config.write_text(config.read_text() + "unknown_key = 1\n")  # and it fails
    for path in out.iterdir():
        path.unlink()
    failed = session(machine, "run", out, "10m", "full", **data)
    assert failed.returncode == 2
    assert "nothing to report yet" in failed.stderr
    assert {path.name for path in out.iterdir()} == {"run.log", "state.tar.aa"}
    with tarfile.open(out / "state.tar.aa") as state:
        assert {"results.db.xz", "cache/full.pt", "cache/full_eps10.pt"} <= set(state.getnames())


def test_what_has_no_room_is_named_and_the_rest_is_kept(
    tiny: Tiny, parts: list[Path], tmp_path: Path
) -> None:
    machine, out = tmp_path / "machine", tmp_path / "out"
    keep(machine, parts)
    # The exported model of this width alone takes more than what is left beside results and UAPs.
    part, count = 100_000, 3
    small = {"PART_BYTES": str(part), "PARTS": str(count)}
    done = session(machine, "run", out, "10m", "full", DATASET=tiny.npz.name, **small)
    assert done.returncode == 0, done.stderr
    kept = sorted(out.glob("state.tar.*"))
    assert 1 <= len(kept) <= count
    assert all(path.stat().st_size <= part for path in kept)
    joined = tmp_path / "state.tar"
    joined.write_bytes(b"".join(path.read_bytes() for path in kept))
    with tarfile.open(joined) as state:
        inside = set(state.getnames())
    left_out = set(re.findall(r"no room for (\S+): ", done.stderr))
    assert left_out
    assert "results.db.xz" in inside
    assert not inside & left_out
    built = {f"cache/{path.name}" for path in (machine / "workspace" / "cache").glob("[!.]*.*")}
    assert built <= inside | left_out


def test_without_data_it_says_what_to_keep(tmp_path: Path) -> None:
    done = session(tmp_path, "run", tmp_path / "out", "1s", "full", DATASET="mine.npz")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no part of mine.npz was kept: ")


def test_parts_are_kept_from_whatever_folder_they_are_named_in(
    parts: list[Path], tmp_path: Path
) -> None:
    machine = tmp_path / "machine"
    machine.mkdir()
    done = subprocess.run(
        ["bash", str(SCRIPT), "keep", parts[0].name],
        cwd=parts[0].parent,
        env=environment(GPU_SESSION=str(machine)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (machine / "kept" / parts[0].name).read_bytes() == parts[0].read_bytes()


def test_a_wrong_call_shows_how_it_is_called(tmp_path: Path) -> None:
    done = session(tmp_path, "help")
    assert done.returncode == 2
    assert "scripts/gpu_session.sh keep" in done.stderr
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - what is there, whatever it is

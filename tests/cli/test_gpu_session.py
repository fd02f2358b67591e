"""scripts/gpu_session.sh, on a processor: parts go in, small files come out, the next goes on."""

from __future__ import annotations

import lzma
import os
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
    content = tiny.npz.read_bytes()
    cut = len(content) // 2
    first, second = (tmp_path / f"{tiny.npz.name}.{end}" for end in ("aa", "ab"))
    first.write_bytes(content[:cut])
    second.write_bytes(content[cut:])
    config = tmp_path / "harness.toml"
    text = (tiny.root / "harness.toml").read_text()
    config.write_text(text.replace(str(tiny.npz), f"./{tiny.npz.name}"))
    return [first, second, config]


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
    keep(second, [*parts, *sorted(out.glob("state.tar.*"))])
    again = session(second, "run", later, "10m", "full", "q4", **data)
    assert again.returncode == 0, again.stderr
    assert "train " not in (later / "run.log").read_text()
    assert (second / "workspace" / "cache" / "q4.pt").read_bytes() == trained


def test_what_has_no_room_is_named_and_the_rest_is_kept(
    tiny: Tiny, parts: list[Path], tmp_path: Path
) -> None:
    machine, out = tmp_path / "machine", tmp_path / "out"
    keep(machine, parts)
    small = {"PART_BYTES": "200000", "PARTS": "2"}
    done = session(machine, "run", out, "10m", "full", DATASET=tiny.npz.name, **small)
    assert done.returncode == 0, done.stderr
    kept = sorted(out.glob("state.tar.*"))
    assert 1 <= len(kept) <= 2
    assert all(path.stat().st_size <= 200_000 for path in kept)
    whole = sum(path.stat().st_size for path in (machine / "workspace" / "cache").glob("*.*"))
    assert ("no room for cache/" in done.stderr) == (whole > 300_000)


def test_a_wrong_call_shows_how_it_is_called(tmp_path: Path) -> None:
    done = session(tmp_path, "help")
    assert done.returncode == 2
    assert "scripts/gpu_session.sh keep" in done.stderr
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - what is there, whatever it is

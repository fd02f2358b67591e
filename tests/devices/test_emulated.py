"""The emulated board: what it is, and how each way of not having it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from devices.emulated import (
    EmulatedDevice,
    emulated_python,
    emulator_folder,
    is_set_up,
    set_up_emulator,
)
from devices.emulator_archive import KEYRINGS, SetupFailed, machine_archive, run_program
from devices.emulator_board import BOARDS, write_board
from devices.emulator_parts import unpack_wheel
from devices.emulator_setup import MANIFEST, find_emulator
from devices.perturbation import perturb
from devices.profiles import Profile, built_in
from devices.timing import QUICK, measure_latency
from harness.records import DeviceUnreachable, UsageError

REPO = Path(__file__).resolve().parents[2]
NO_BOARD = r"harness devices add rpi4 --host USER@BOARD"


@pytest.fixture
def rpi4() -> Profile:
    return built_in()["rpi4"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, of a name with a space."""
    folder = tmp_path / "a cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def copied(emulated_rpi4: EmulatedDevice, rpi4: Profile, request: pytest.FixtureRequest) -> Path:
    """A set-up emulator of this test's own, to damage."""
    folder = emulator_folder(rpi4)
    cache: Path = request.getfixturevalue("cache")  # from here on
    mine = emulator_folder(rpi4)
    assert cache in mine.parents
    shutil.copytree(folder, mine, symlinks=True, copy_function=shutil.copyfile)
    shutil.copymode(folder / "qemu-aarch64", mine / "qemu-aarch64")
    return mine


def left_in(cache: Path) -> list[str]:
    """What a set-up that failed left, but its lock and the downloads it goes on from."""
    names = [path.name for path in cache.glob("*/emulated/*")]
    return [name for name in names if not name.endswith((".lock", ".downloads"))]


# --- what it is ----------------------------------------------------------------------------------


@pytest.mark.arm
def test_it_is_an_arm_board_that_predicts(
    emulated_rpi4: EmulatedDevice, model, images: np.ndarray, delta_255: np.ndarray
) -> None:
    with emulated_rpi4.open() as session:
        machine = session.machine
        assert (machine.arch, machine.cpu, machine.cores) == ("aarch64", "Cortex-A72", 4)
        assert machine.runtime_version == onnxruntime.__version__
        assert machine.extra["pointer_bits"] == 64
        assert "emulated" in machine.extra["board"]
        session.load(model.path, threads=4)
        session.set_images(images)
        np.testing.assert_array_equal(session.predict(None), model.classes(images))
        attacked = session.predict(delta_255)
    np.testing.assert_array_equal(attacked, model.classes(perturb(images, delta_255)))


@pytest.mark.arm
@pytest.mark.usefixtures("emulated_rpi4")
def test_what_it_evaluated_is_not_evaluated_twice(
    rpi4: Profile, model, images: np.ndarray, tmp_path: Path
) -> None:
    """Also not by the next session, after the one before was killed."""
    journals = []
    for _ in range(2):
        device = EmulatedDevice(rpi4, on_progress=lambda _: None, home=tmp_path / "home")
        with device.open() as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            np.testing.assert_array_equal(session.predict(None), model.classes(images))
        (journal,) = (tmp_path / "home").rglob("*.jsonl")
        journals.append(journal.read_text())
    assert journals[0] == journals[1]


@pytest.mark.arm
def test_it_says_once_what_its_numbers_mean(emulated_rpi4: EmulatedDevice, rpi4: Profile) -> None:
    said: list[str] = []
    device = EmulatedDevice(rpi4, on_progress=said.append)
    for _ in range(2):
        with device.open():
            pass
    assert len(said) == 1
    assert "predictions are real ARM, latency is null" in said[0]


def test_it_has_five_minutes_unless_its_profile_says(rpi4: Profile) -> None:
    assert EmulatedDevice(rpi4).default_budget_s == 300.0
    assert EmulatedDevice(replace(rpi4, budget_s=60.0)).default_budget_s == 60.0


def test_it_has_no_latency(rpi4: Profile, model, images: np.ndarray) -> None:
    device = EmulatedDevice(rpi4)
    with pytest.raises(UsageError, match="rpi4 is emulated"):
        measure_latency(device, {"tiny": model.path}, images, settings=QUICK, seed=0)


@pytest.mark.arm
def test_nothing_of_this_machine_s_python_gets_in(
    emulated_rpi4: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib/x86_64-linux-gnu")
    command = emulated_python(emulated_rpi4.profile)
    program = "import numpy, os; print(numpy.__file__, os.environ.get('LD_LIBRARY_PATH'))"
    said = run_program([*command, "-I", "-c", program], what="ask", timeout_s=120).split()
    assert Path(said[0]).is_relative_to(emulator_folder(emulated_rpi4.profile))
    assert said[1] == "None"


@pytest.mark.arm
def test_what_it_is_made_of_is_written_down(emulated_rpi4: EmulatedDevice) -> None:
    manifest = (emulator_folder(emulated_rpi4.profile) / MANIFEST).read_text()
    for part in ("qemu-user", "libc6", "python3.", "onnxruntime-", "numpy-", "aarch64.whl"):
        assert part in manifest


# --- what is broken ------------------------------------------------------------------------------


@pytest.mark.arm
def test_a_damaged_one_says_how_to_mend_it(copied: Path, rpi4: Profile) -> None:
    shutil.rmtree(next((copied / "root").glob("usr/lib/python3.*/json")))
    with (
        pytest.raises(DeviceUnreachable, match="harness devices bootstrap rpi4") as error,
        EmulatedDevice(rpi4, on_progress=lambda _: None).open(),
    ):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.arm
def test_x86_is_refused_where_arm_is_meant(copied: Path, rpi4: Profile) -> None:
    """An "emulator" that runs this machine's own python."""
    program = copied / "qemu-aarch64"
    skip_to_runner = 'while [ "$1" != -B ]; do shift; done; shift'
    program.write_text(f'#!/bin/sh\n{skip_to_runner}\nexec "{sys.executable}" -E -P "$@"\n')
    program.chmod(0o755)
    with (
        pytest.raises(DeviceUnreachable, match="calls itself x86_64, not aarch64"),
        EmulatedDevice(rpi4, on_progress=lambda _: None).open(),
    ):
        pass


@pytest.mark.arm
def test_an_incomplete_one_is_none(copied: Path, rpi4: Profile) -> None:
    assert is_set_up(rpi4)
    manifest = (copied / MANIFEST).read_text()
    for damaged in ("", "[]", "{}", manifest.replace('"recipe": ', '"recipe": 9')):
        (copied / MANIFEST).write_text(damaged)
        assert find_emulator(copied) is None
    (copied / MANIFEST).write_text(manifest)
    (copied / "qemu-aarch64").unlink()
    assert find_emulator(copied) is None


# --- where it cannot be had ----------------------------------------------------------------------


def test_without_apt(rpi4: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceUnreachable, match=f"apt-get is not installed.*{NO_BOARD}") as error:
        emulated_python(rpi4, on_progress=lambda _: None)
    assert "\n" not in str(error.value)
    assert left_in(cache) == []


needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="there is no apt-get here")


@needs_apt
def test_without_an_archive(
    rpi4: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _apt_with(tmp_path, monkeypatch, sources="")
    with pytest.raises(
        DeviceUnreachable, match=f"no package lists: run `apt-get update`.*{NO_BOARD}"
    ):
        emulated_python(rpi4, on_progress=lambda _: None)
    assert left_in(cache) == []


@needs_apt
def test_an_archive_out_of_reach(
    rpi4: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = "deb [trusted=yes] http://127.0.0.1:9/debian bookworm main\n"
    _apt_with(tmp_path, monkeypatch, sources=sources)
    with pytest.raises(DeviceUnreachable, match=rf"127\.0\.0\.1:9.*{NO_BOARD}") as error:
        emulated_python(rpi4, on_progress=lambda _: None)
    assert "\n" not in str(error.value)
    assert left_in(cache) == []


def _apt_with(folder: Path, monkeypatch: pytest.MonkeyPatch, *, sources: str) -> None:
    """The machine's apt, as if it had these sources and had never been updated."""
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "parts").mkdir()
    (folder / "sources.list").write_text(sources)
    settings = {
        "Dir::State::lists": folder / "lists",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "parts",
        "Acquire::Retries": "0",
    }
    config = folder / "apt.conf"
    config.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(config))


def test_a_board_that_cannot_be_emulated(cache: Path) -> None:
    with pytest.raises(UsageError, match="harness devices add jetson --host"):
        emulated_python(built_in()["jetson"])
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(
    rpi4: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        DeviceUnreachable, match=f"cannot write .*file.*XDG_CACHE_HOME .*{NO_BOARD}"
    ):
        set_up_emulator(rpi4, on_progress=lambda _: None)


def test_a_full_disk(rpi4: Profile, cache: Path) -> None:
    cache.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache)]
    if os.geteuid() or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("a small disk takes root, and a system that lets it mount one")
    try:
        with pytest.raises(DeviceUnreachable, match=r"MB free, \d+ MB are needed.*XDG_CACHE_HOME"):
            emulated_python(rpi4, on_progress=lambda _: None)
        assert left_in(cache) == []
    finally:
        subprocess.run(["umount", str(cache)], check=True)


# --- the parts -----------------------------------------------------------------------------------


def test_a_program_that_fails_is_one_line() -> None:
    script = "import sys; print('E: the cause'); print('and more', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SetupFailed, match=r"^cannot try: the cause$"):
        run_program([sys.executable, "-c", script], what="try", timeout_s=60)
    with pytest.raises(SetupFailed, match=r"^no-such-program is not installed$"):
        run_program(["no-such-program"], what="try", timeout_s=60)
    with pytest.raises(SetupFailed, match=r"^cannot try: exit code 7$"):
        run_program([sys.executable, "-c", "raise SystemExit(7)"], what="try", timeout_s=60)
    with pytest.raises(SetupFailed, match="nothing after"):
        run_program([sys.executable, "-c", "input()"], what="x", timeout_s=0.0)


def test_a_wheel_is_unpacked_without_what_is_not_used(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    names = ("numpy/core.py", "numpy/tests/test.py", "onnxruntime/tools/x.py", "../../outside.py")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "pass\n")
    site = tmp_path / "a" / "b" / "site"
    unpack_wheel(wheel, site)
    unpacked = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")}
    assert {path.name for path in unpacked} == {"core.py", "outside.py"}
    assert all(path.is_relative_to("a/b/site") for path in unpacked)


def test_a_damaged_wheel_is_fetched_again(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(SetupFailed, match=r"x\.whl is damaged .*try again"):
        unpack_wheel(wheel, tmp_path)
    assert not wheel.exists()


@pytest.mark.parametrize("cpu", BOARDS)
def test_a_board_s_files(cpu: str, tmp_path: Path) -> None:
    write_board(tmp_path, BOARDS[cpu])
    cpuinfo = (tmp_path / "proc/cpuinfo").read_text()
    assert cpuinfo.count("processor\t") == BOARDS[cpu].cores
    assert BOARDS[cpu].part in cpuinfo
    assert (tmp_path / "sys/devices/system/cpu/online").read_text() == "0-3\n"
    assert len(list((tmp_path / "sys/devices/system/cpu").glob("cpu?/cache/index?/size"))) >= 12


@needs_apt
@pytest.mark.network
def test_apt_without_lists_finds_its_archive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a new container, whose lists nobody has fetched."""
    (tmp_path / "empty" / "partial").mkdir(parents=True)
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::State::lists "{tmp_path}/empty";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    archive = machine_archive(tmp_path / "private")
    assert archive.origin in KEYRINGS
    assert archive.keyring is not None


@pytest.mark.arm
@pytest.mark.network
def test_killed_at_any_moment_the_next_one_goes_on(
    rpi4: Profile, cache: Path, tmp_path: Path
) -> None:
    """Two at once: the second waits; the first is killed in the middle; the second completes."""
    folder = emulator_folder(rpi4)
    command = [sys.executable, "-m", "harness", "devices", "bootstrap", "rpi4"]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=REPO, text=True, stdout=subprocess.DEVNULL, stderr=pipe
        )

    first = start()
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("getting QEMU and an arm64 python3"):
            break
    second = start()
    assert second.stderr is not None
    assert any("waiting" in line for line in second.stderr)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not folder.exists()
    rest = second.stderr.read()
    assert second.wait() == 0, rest
    assert is_set_up(rpi4)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}
    first.stderr.close()
    second.stderr.close()

"""Builds what the emulated boards run on: QEMU, an arm64 userland, aarch64 onnxruntime (FACTS I).

Enters: the core to emulate and a folder. Leaves: an `Emulator` in it, complete and proven by a
runner that answered from inside, or nothing but downloads that the next attempt goes on from.
Needs neither root nor binfmt: packages come through the machine's own apt and pip, which check
their signatures and checksums, and are only unpacked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devices.emulator_archive import (
    PrivateApt,
    SetupFailed,
    host_architecture,
    machine_archive,
    run_program,
)
from devices.emulator_board import BOARDS, write_board
from devices.emulator_parts import (
    ARCHITECTURE,
    EMULATOR,
    SITE,
    get_emulator,
    tidy,
    unpack,
    unpack_wheel,
)
from devices.profiles import CACHE_HINT
from devices.wheels import Target, Wheel, wheels_for
from harness.records import HarnessError

RECIPE = 1
"""Raised whenever what follows builds something else: the older one is then built anew."""
USERLAND = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
"""Debian's names; apt adds what they need, so that any release will do."""
MANIFEST = "emulator.json"
NEEDED_BYTES = 500 << 20
PROBE_TIMEOUT_S = 300.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Emulator:
    """A userland that is set up. Its `command` runs the aarch64 python3."""

    folder: Path
    cpu: str
    python: str
    """Path of the interpreter below `folder`."""
    onnxruntime: str
    """Its version there."""

    @property
    def command(self) -> list[str]:
        """Argument list to put before those of python3; the guest sees this file system."""
        root = self.folder / "root"
        # Libraries of this machine are not for programs of another architecture.
        unset = [part for name in ("LD_LIBRARY_PATH", "LD_PRELOAD") for part in ("-U", name)]
        emulator = [str(self.folder / EMULATOR), "-cpu", self.cpu, "-L", str(root), *unset]
        return [*emulator, str(self.folder / self.python)]


def find_emulator(folder: Path) -> Emulator | None:
    """The emulator in `folder`, if it is set up: the manifest is the last thing written there."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != RECIPE:
            return None
        there = Emulator(folder, manifest["cpu"], manifest["python"], manifest["onnxruntime"])
        programs = (Path(there.command[0]), Path(there.command[-1]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return there if all(program.is_file() for program in programs) else None


def set_up(folder: Path, *, cpu: str, runner: Path, on_progress: Progress) -> Emulator:
    """Build the emulator in `folder` unless it is there and works; one harness at a time.

    Args:
        folder: where it will be; downloads wait in a sibling of it while it is unfinished.
        cpu: QEMU's name of the core, a key of `BOARDS`.
        runner: the runner, which must answer under emulation before anything is trusted.
        on_progress: called with a line of text before each step.

    Raises:
        SetupFailed: one line with the reason. What was there before is still there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock"), on_progress):
            there = find_emulator(folder)
            if there is not None and _works(there, runner):
                return there
            return _build(folder, cpu=cpu, runner=runner, on_progress=on_progress)
    except OSError as error:
        where = error.filename or folder
        raise SetupFailed(
            f"cannot write {where}: {error.strerror or error}; {CACHE_HINT}"
        ) from None


def _works(emulator: Emulator, runner: Path) -> bool:
    try:
        _probe(emulator, runner)
    except SetupFailed:
        return False
    return True


@contextmanager
def _alone(lock: Path, on_progress: Progress) -> Iterator[None]:
    with lock.open("w") as file:
        # Killed, we leave an apt or tar that still works there: it holds the lock until it ends.
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress("another harness is setting up the emulator: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, *, cpu: str, runner: Path, on_progress: Progress) -> Emulator:
    for leftover in folder.parent.glob(f".{folder.name}.new-*"):  # of a harness that was killed
        shutil.rmtree(leftover)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise SetupFailed(
            f"{folder.parent} has {free >> 20} MB free, {NEEDED_BYTES >> 20} MB are needed:"
            f" free some; {CACHE_HINT}"
        )
    downloads = folder.with_name(f".{folder.name}.downloads")
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        new.chmod(0o755)
        emulator = _assemble(new, downloads, cpu=cpu, runner=runner, on_progress=on_progress)
        os.sync()  # a rename that survives a power cut must not outlive the files
        _take_place(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(downloads, ignore_errors=True)
    return Emulator(folder, emulator.cpu, emulator.python, emulator.onnxruntime)


def _take_place(new: Path, folder: Path) -> None:
    """Put `new` where `folder` is; a folder that does not work any more goes."""
    broken = folder.with_name(f"{new.name}.broken")  # goes with the leftovers, if we are killed
    if folder.exists():
        folder.rename(broken)
    new.rename(folder)
    shutil.rmtree(broken, ignore_errors=True)


def _assemble(
    new: Path, downloads: Path, *, cpu: str, runner: Path, on_progress: Progress
) -> Emulator:
    """All parts in `new`, proven, and the manifest that says what they are."""
    host = host_architecture()
    downloads.mkdir(exist_ok=True)
    archive = machine_archive(downloads / "machine")
    root = new / "root"
    on_progress(f"getting QEMU and an arm64 python3 of {archive.origin} {archive.suite} (35 MB)")
    with ThreadPoolExecutor(1) as beside:
        qemu = beside.submit(get_emulator, new, downloads, host=host, archive=archive)
        apt = PrivateApt(downloads / "arm64", architecture="arm64", archive=archive)
        apt.update()
        packages = apt.fetch(*USERLAND)
        for package in packages:
            unpack(package, root)
        python = tidy(root).relative_to(new).as_posix()
        write_board(root, BOARDS[cpu])
        version, emulator_package = qemu.result()
    sources = {package.name: _sha256(package) for package in (emulator_package, *packages)}
    emulator = Emulator(new, cpu, python, onnxruntime="")
    for wheel in _wheels(_target(emulator), on_progress):
        unpack_wheel(wheel.path, root / SITE)
        sources[wheel.path.name] = wheel.sha256
    on_progress("starting the runner under emulation")
    hello = _probe(emulator, runner)
    manifest = {
        "recipe": RECIPE,
        "cpu": cpu,
        "python": python,
        "onnxruntime": hello["onnxruntime"],
        "emulator": version,
        "archive": {key: str(value) for key, value in asdict(archive).items()},
        "machine": hello,
        "sha256": dict(sorted(sources.items())),
    }
    (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Emulator(new, cpu, python, hello["onnxruntime"])


# --- the proofs --------------------------------------------------------------------------------


def _wheels(target: Target, on_progress: Progress) -> list[Wheel]:
    try:
        return wheels_for(target, progress=on_progress)
    except HarnessError as error:
        raise SetupFailed(str(error)) from None


def _target(emulator: Emulator) -> Target:
    """What decides which wheels fit; the first thing that runs under emulation."""
    program = (
        "import json, platform, sys; print(json.dumps({'arch': platform.machine(),"
        " 'python': list(sys.version_info[:2]), 'glibc': platform.libc_ver()[1]}))"
    )
    answer = run_program(
        [*emulator.command, "-I", "-c", program], what="run python3 under QEMU", timeout_s=120
    )
    facts = json.loads(answer)
    _must_be_arm(facts["arch"])
    major, minor = (int(number) for number in facts["glibc"].split(".")[:2])
    return Target(ARCHITECTURE, python=tuple(facts["python"]), glibc=(major, minor))


def _probe(emulator: Emulator, runner: Path) -> dict[str, Any]:
    """What the runner says of the machine it finds itself on; also leaves the .pyc files."""
    answer = run_program(
        [*emulator.command, "-I", runner],
        what="run onnxruntime under QEMU",
        timeout_s=PROBE_TIMEOUT_S,
        input_text=json.dumps({"id": 1, "op": "hello"}) + "\n",
    )
    try:
        hello: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise SetupFailed(f"the emulated runner answered {answer[:100]!r}") from None
    if not hello.get("ok"):
        raise SetupFailed(f"onnxruntime does not start under QEMU: {hello.get('error')}")
    _must_be_arm(hello["arch"])
    return {key: hello[key] for key in ("arch", "cpu", "os", "python", "onnxruntime", "numpy")}


def _must_be_arm(arch: str) -> None:
    if arch != ARCHITECTURE:
        raise SetupFailed(f"the emulated python3 runs on {arch}, not on {ARCHITECTURE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""How many ARM instructions one inference takes: counted by the emulator. Never a time.

Enters: an emulated board's python3, ONNX files. Leaves: instructions per image at batch 1, one
thread. The count repeats and ranks models on a processor that is not there; it knows nothing of
caches, clocks or wide pipelines, so it is no latency and is never shown as one.

The emulator must load plugins, which statically linked builds (Debian 13's) cannot: the one this
machine has installed, or Debian 12's, downloaded beside the userland.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from devices.model_file import check_model_file
from harness.records import HarnessError

PLUGIN_SOURCE = Path(__file__).with_name("instruction_plugin.c")
PACKAGE = "qemu-user"
COUNTED_RUNS = 3
COUNT_TIMEOUT_S = 600.0
SET_UP_TIMEOUT_S = 120.0
_SHARED_WITH_HOST = ("libc6", "libgcc-s1", "libstdc++6")
_GUEST = """
import os, sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
path, runs, *shape = sys.argv[1:]
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
image = numpy.full((1, *map(int, shape)), 128, dtype=numpy.uint8)
session.run(None, {"image": image})
os.getppid()
os.getppid()
for _ in range(int(runs)):
    session.run(None, {"image": image})
    os.getppid()
"""
"""Two marks before the runs: the second gives what a mark itself costs."""

Progress = Callable[[str], None]


class InstructionCounter:
    """An emulator with the counting plugin. Use `instruction_counter`."""

    def __init__(self, emulator: Path, plugin: Path, *, libraries: Path | None) -> None:
        self._emulator = emulator
        self._plugin = plugin
        self._libraries = libraries

    def count(self, model: Path, *, python: Sequence[str]) -> int:
        """Instructions of one inference of `model`, the median of three, nothing else in it.

        Args:
            model: an ONNX file of the harness's convention.
            python: the command of the emulated board's python3: emulator, options, interpreter.

        Raises:
            UsageError: not a model that can be run.
            HarnessError: the emulator failed.
        """
        shape = check_model_file(model).image_shape
        command = [
            *(str(self._emulator), "-plugin", str(self._plugin), *python[1:], "-I", "-B"),
            *("-c", _GUEST, str(model.resolve()), str(COUNTED_RUNS), *map(str, shape)),
        ]
        ran = _run(command, timeout_s=COUNT_TIMEOUT_S, libraries=self._libraries)
        marks = [int(n) for n in re.findall(r"^instructions (\d+)$", ran.stderr, re.MULTILINE)]
        if ran.returncode or len(marks) != COUNTED_RUNS + 2:
            raise HarnessError(f"{model}: the counting emulator failed: {_last_line(ran.stderr)}")
        _, mark, *counted = marks
        return sorted(counted)[COUNTED_RUNS // 2] - mark


def instruction_counter(folder: Path, *, progress: Progress) -> InstructionCounter:
    """The counter kept in `folder`, made there on first use.

    Raises:
        HarnessError: no C compiler, or no emulator that loads plugins is to be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plugin = folder / "instructions.so"
    if not plugin.exists():
        _compile(plugin)
    for emulator, libraries in _candidates(folder):
        if _loads(emulator, plugin, libraries):
            return InstructionCounter(emulator, plugin, libraries=libraries)
    progress("downloading an emulator that can count instructions")
    emulator, libraries = _download(folder)
    if not _loads(emulator, plugin, libraries):
        raise HarnessError(
            "no emulator here can count instructions: it takes QEMU 6 to 8, dynamically linked"
            f" (Debian 12's {PACKAGE}); everything else works without"
        )
    return InstructionCounter(emulator, plugin, libraries=libraries)


def _candidates(folder: Path) -> list[tuple[Path, Path | None]]:
    downloaded, libraries = folder / "usr/bin/qemu-aarch64", folder / "libraries"
    found: list[tuple[Path, Path | None]] = []
    if downloaded.exists():
        found.append((downloaded, libraries))
    installed = shutil.which("qemu-aarch64")
    if installed is not None:
        found.append((Path(installed), None))
    return found


def _compile(plugin: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise HarnessError(
            "counting instructions needs a C compiler: sudo apt-get install gcc libc6-dev"
        )
    partial = plugin.with_suffix(".partial")
    built = _run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", str(partial), str(PLUGIN_SOURCE)],
        timeout_s=SET_UP_TIMEOUT_S,
    )
    if built.returncode:
        raise HarnessError(f"the counting plugin does not compile: {_last_line(built.stderr)}")
    partial.replace(plugin)


def _loads(emulator: Path, plugin: Path, libraries: Path | None) -> bool:
    """Whether the emulator takes the plugin: asked to run nothing, it has nothing to say of it."""
    tried = _run(
        [str(emulator), "-plugin", str(plugin), str(plugin.with_name("nothing"))],
        timeout_s=SET_UP_TIMEOUT_S,
        libraries=libraries,
    )
    return tried.returncode == 1 and "plugin" not in tried.stderr


def _download(folder: Path) -> tuple[Path, Path]:
    """The emulator package and the libraries it names, unpacked into `folder`; no root needed."""
    if shutil.which("apt-get") is None:
        raise HarnessError(f"counting instructions needs {PACKAGE} (QEMU 6 to 8): install it")
    listed = _run(["apt-cache", "depends", "--important", PACKAGE], timeout_s=SET_UP_TIMEOUT_S)
    names = [
        name
        for name in re.findall(r"^\s+Depends: ([a-z0-9.+-]+)$", listed.stdout, re.MULTILINE)
        if name not in _SHARED_WITH_HOST
    ]
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    got = _run(
        ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE, *names],
        timeout_s=SET_UP_TIMEOUT_S,
        cwd=packages,
    )
    if got.returncode:
        raise HarnessError(
            f"cannot download {PACKAGE}: {_last_line(got.stderr)}; run: sudo apt-get update"
        )
    for package in packages.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(folder)], timeout_s=SET_UP_TIMEOUT_S)
    libraries = folder / "libraries"
    libraries.mkdir(exist_ok=True)
    for library in sorted(folder.glob("**/*.so.*")):
        if library.parent != libraries:
            shutil.copy(library, libraries / library.name)
    shutil.rmtree(packages)
    return folder / "usr/bin/qemu-aarch64", libraries


def _run(
    command: Sequence[str],
    *,
    timeout_s: float,
    libraries: Path | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    # The guest inherits the environment: nothing of the host's Python, no host libraries.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)  # the emulator's; the guest has it unset
    try:
        return subprocess.run(  # noqa: S603 - an argument list of ours, no shell
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=environment,
            cwd=cwd,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HarnessError(f"{command[0]} failed: {error}") from None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")

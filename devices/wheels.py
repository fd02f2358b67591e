"""The wheels a board needs, chosen and fetched on the workstation: the board needs no internet.

Enters: what the board is. Leaves: wheel files with their checksums, kept in the user's cache. pip
does the choosing and the fetching, from whatever index it is configured for.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from devices.profiles import CACHE_HINT, user_folder
from harness.records import HarnessError

OLDEST_GLIBC_MINOR = 17
"""manylinux2014; nothing older has wheels."""
DOWNLOAD_S = 900.0
KNOWN_BAD = "!=1.21.0"
"""Dies with SIGILL on a Raspberry Pi 4."""


@dataclass(frozen=True)
class Target:
    """What wheels must fit."""

    machine: str
    """aarch64 or x86_64."""
    python: tuple[int, int]
    glibc: tuple[int, int]

    @property
    def platforms(self) -> list[str]:
        """Tags of wheels that run there, newest first."""
        major, minor = self.glibc
        tags = [f"manylinux_{major}_{m}" for m in range(minor, OLDEST_GLIBC_MINOR - 1, -1)]
        return [f"{tag}_{self.machine}" for tag in [*tags, "manylinux2014"]]

    def __str__(self) -> str:
        return (
            f"{self.machine}, Python {self.python[0]}.{self.python[1]},"
            f" glibc {self.glibc[0]}.{self.glibc[1]}"
        )


@dataclass(frozen=True)
class Wheel:
    """One wheel file."""

    path: Path
    sha256: str
    unpacked_bytes: int

    @property
    def version(self) -> str:
        """As in its name: NAME-VERSION-..."""
        return self.path.name.split("-")[1]


def wanted_onnxruntime() -> str | None:
    """The version this machine measures with; None where it has none."""
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return None


def wheels_for(
    target: Target, *, below: str | None = None, progress: Callable[[str], None]
) -> list[Wheel]:
    """The wheels of onnxruntime and numpy: all that inference imports there.

    Args:
        target: the board.
        below: only versions of onnxruntime older than this one, which does not run there.
        progress: told what is fetched.

    Returns:
        [onnxruntime, numpy]. The version of this machine where there is one for the board,
        else the newest older one.

    Raises:
        HarnessError: no wheel fits, pip is missing, or the index cannot be reached.
    """
    wanted = wanted_onnxruntime()
    if below is not None:
        requirements = [f"onnxruntime<{below},{KNOWN_BAD}"]
    elif wanted is not None:
        requirements = [f"onnxruntime=={wanted}", f"onnxruntime<{wanted},{KNOWN_BAD}"]
    else:
        requirements = [f"onnxruntime{KNOWN_BAD}"]
    runtime = None
    for requirement in requirements:
        progress(f"fetching {requirement} for {target}")
        runtime = _fetched(requirement, target)
        if runtime is not None:
            break
    if runtime is None:
        raise HarnessError(
            f"there is no onnxruntime {f'older than {below} ' if below else ''}for {target}:"
            " a newer operating system on the board brings a newer Python"
        )
    # onnxruntime before 1.19 was built against numpy 1.
    old = _numbers(runtime.version) < (1, 19)
    numpy = _fetched("numpy<2" if old else "numpy", target)
    if numpy is None:
        raise HarnessError(f"there is no numpy for {target}")
    return [runtime, numpy]


def _fetched(requirement: str, target: Target) -> Wheel | None:
    """The wheel of one requirement; None if there is none for the target."""
    cache = user_folder("XDG_CACHE_HOME", ".cache") / "wheels"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as folder:
            if not _download(requirement, target, Path(folder)):
                return None
            (part,) = Path(folder).glob("*.whl")
            path = cache / part.name
            part.replace(path)
    except OSError as error:
        raise HarnessError(
            f"cannot keep wheels in {cache}: {error.strerror or error}; {CACHE_HINT}"
        ) from None
    except ValueError:
        raise HarnessError(f"pip fetched no wheel, or several, for {requirement}") from None
    return _wheel(path)


def _download(requirement: str, target: Target, folder: Path) -> bool:
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"),
        *("download", "--only-binary=:all:", "--no-deps", "--dest", str(folder)),
        *("--implementation", "cp", "--python-version", "{}.{}".format(*target.python)),
        *(argument for tag in target.platforms for argument in ("--platform", tag)),
        requirement,
    ]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, a list of arguments
            command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise HarnessError(
            f"pip has not fetched {requirement} in {DOWNLOAD_S:g} s: check this machine's network"
        ) from None
    if done.returncode == 0:
        return True
    if "No module named pip" in done.stderr:
        raise HarnessError("setting up a board needs pip on this machine: python3 -m ensurepip")
    # pip says the same when it reaches no index at all: this machine has an onnxruntime of its
    # own from there, and must see that it is listed before a board's is believed not to be.
    if "No matching distribution" in done.stderr and _lists("onnxruntime"):
        return False
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise HarnessError(
        f"pip cannot fetch {requirement}: {lines[-1][:300] if lines else 'it did not say why'}"
    )


def _lists(package: str) -> bool:
    """Whether pip finds any version of a package for this machine."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, a list of arguments
            [*command, "index", "versions", package],
            capture_output=True,
            timeout=DOWNLOAD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _wheel(path: Path) -> Wheel:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:
        path.unlink()
        raise HarnessError(f"{path.name} arrived damaged: run it again") from None
    with path.open("rb") as file:
        return Wheel(path, hashlib.file_digest(file, "sha256").hexdigest(), unpacked)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])

"""The parts of an emulated board: QEMU, what is used of arm64 packages and aarch64 wheels.

Enters: archives and folders. Leaves: programs and packages in them, or a `SetupFailed`. What
assembles and proves them is `devices.emulator_setup`.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from devices.emulator_archive import (
    Archive,
    PrivateApt,
    SetupFailed,
    os_release,
    run_program,
)

ARCHITECTURE = "aarch64"
NEWER_EMULATOR = {"11": "trixie", "12": "trixie"}
"""Debian release -> where to look first: QEMU 10 runs there, and int8 twice as fast as QEMU 7."""
EMULATOR = "qemu-aarch64"
"""What the program is called here, whichever package it is of."""
EMULATOR_PACKAGES = (
    ("qemu-user", "usr/bin/qemu-aarch64"),
    ("qemu-user-static", "usr/bin/qemu-aarch64-static"),
)
SUPERFLUOUS = (
    *("usr/share", "usr/sbin", "sbin", "bin", "var"),
    *(f"usr/lib/aarch64-linux-gnu/{name}" for name in ("gconv", "ossl-modules", "engines-3")),
)
SITE = "usr/lib/python3/dist-packages"
"""Where Debian's python3 looks for packages, whatever its version."""
UNUSED_IN_WHEELS = (
    *(f"onnxruntime/{name}/" for name in ("transformers", "tools", "quantization", "datasets")),
    "onnxruntime/capi/libonnxruntime.so.",  # for C++ programs; Python has its own
)


def get_emulator(new: Path, downloads: Path, *, host: str, archive: Archive) -> tuple[str, Path]:
    """`new/qemu-aarch64`, the best one that runs here; its version, and the package it is of."""
    suites = [archive.suite]
    if archive.origin == "Debian" and os_release().get("VERSION_ID") in NEWER_EMULATOR:
        suites.insert(0, NEWER_EMULATOR[os_release()["VERSION_ID"]])
    problem = SetupFailed("no emulator was found")
    for suite in suites:
        there = Archive(archive.uri, suite, archive.origin, archive.keyring)
        apt = PrivateApt(downloads / f"host-{suite}", architecture=host, archive=there)
        try:
            apt.update()
        except SetupFailed as error:
            problem = error
            continue
        for name, program in EMULATOR_PACKAGES:
            try:
                package = apt.fetch_alone(name)
                unpack_program(package, program, new / EMULATOR)
                version = run_program(
                    [new / EMULATOR, "--version"], what=f"start {EMULATOR}", timeout_s=60
                )
            except SetupFailed as error:
                problem = error
                continue
            return version.splitlines()[0], package
    raise problem


def unpack_program(package: Path, name: str, program: Path) -> None:
    """Unpack one file of a .deb: emulators of forty other processors are in the same package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(  # noqa: S603 - an argument list; no shell
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    if PurePosixPath(member.name) == PurePosixPath(name) and member.isreg():
                        content = archive.extractfile(member)
                        assert content is not None
                        with program.open("wb") as file:
                            shutil.copyfileobj(content, file)
                        program.chmod(0o755)
                        return
        except tarfile.TarError as error:
            raise SetupFailed(f"{package.name} is damaged: {error}") from None
        finally:
            process.kill()
    raise SetupFailed(f"{package.name} has no {name}")


def unpack(package: Path, folder: Path) -> None:
    """Unpack a .deb; none of its scripts run."""
    run_program(
        ["dpkg-deb", "--extract", package, folder], what=f"unpack {package.name}", timeout_s=300
    )


def tidy(root: Path) -> Path:
    """Drop what nothing here uses, add the links of a merged /usr; return the interpreter."""
    for name in SUPERFLUOUS:
        shutil.rmtree(root / name, ignore_errors=True)
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")
    found = [path for path in (root / "usr/bin").glob("python3.*") if path.suffix[1:].isdigit()]
    if len(found) != 1:
        raise SetupFailed(f"the archive's python3 has no single interpreter: {found}")
    (root / SITE).mkdir(parents=True, exist_ok=True)
    return found[0]


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Unpack what inference needs: a wheel is a zip file of what belongs in the folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                tests = "tests" in PurePosixPath(name).parts
                if not tests and not name.startswith(UNUSED_IN_WHEELS):
                    archive.extract(name, site)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        wheel.unlink()
        raise SetupFailed(f"{wheel.name} is damaged ({error}): try again") from None

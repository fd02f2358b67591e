"""What runs on a bare board while it is set up: needs python3 (3.9 or later) and nothing else.

It is sent over standard input (`python3 - REQUEST`), imports nothing of the harness and leaves one
JSON line. REQUEST is JSON with `op`: facts, build, accept or discard, the functions below.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import struct
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

Reply = dict[str, Any]

PARTIAL_S = 3600.0
"""Environments that were never finished are removed at this age."""


def facts(request: Reply) -> Reply:
    """What decides whether, and with which wheels, onnxruntime can run here."""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        libc = ""
    return {
        "pointer_bits": 8 * struct.calcsize("P"),
        "machine": platform.machine(),
        "system": platform.system(),
        "implementation": platform.python_implementation(),
        "python": list(sys.version_info[:3]),
        "libc": libc,
        "free_bytes": shutil.disk_usage(request["root"]).free,
    }


def build(request: Reply) -> Reply:
    """Unpack the wheels into a new environment beside the final one; nothing is accepted yet.

    With `venv` it is a virtual environment (without pip: the wheels are complete), else a folder
    for PYTHONPATH, for a Python that cannot make one.
    """
    folder = Path(request["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    for left in folder.parent.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > PARTIAL_S:
                shutil.rmtree(left, ignore_errors=True)
    try:
        site = folder / "site"
        if request["venv"]:
            import venv

            venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
            version = "python{}.{}".format(*sys.version_info[:2])
            site = folder / "lib" / version / "site-packages"
        site.mkdir(parents=True, exist_ok=True)
        for wheel in request["wheels"]:
            unpack(Path(wheel["path"]), wheel["sha256"], site)
        os.sync()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {}


def unpack(wheel: Path, sha256: str, site: Path) -> None:
    """Unpack one wheel, verified, into a folder of packages."""
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError(f"the wheel {wheel} has sha256 {digest.hexdigest()}, not {sha256}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # which keeps every member inside
    for data in site.glob("*.data"):
        for kind in ("purelib", "platlib"):
            if (data / kind).is_dir():
                shutil.copytree(data / kind, site, dirs_exist_ok=True)
        shutil.rmtree(data)


def accept(request: Reply) -> Reply:
    """Make the built environment (if any) the final one, and write down that it works.

    Environments from before are removed, unless a runner is at work there.
    """
    root = Path(request["root"])
    if request["folder"] is not None:
        folder, final = Path(request["folder"]), Path(request["final"])
        old = folder.with_name(folder.name + ".old.part")
        if final.exists():
            final.rename(old)  # one that no longer worked
        folder.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    marker = root / "environment.json"
    part = marker.with_name(marker.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(request["environment"], file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(marker)
    os.sync()
    remove_others(root, request["final"])
    return {}


def remove_others(root: Path, kept: str | None) -> None:
    """Remove every other finished environment; nothing while a runner holds the lock."""
    try:
        with (root / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (root / "environments").glob("[!.]*"):
                if str(folder) != kept:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # somebody works with one of them; the next set-up removes it


def discard(request: Reply) -> Reply:
    """Remove a built environment."""
    shutil.rmtree(request["folder"], ignore_errors=True)
    return {}


OPERATIONS = {"facts": facts, "build": build, "accept": accept, "discard": discard}


def main() -> None:
    """Do what the request says."""
    request = json.loads(sys.argv[1])
    try:
        reply = {"ok": True, **OPERATIONS[request["op"]](request)}
    except Exception as error:
        reply = {"ok": False, "error": " ".join(f"{type(error).__name__}: {error}".split())}
    sys.stdout.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()

"""Artefact files: atomic writes, safe reads, and the keys that decide whether one is still valid.

Enters: plain dictionaries of tensors and metadata. Leaves: `.pt` files that are either absent or
whole, and that `torch.load(weights_only=True)` reads. The same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from harness.records import HarnessError, UsageError

MAX_PT_BYTES = 2 * 2**30
"""Larger than any checkpoint of these models by far; a bigger file is a mistake or an attack."""
_DOS_FOLDER = 0x10
_WARNINGS = threading.Lock()
"""Held while warnings are silenced: that is a state of the whole process, and tasks run beside."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: temporary file beside it, fsync, rename.

    Raises:
        HarnessError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise HarnessError(f"cannot write {path} ({reason}): check permissions and space") from None


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_key(stage: str, version: int, **inputs: Any) -> str:
    """Digest of everything an artefact depends on: its stage, the config that matters, inputs.

    Args:
        stage: which function makes the artefact.
        version: raised when that function changes what it makes.
        inputs: JSON-serialisable values; tuples count as lists.
    """
    text = json.dumps({"stage": stage, "version": version, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_pt(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, text and nested dictionaries."""
    # Through memory: saved straight to a path, the archive would carry the temporary name.
    buffer = io.BytesIO()
    torch.save(_canonical(content), buffer)
    write_atomic(path, buffer.getvalue())


def _canonical(value: Any) -> Any:
    """The same values with equal text as one object and containers as separate ones.

    Pickle writes an object it has met before as a reference: without this, equal content could
    give different bytes.
    """
    if type(value) is str:
        return sys.intern(value)
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_canonical(item) for item in value)
    return value


def load_pt(
    path: Path, *, what: str, remedy: str = "make it again", keys: Iterable[str] = ()
) -> dict[str, Any]:
    """Read a `.pt` file without executing anything in it.

    Args:
        path: the file.
        what: how to call it in an error, such as "UAP" or "checkpoint".
        remedy: what to do about a damaged one.
        keys: what it should hold, to be named where it is something else; not checked.

    Raises:
        UsageError: missing, too large, not a .pt file, truncated, holding pickled code, or not
            a dictionary.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}") from None
    if size > MAX_PT_BYTES:
        limit = MAX_PT_BYTES // 2**20
        raise UsageError(f"{what} {path} is {size // 2**20} MiB; at most {limit} MiB are accepted")
    _check_archive(path, what=what, remedy=remedy)
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{what} {path} holds more than tensors and plain values; it was not executed. "
            "Save it with torch.save as a plain dictionary"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}") from None
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(f"{what} {path} is damaged ({reason}): {remedy}") from None
    if not isinstance(content, dict):
        named = ", ".join(keys)
        raise UsageError(
            f"{what} {path} holds a {type(content).__name__}, not a dictionary"
            f"{f' of {named}' if named else ''}"
        )
    return content


def _check_archive(path: Path, *, what: str, remedy: str) -> None:
    """Refuse what is no zip archive, is cut off, or would unpack to far more than its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
            damaged = archive.testzip() if unpacked <= MAX_PT_BYTES else None
            # torch reads nothing for what claims to be a folder, and leaves memory as it was.
            folders = [i.filename for i in archive.infolist() if i.external_attr & _DOS_FOLDER]
    except Exception:  # zipfile raises a dozen kinds on hostile bytes, zlib.error among them
        raise UsageError(f"{what} {path} is not a .pt file, or is cut off: {remedy}") from None
    if unpacked > MAX_PT_BYTES:
        raise UsageError(f"{what} {path} would unpack to {unpacked // 2**20} MiB: refused")
    if damaged is not None:
        raise UsageError(f"{what} {path} is damaged (checksum of {damaged!r}): {remedy}")
    if folders:
        raise UsageError(f"{what} {path} is damaged ({folders[0]!r} is a folder): {remedy}")


def write_partial(path: Path, *, key: str, state: dict[str, Any]) -> None:
    """Keep the state of unfinished work, marked with what it is for."""
    save_pt(path, {"key": key, "state": state})


def read_partial(path: Path, *, key: str) -> dict[str, Any] | None:
    """The state saved for `key`; None when there is none or it belongs to something else."""
    if not path.exists():
        return None
    try:
        content = load_pt(path, what="unfinished work")
    except UsageError:
        return None  # damaged unfinished work is worth nothing: start over
    state = content.get("state")
    return state if content.get("key") == key and isinstance(state, dict) else None

"""FILE.npz: train_x and test_x uint8 [N, H, W, C], train_y and test_y integers [N].

Nothing is unpickled, and headers are judged before a byte of pixels is read. Other keys in the
file are ignored.
"""

from __future__ import annotations

import hashlib
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from harness.data.source import Source, check_bytes, check_classes, check_labels, check_shape
from harness.data.splits import Split
from harness.records import UsageError

_DAMAGE = (  # what zipfile, zlib and NumPy's header parser raise on bytes that make no sense
    *(OSError, EOFError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)

KEYS = ("train_x", "train_y", "test_x", "test_y")

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# A copy of CIFAR-10 is told by its 60,000 labels in the official order, not by its file name: it
# gets its class names and its mirror images back.
_CIFAR10_LABELS_SHA256 = "5083e6dd0895f94970ae8513f046bf3004b333931aad82b619d23ab76f2e1845"


def read_npz(path: Path) -> Source:
    """The data set in `path`; class names are the label numbers.

    Raises:
        UsageError: the file is missing, damaged, or not of this format; one line says how.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}: give the path of an .npz file with {', '.join(KEYS)}")
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = _check_headers(path, archive)
            # Labels first: they are small, and a mistake in them must not cost reading the images.
            images = shapes["train_x"][0]
            train_y, test_y = (
                check_labels(
                    _array(archive, f"{role}_y"),
                    shape=(shapes[f"{role}_x"][0],),
                    below=images,
                    where=f"{role}_y of {path}",
                )
                for role in ("train", "test")
            )
            count = int(max(train_y.max(), test_y.max())) + 1
            classes = tuple(str(label) for label in range(count))
            check_classes(train_y, test_y, classes, str(path))
            train_x = _array(archive, "train_x").view(np.uint8)  # as the header said
            test_x = _array(archive, "test_x").view(np.uint8)
    except _DAMAGE as error:
        raise UsageError(
            f"{path} cannot be read ({' '.join(str(error).split())}): it must be an intact file "
            "written by numpy.savez; copy or create it again"
        ) from error

    labels = hashlib.sha256(train_y.tobytes() + test_y.tobytes()).hexdigest()
    cifar10 = labels == _CIFAR10_LABELS_SHA256
    return Source(
        name=path.stem,
        classes=CIFAR10_CLASSES if cifar10 else classes,
        train=Split(train_x.transpose(0, 3, 1, 2), train_y),
        test=Split(test_x.transpose(0, 3, 1, 2), test_y),
        flip=cifar10,
        note=f"{path.name}: {len(train_y):,} train / {len(test_y):,} test images"
        + (", CIFAR-10 by its labels." if cifar10 else "."),
    )


def _check_headers(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, ...]]:
    """The shape of each key, all of them checked, without reading any data."""
    held = {name.removesuffix(".npy") for name in archive.namelist()}
    absent = [key for key in KEYS if key not in held]
    if absent:
        raise UsageError(
            f"{path} has no {', '.join(absent)}: it must hold {', '.join(KEYS)}; "
            f"it holds {', '.join(map(ascii, sorted(held)[:8])) or 'nothing'}"
        )
    shapes = {key: _header(path, archive, key) for key in KEYS}
    for key in ("train_x", "test_x"):
        check_shape(shapes[key], f"{key} of {path}")
    if shapes["test_x"][1:] != shapes["train_x"][1:]:
        raise UsageError(
            f"{path}: test_x has images of {list(shapes['test_x'][1:])} and train_x of "
            f"{list(shapes['train_x'][1:])} [H, W, C]; make them the same"
        )
    return shapes


def _header(path: Path, archive: zipfile.ZipFile, key: str) -> tuple[int, ...]:
    """The shape of one array, refused when its type or its size is wrong."""
    with archive.open(f"{key}.npy") as stream:
        shape, dtype = _read_header(stream)
        start = stream.tell()
    where = f"{key} of {path}"
    if dtype.hasobject:
        raise UsageError(
            f"{where} holds Python objects, which are never loaded because they can run code; "
            "save a plain array"
        )
    if key.endswith("_x") and dtype != np.uint8:
        raise UsageError(
            f"{where} has dtype {dtype}: images must be uint8 in 0..255; convert and save again"
        )
    size = math.prod(shape) * dtype.itemsize
    check_bytes(size, where)
    held = archive.getinfo(f"{key}.npy").file_size - start
    if held != size:  # a header that lies would otherwise have its array allocated first
        raise UsageError(
            f"{where} announces {size:,} bytes but the file holds {held:,}: it is damaged; "
            "copy or create it again"
        )
    return shape


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(stream)
    else:
        raise ValueError(f"array format {version} is not a plain array")
    return shape, dtype


def _array(archive: zipfile.ZipFile, key: str) -> NDArray[np.generic]:
    with archive.open(f"{key}.npy") as stream:
        return npy.read_array(stream, allow_pickle=False)

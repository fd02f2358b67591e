"""FOLDER/<class>/<image>, or FOLDER/train/<class> and FOLDER/test/<class> where both exist.

Order and split depend on the files' names alone (their SHA-256), not on the file system nor on a
seed: the order mixes the classes, and a file that is added moves no other to the other side.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from harness.data.source import Source, check_bytes, check_classes, check_shape
from harness.data.splits import Split
from harness.records import HarnessError, UsageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
TEST_SHARE = 0.2
"""Without a test folder: this share of each class, rounded to nearest, becomes evaluation."""

_MODES_8_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_PROGRESS_EVERY = 5_000

File = tuple[Path, int]  # an image and its label


def read_folder(folder: Path, *, progress: Callable[[str], None] | None = None) -> Source:
    """The data set in `folder`; class names are the sub-folders' names, sorted.

    Images become RGB; transparency and EXIF rotation are ignored, of animations the first frame
    counts. Files without an image's extension, and hidden ones, are skipped.

    Args:
        folder: an existing folder.
        progress: told now and then how many images were read.

    Raises:
        UsageError: no classes, no images, a file that is no image, or images of several sizes.
        OSError: a folder cannot be listed.
        HarnessError: Pillow is not installed.
    """
    train, test, classes = _listing(folder)
    check_classes(_labels(train), _labels(test), classes, str(folder))
    if not test:
        raise UsageError(
            f"{folder}: no image is left to test on: give a class at least 3 images, or put test "
            "images in FOLDER/test/<class>"
        )
    images, labels = _read([*train, *test], progress), _labels([*train, *test])
    count = len(train)
    name = folder.resolve().name or "folder"
    return Source(
        name=name,
        classes=classes,
        train=Split(images[:count], labels[:count]),
        test=Split(images[count:], labels[count:]),
        flip=False,
        note=f"{name}: {count:,} train / {len(test):,} test images from class folders.",
    )


def _listing(folder: Path) -> tuple[list[File], list[File], tuple[str, ...]]:
    """Training files, test files and class names; every list in its final order."""
    roles = [folder / "train", folder / "test"]
    if all(_folders(role) for role in roles):
        classes = sorted({sub.name for role in roles for sub in _folders(role)})
        train, test = (
            [f for c, name in enumerate(classes) for f in _files(role / name, c)] for role in roles
        )
    else:
        classes = [sub.name for sub in _folders(folder)]
        train, test = [], []
        for c, name in enumerate(classes):
            files = sorted(_files(folder / name, c), key=lambda f: _rank(f[0]))
            held_out = round(len(files) * TEST_SHARE)
            test += files[:held_out]
            train += files[held_out:]
    lone = [role.name for role in roles if classes == [role.name] and _folders(role)]
    if lone:
        raise UsageError(
            f"{folder} has {lone[0]}/<class> only: give both train/<class> and test/<class>, or "
            f"the folder {folder / lone[0]} itself"
        )
    if not classes:
        raise UsageError(
            f"{folder} has no class folders: put the images of each class in FOLDER/<class>/"
        )
    if not train and not test:
        raise UsageError(
            f"{folder} has class folders but no image in them: images end in {' '.join(EXTENSIONS)}"
        )
    return _mixed(train), _mixed(test), tuple(classes)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(p for p in _entries(parent) if p.is_dir())


def _files(class_folder: Path, label: int) -> list[File]:
    if not class_folder.is_dir():  # a class that only the other role has
        return []
    return [
        (p, label)
        for p in sorted(_entries(class_folder))
        if p.suffix.lower() in EXTENSIONS and p.is_file()
    ]


def _entries(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


def _rank(path: Path) -> bytes:
    """Where an image stands among the others: by its class and file name only."""
    name = f"{path.parent.name}/{path.name}"
    return hashlib.sha256(os.fsencode(name)).digest()


def _mixed(files: Iterable[File]) -> list[File]:
    return sorted(files, key=lambda file: _rank(file[0]))


def _labels(files: list[File]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([label for _, label in files], dtype=np.int64)


def _read(
    files: list[File], progress: Callable[[str], None] | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [N, 3, H, W] of all files, which must have one size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise HarnessError(
            "reading a folder of images needs Pillow: pip install pillow, or save them as FILE.npz"
        ) from error
    images = np.empty(0, dtype=np.uint8)
    width = height = 0
    for i, (path, _) in enumerate(files):
        try:
            with Image.open(path) as image:
                if i == 0:
                    width, height = image.size
                    check_shape((len(files), height, width, 3), str(path))
                    check_bytes(len(files) * 3 * height * width, f"{path.parent.parent}")
                    images = np.empty((len(files), 3, height, width), dtype=np.uint8)
                # Before decoding: a file that claims a huge size is never unpacked.
                if image.size != (width, height):
                    raise UsageError(
                        f"{path} is {image.width}x{image.height} pixels but {files[0][0]} is "
                        f"{width}x{height}: resize all images to one size"
                    )
                if image.mode not in _MODES_8_BIT:
                    raise UsageError(
                        f"{path} does not have 8-bit pixels (mode {image.mode}): convert it to "
                        "8-bit grey or RGB"
                    )
                images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UsageError(
                f"{path} cannot be read as an image ({reason}): repair or remove it"
            ) from error
        if progress and (i + 1) % _PROGRESS_EVERY == 0:
            progress(f"read {i + 1:,} of {len(files):,} images")
    return images

"""What a reader of one format hands over, and the checks that every format shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.data.splits import Split
from harness.records import UsageError

MIN_SIDE = 8
MAX_BYTES = 8 * 2**30
"""More pixels than this in one array are refused before they are read: 8 GiB."""


@dataclass(frozen=True, eq=False)
class Source:
    """Training and test images as they are in the file; roles are cut from them later.

    Attributes:
        name: as in `Dataset.name`.
        classes: one name per label.
        train: images may be a view in any memory order; so may `test`.
        test: becomes the evaluation role.
        flip: whether a mirrored image keeps its label.
        note: what a reader must know; may be "".
        calibration: given when the format holds its own out, otherwise cut from `train`.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    flip: bool
    note: str
    calibration: Split | None = None


def check_shape(shape: tuple[int, ...], where: str) -> None:
    """Refuse what is no batch of images: `shape` must be [N >= 1, H >= 8, W >= 8, C in (1, 3)].

    Raises:
        UsageError: with `where` and the remedy.
    """
    if len(shape) != 4 or shape[3] not in (1, 3):
        hint = "transpose it" if len(shape) == 4 and shape[1] in (1, 3) else "reshape it"
        raise UsageError(
            f"{where} has shape {list(shape)}: images must be [N, H, W, C] with 1 or 3 "
            f"channels last; {hint} and save again"
        )
    if shape[0] == 0:
        raise UsageError(f"{where} holds no image: give it at least one")
    if min(shape[1], shape[2]) < MIN_SIDE:
        raise UsageError(
            f"{where} holds images of {shape[1]}x{shape[2]} pixels: at least "
            f"{MIN_SIDE}x{MIN_SIDE} are needed; enlarge them"
        )


def check_bytes(count: int, where: str) -> None:
    """Refuse an array of `count` bytes when that is over MAX_BYTES.

    Raises:
        UsageError: naming both sizes.
    """
    if count > MAX_BYTES:
        raise UsageError(
            f"{where} would take {count / 2**30:,.1f} GiB, over the limit of "
            f"{MAX_BYTES / 2**30:g} GiB: use fewer or smaller images"
        )


def check_labels(
    labels: NDArray[np.generic], *, shape: tuple[int], below: int, where: str
) -> NDArray[np.int64]:
    """`labels` as int64 [N], each in 0..below-1.

    Args:
        labels: as in the file.
        shape: what it must be, (N,).
        below: the number of training images: there cannot be more classes than that.
        where: for messages.

    Raises:
        UsageError: wrong type or shape, or a label out of range, which is named.
    """
    if labels.dtype.kind not in "iu":
        raise UsageError(
            f"{where} has dtype {labels.dtype}: labels must be integers 0, 1, 2, ...; "
            "save it as int64"
        )
    if labels.shape != shape:
        raise UsageError(
            f"{where} has shape {list(labels.shape)}: one label for each image is needed, "
            f"shape {list(shape)}"
        )
    # Compared before the cast, which would wrap a huge uint64 into range.
    wrong = np.flatnonzero((labels < 0) | (labels >= below))  # type: ignore[operator]
    if len(wrong):
        raise UsageError(
            f"{where} is {labels[wrong[0]]} at index {wrong[0]}, out of range: with {below} "
            f"training images labels are in 0..{below - 1}; number the classes from 0 without gaps"
        )
    return labels.astype(np.int64)


def check_classes(
    train: NDArray[np.int64], test: NDArray[np.int64], classes: tuple[str, ...], where: str
) -> None:
    """Refuse fewer than two classes, or a class that cannot be learnt.

    Raises:
        UsageError: naming the first class without a training image.
    """
    if len(classes) < 2:
        raise UsageError(f"{where} has {len(classes)} class: a classifier needs at least 2")
    counts = np.bincount(train, minlength=len(classes))
    if (counts == 0).any():
        missing = int(np.argmin(counts))
        tested = int((test == missing).sum())
        also = f", but {tested} test images" if tested else ""
        raise UsageError(
            f"{where}: class {classes[missing]!r} has no training image{also}; add some, or "
            "remove the class"
        )

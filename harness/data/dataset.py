"""A data set by name, its images parted into the four roles of an experiment.

What enters: a name (`digits`, `cifar10`, `svhn`), FILE.npz, or a folder of class folders. What
leaves: uint8 arrays for training, calibration, crafting (attack) and evaluation. Training,
calibration and evaluation share no image; attack is part of training (DESIGN, section 6).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.data.digits import read_digits
from harness.data.folder import read_folder
from harness.data.npz import read_npz
from harness.data.official import OFFICIAL, read_official
from harness.data.source import Source
from harness.data.splits import Split, balanced, frozen_random, hold_out, stratified
from harness.records import UsageError

__all__ = ["Dataset", "Split", "evaluation_digest", "load_dataset"]

NAMES = ("digits", *OFFICIAL)
ROLES = ("train", "calibration", "attack", "evaluation")
_CHUNK = 4096  # images per step of a pass over a split: tens of MB of temporaries, not hundreds

Progress = Callable[[str], None]


MANY_SHARED = 0.01
"""Of evaluation images that are training images too: a few are in many collections."""


@dataclass(frozen=True, eq=False)  # compare fingerprints
class Dataset:
    """Images in their roles. Treat the arrays as read-only: attack may be train itself.

    Attributes:
        name: "digits", "cifar10", "svhn", or the stem of the file or folder.
        classes: the name of each label.
        train: what models are trained on.
        calibration: held out of training, class-balanced; statistics of trained models.
        attack: class-balanced part of train that perturbations are crafted on.
        evaluation: what is reported; never trained, calibrated or (protocol clean) crafted on.
        flip: whether a horizontally mirrored image keeps its label.
        note: what a reader must know, one or two sentences; may be "".
        digests: SHA-256 of each role's images and labels, by role name; that of evaluation is
            `evaluation_digest(evaluation)`. A stage depends on the digests of the roles it reads.
        fingerprint: SHA-256 of classes and all digests.
        mean_255: mean of each channel of train, rounded to an integer level 0..255.
        std_255: standard deviation of each channel of train in levels, at least 1.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    calibration: Split
    attack: Split
    evaluation: Split
    flip: bool
    note: str
    digests: Mapping[str, str]
    fingerprint: str
    mean_255: tuple[int, ...]
    std_255: tuple[float, ...]


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    attack_images: int,
    evaluation_images: int | None = None,
    seed: int,
    planning: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """The data set called `name`, in its roles; same arguments, same bytes.

    Args:
        name: one of NAMES, a path that ends in .npz, or a folder. A folder called like one of
            NAMES is ./NAME.
        data_dir: where cifar10 and svhn are kept; `default_data_dir()` when None.
        attack_images: size of the attack role; all of train, in its order, when that is smaller.
        evaluation_images: size of the evaluation role, a stratified subset of the test images in
            their order; None, or more than there are, means all of them.
        seed: decides calibration (not in digits, where it is fixed), attack, and the evaluation
            subset. The test images, and evaluation when it is all of them, do not depend on it.
        planning: download nothing: cifar10 or svhn that is not there is zeros, as many as are
            published, for what asks only for sizes.
        progress: told in one line what takes long.

    Raises:
        UsageError: an unknown name, a malformed file, or an argument out of range.
        HarnessError: no network for a download, damaged files, a missing dependency.
    """
    _check_arguments(attack_images, evaluation_images, seed)
    source = _read(name, data_dir, planning, progress)
    train, calibration = _training_roles(source, seed)
    attack = train
    if attack_images < len(train):
        attack = _take(train, balanced(train.labels, attack_images, frozen_random(seed, 2)))
    evaluation, note = _take(source.test, None), source.note
    total = len(source.test)
    if evaluation_images is not None and evaluation_images < total:
        chosen = stratified(source.test.labels, evaluation_images, frozen_random(seed, 3))
        evaluation = _take(source.test, chosen)
        subset = f"Evaluated on {len(chosen):,} of {total:,} test images (stratified)."
        note = f"{note} {subset}".strip()

    shared = 0 if name in NAMES else shared_images(evaluation, train)
    if shared >= MANY_SHARED * len(evaluation):
        text = (
            f"{shared:,} of {len(evaluation):,} evaluation images are training images too: numbers"
            " here do not say how a model does on new ones."
        )
        note = f"{note} {text}".strip()
        if progress is not None:
            progress(f"warning: {text}")

    digests = {
        "train": _digest(train),
        "calibration": _digest(calibration),
        "evaluation": evaluation_digest(evaluation),
    }
    digests["attack"] = digests["train"] if attack is train else _digest(attack)
    identity = json.dumps([source.classes, [digests[role] for role in ROLES]])
    mean_255, std_255 = _channel_statistics(train.images)
    return Dataset(
        name=source.name,
        classes=source.classes,
        train=train,
        calibration=calibration,
        attack=attack,
        evaluation=evaluation,
        flip=source.flip,
        note=note,
        digests=digests,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        mean_255=mean_255,
        std_255=std_255,
    )


def evaluation_digest(split: Split) -> str:
    """SHA-256 of the images and labels of `split` and their shapes: `EvaluationSet.sha256`."""
    return _digest(split)


def shared_images(split: Split, other: Split) -> int:
    """How many images of the one are in the other, pixel by pixel."""

    def seen(images: NDArray[np.uint8]) -> list[bytes]:
        return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]

    there = set(seen(other.images))
    return sum(image in there for image in seen(split.images))


def _check_arguments(attack_images: int, evaluation_images: int | None, seed: int) -> None:
    for what, value, least in (
        ("attack_images", attack_images, 1),
        ("evaluation_images", evaluation_images, 1),
        ("seed", seed, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{what} is {value}: it must be at least {least}")


def _read(name: str, data_dir: Path | None, planning: bool, progress: Progress | None) -> Source:
    if name == "digits":
        return read_digits()
    if name in OFFICIAL:
        return read_official(name, data_dir=data_dir, planning=planning, progress=progress)
    try:
        path = Path(name).expanduser()
        if path.suffix.lower() == ".npz":
            return read_npz(path)
        if name and path.is_dir():  # Path("") is the current folder
            return read_folder(path, progress=progress)
        kind = "is a file" if name and path.exists() else "unknown"
    except (OSError, RuntimeError) as error:  # no rights, a name too long, no such ~user
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{name} cannot be read ({reason}): check the path and its rights"
        ) from error
    raise UsageError(
        f"data set {name!r} {kind}: choose {', '.join(NAMES)}, a FILE.npz, or a folder of class "
        "folders"
    )


def _training_roles(source: Source, seed: int) -> tuple[Split, Split]:
    if source.calibration is not None:
        return source.train, source.calibration
    kept, held_out = hold_out(source.train.labels, seed)
    if not len(held_out):
        raise UsageError(
            f"{source.name}: every class has a single training image, so none can be held out for "
            "calibration: add images"
        )
    return _take(source.train, kept), _take(source.train, held_out)


def _take(split: Split, chosen: NDArray[np.int64] | None) -> Split:
    """Images `chosen` (all when None) as a C-ordered array of their own.

    In steps: fancy indexing of a transposed view would copy twice, 300 MB at a time on CIFAR-10.
    """
    images = split.images
    if chosen is None:
        return Split(np.ascontiguousarray(images), split.labels)
    taken = np.empty((len(chosen), *images.shape[1:]), dtype=np.uint8)
    for start in range(0, len(chosen), _CHUNK):
        taken[start : start + _CHUNK] = images[chosen[start : start + _CHUNK]]
    return Split(taken, split.labels[chosen])


def _digest(split: Split) -> str:
    shape = np.array(split.images.shape, dtype="<i8")
    digest = hashlib.sha256(b"images and labels, version 1\n" + shape.tobytes())
    digest.update(np.ascontiguousarray(split.images).data)  # .data: no copy of 150 MB
    digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(means, standard deviations), exact: from the integer histogram of each channel."""
    channels = images.shape[1]
    histogram = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, len(images), _CHUNK):
        for c in range(channels):
            levels = images[start : start + _CHUNK, c].ravel()
            histogram[c] += np.bincount(levels, minlength=256)
    means, deviations = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        mean = sum(level * count for level, count in enumerate(counts)) / n
        square = sum(count * (level - mean) ** 2 for level, count in enumerate(counts)) / n
        means.append(round(mean))
        deviations.append(max(math.sqrt(square), 1.0))
    return tuple(means), tuple(deviations)

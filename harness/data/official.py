"""CIFAR-10 and SVHN as published, through torchvision: downloaded once, checksummed at every load.

What only plans needs their sizes, not their images: a stand-in takes their place until they are
there.

Their licences are their authors' (SVHN: non-commercial research); nothing is redistributed here.
"""

from __future__ import annotations

import http.client
import os
import socket
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.source import Source
from harness.data.splits import Split
from harness.data.torchvision_shim import import_torchvision
from harness.records import HarnessError

NETWORK_TIMEOUT_S = 60.0
IMAGE_SHAPE, CLASSES = (3, 32, 32), 10
"""Of both data sets."""
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    RecursionError,  # torchvision's word for too many redirects
)


@dataclass(frozen=True)
class _Official:
    """How torchvision calls a data set, and which files it keeps in the data folder."""

    title: str
    torchvision_class: str
    train: dict[str, Any]
    test: dict[str, Any]
    files: tuple[str, ...]
    """What the user may place by hand, each where torchvision looks for it."""
    traces: tuple[str, ...]
    """When one of these exists, the data was there before and is damaged rather than absent."""
    urls: Callable[[Any], list[str]]
    archive: Callable[[Any], tuple[str, str]] | None
    """(name, MD5) of the file that everything is unpacked from; None: nothing is packed."""
    flip: bool
    sizes: tuple[int, int]
    """How many training and test images are published."""


OFFICIAL = {
    "cifar10": _Official(
        title="CIFAR-10",
        torchvision_class="CIFAR10",
        train={"train": True},
        test={"train": False},
        files=("cifar-10-python.tar.gz",),
        traces=("cifar-10-python.tar.gz", "cifar-10-batches-py"),
        urls=lambda c: [c.url],
        archive=lambda c: (c.filename, c.tgz_md5),
        flip=True,
        sizes=(50_000, 10_000),
    ),
    "svhn": _Official(
        title="SVHN",
        torchvision_class="SVHN",
        train={"split": "train"},
        test={"split": "test"},
        files=("train_32x32.mat", "test_32x32.mat"),
        traces=("train_32x32.mat", "test_32x32.mat"),
        urls=lambda c: [c.split_list[split][0] for split in ("train", "test")],
        archive=None,
        flip=False,
        sizes=(73_257, 26_032),
    ),
}


def default_data_dir() -> Path:
    """Where downloads are kept when the user names no folder: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "uap-edge-harness" / "data"


def read_official(
    name: str,
    *,
    data_dir: Path | None,
    planning: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Source:
    """`name` (a key of OFFICIAL) from `data_dir`, downloaded first when it is not there.

    Args:
        name: which.
        data_dir: where it is kept; `default_data_dir()` when None.
        planning: download and write nothing: in the place of what is not there, as many zeros.
        progress: told in one line what takes long, or that these are zeros.

    Raises:
        HarnessError: no network and no files, damaged files, or a folder that cannot be written.
    """
    official = OFFICIAL[name]
    root = data_dir if data_dir is not None else default_data_dir()
    import_torchvision()
    from torchvision import datasets

    loader = getattr(datasets, official.torchvision_class)
    parts = []
    for arguments in (official.train, official.test):
        part = _load(official, loader, root, arguments, planning, progress)
        if part is None:
            return _stand_in(name)
        parts.append(part)
    if name == "cifar10":
        classes = tuple(str(label) for label in parts[0].classes)
        splits = [
            Split(part.data.transpose(0, 3, 1, 2), np.asarray(part.targets, dtype=np.int64))
            for part in parts
        ]
    else:
        classes = tuple(str(digit) for digit in range(10))
        splits = [Split(part.data, part.labels.astype(np.int64)) for part in parts]
    return Source(name, classes, splits[0], splits[1], flip=official.flip, note="")


def _stand_in(name: str) -> Source:
    """Black images, as many as are published, the classes in turn."""
    official = OFFICIAL[name]
    splits = [
        Split(
            np.broadcast_to(np.uint8(0), (count, *IMAGE_SHAPE)),
            np.arange(count, dtype=np.int64) % CLASSES,
        )
        for count in official.sizes
    ]
    classes = tuple(str(label) for label in range(CLASSES))
    return Source(name, classes, splits[0], splits[1], flip=official.flip, note="")


def _load(
    official: _Official,
    loader: Any,
    root: Path,
    arguments: dict[str, Any],
    planning: bool,
    progress: Callable[[str], None] | None,
) -> Any:
    """One of torchvision's data sets; every way it can fail becomes one line.

    None: it would have to be downloaded or unpacked, which is not done when `planning`.
    """
    by_hand = (
        f"put {' and '.join(official.files)} (from {' and '.join(official.urls(loader))}) there, "
        "name a folder that has it with --data-dir, or use FILE.npz as the data set"
    )
    # torchvision reads pickles of 2009, whose types NumPy 2.4 calls deprecated; not the user's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=r"dtype\(\): align")
        try:
            try:
                return loader(root, download=False, **arguments)
            except RuntimeError:  # absent, incomplete, or its checksum is wrong
                damaged = any((root / trace).exists() for trace in official.traces)
            if planning:
                packed = damaged and _is_packed(official, loader, root)
                if damaged and not packed:
                    raise HarnessError(
                        f"{official.title} is incomplete or damaged in {root}, and a plan downloads"
                        f" nothing: let harness run fetch it anew, or {by_hand}"
                    )
                if progress:
                    state = "still packed in" if packed else "not yet in"
                    doing = "unpacks" if packed else "downloads"
                    progress(
                        f"{official.title} is {state} {root}: planned from its published sizes, as"
                        f" if nothing were trained; harness run {doing} it first"
                    )
                return None
            if progress:
                progress(f"{official.title}: fetching what is missing to {root}")
            with _network_timeout(NETWORK_TIMEOUT_S):
                return loader(root, download=True, **arguments)
        except HarnessError:
            raise
        except _NETWORK_ERRORS as error:
            state = "is incomplete or damaged" if damaged else "is not"
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is also the open connection
                why = f"the server answers {error.code} ({_reason(error)})"
            else:
                why = f"no network ({_reason(error)})"
            raise HarnessError(
                f"{official.title} {state} in {root} and cannot be downloaded, {why}: {by_hand}"
            ) from error
        except OSError as error:
            raise HarnessError(
                f"{official.title} cannot be kept in {root} ({_reason(error)}): "
                "choose another folder with --data-dir"
            ) from error
        except Exception as error:  # torchvision, tarfile, pickle, scipy: each has its own
            raise HarnessError(
                f"{official.title} in {root} is damaged ({_reason(error)}): delete it to have it "
                f"downloaded again, or {by_hand}"
            ) from error


def _is_packed(official: _Official, loader: Any, root: Path) -> bool:
    """Whether the archive is there and is what was published."""
    from torchvision.datasets.utils import check_integrity

    if official.archive is None:
        return False
    name, md5 = official.archive(loader)
    return bool(check_integrity(root / name, md5))


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    if isinstance(cause, OSError) and cause.strerror:
        cause = cause.strerror
    return " ".join(str(cause).split()) or type(error).__name__


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Sockets opened inside give up after this: torchvision sets no limit, and hangs for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

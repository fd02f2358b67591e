"""A data file made small for a slow or narrow way: lossless, some 60 % of an .npz of photographs.

Enters: `FILE.npz` as `--dataset` takes it. Leaves: one packed file, and out of it the same arrays.
Every pixel is predicted from its left, upper and upper left neighbours (LOCO-I: Weinberger,
Seroussi, Sapiro 2000), colours as differences from green, and what is left is Huffman-coded.

    python scripts/pack_images.py cifar10.npz cifar10.packed              170 MB -> 101 MB
    python scripts/pack_images.py --unpack cifar10.packed cifar10.npz
"""

from __future__ import annotations

import argparse
import io
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Whole = npt.NDArray[np.int16]
MIDDLE = np.uint8(128)
PLAIN, IMAGES = "plain.npz", "images"


def pack(source: Path, target: Path) -> None:
    """Write the packed file.

    Raises:
        ValueError: there are no uint8 images [N, H, W, C] in it.
    """
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    images = {n: a for n, a in arrays.items() if a.ndim == 4 and a.dtype == np.uint8}
    if not images:
        raise ValueError(f"{source} has no uint8 images [N, H, W, C]")
    plain = io.BytesIO()
    np.savez_compressed(plain, **{n: a for n, a in arrays.items() if n not in images})
    with tarfile.open(target, "w") as archive:
        _add(archive, PLAIN, plain.getvalue())
        for name, array in images.items():
            shape = "x".join(map(str, array.shape))
            for channel, plane in enumerate(_decorrelated(np.moveaxis(array, -1, 0))):
                _add(archive, f"{IMAGES}/{name}/{shape}/{channel}", _coded(_residual(plane)))


def unpack(source: Path, target: Path) -> None:
    """Write the arrays again, uncompressed."""
    coded: dict[tuple[str, str], list[bytes]] = {}
    with tarfile.open(source) as archive:
        entries = {m.name: _content(archive, m) for m in archive.getmembers() if m.isfile()}
    with np.load(io.BytesIO(entries.pop(PLAIN))) as file:
        arrays = {name: file[name] for name in file.files}
    for entry in sorted(entries, key=lambda e: (e.rpartition("/")[0], int(e.rpartition("/")[2]))):
        _, name, shape, _ = entry.split("/")
        coded.setdefault((name, shape), []).append(entries[entry])
    for (name, text), planes in coded.items():
        n, height, width, _ = (int(size) for size in text.split("x"))
        with ThreadPoolExecutor(len(planes)) as pool:
            found = list(pool.map(lambda p, s=(n, height, width): _plane(p, s), planes))
        arrays[name] = np.ascontiguousarray(np.moveaxis(_recorrelated(np.stack(found)), 0, -1))
    np.savez(target, **arrays)


def _decorrelated(channels: Bytes) -> Bytes:
    """[C, N, H, W] around 0, modulo 256: of three colours green, red and blue less green."""
    planes = channels.copy()
    if len(channels) == 3:
        red, green, blue = channels
        planes = np.stack([green, red - green, blue - green])
    planes[:1] += MIDDLE
    return planes


def _recorrelated(planes: Bytes) -> Bytes:
    channels = planes.copy()
    channels[:1] -= MIDDLE
    if len(channels) == 3:
        green, red, blue = channels
        channels = np.stack([red + green, green, blue + green])
    return channels


def _predicted(left: Whole, up: Whole, corner: Whole) -> Whole:
    low, high = np.minimum(left, up), np.maximum(left, up)
    return np.where(corner >= high, low, np.where(corner <= low, high, left + up - corner))


def _residual(plane: Bytes) -> Bytes:
    """[N, H, W], modulo 256."""
    signed = _centred(plane)
    edge = np.pad(signed, ((0, 0), (1, 0), (1, 0)))
    guess = _predicted(edge[:, 1:, :-1], edge[:, :-1, 1:], edge[:, :-1, :-1])
    residual: Bytes = (signed - guess).astype(np.uint8)
    return residual


def _plane(coded: bytes, shape: tuple[int, int, int]) -> Bytes:
    """[N, H, W] of its residuals, pixel by pixel over all images at once."""
    n, height, width = shape
    residual = np.frombuffer(zlib.decompress(coded, -zlib.MAX_WBITS), np.uint8)
    residual = residual.reshape(height, width, n)
    known = np.zeros((height + 1, width + 1, n), dtype=np.int16)
    for y in range(height):
        for x in range(width):
            guess = _predicted(known[y + 1, x], known[y, x + 1], known[y, x])
            known[y + 1, x + 1] = _centred((residual[y, x] + guess).astype(np.uint8))
    plane: Bytes = np.moveaxis(known[1:, 1:], -1, 0).astype(np.uint8)
    return plane


def _centred(values: Bytes) -> Whole:
    # As signed bytes: all planes lie around 0, and what is predicted wraps the same way.
    return values.view(np.int8).astype(np.int16)


def _coded(residual: Bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    # The same place of all images together: its residuals are alike.
    return (
        coder.compress(np.ascontiguousarray(np.moveaxis(residual, 0, -1)).tobytes()) + coder.flush()
    )


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--unpack", action="store_true")
    given = parser.parse_args()
    (unpack if given.unpack else pack)(given.source, given.target)


if __name__ == "__main__":
    main()

"""Perturbation files, their 8-bit form, and the controls nobody optimised.

Enters: arrays in pixel levels. Leaves: `cache/<name>.pt`, plain dictionaries (DESIGN section 4).
What a device receives is a real 8-bit image, clip(round(x + 255 delta), 0, 255); as x is whole,
that is x + round(255 delta), clipped. So a perturbation's deployed form is int16 [C, H, W].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harness.artefacts import load_pt, save_pt, sha256_file
from harness.records import UapRecord, UsageError

REMAKE = "delete it, and `harness craft` makes it again"
"""What to do about a damaged file."""
BUDGET_TOLERANCE = 1e-4
"""Levels by which a stored delta may exceed eps: float32 rounding of eps / 255, not more."""
MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class Perturbation:
    """One UAP. `delta` float32 [C, H, W] in [0, 1] pixel units, |delta| <= eps / 255."""

    delta: npt.NDArray[np.float32]
    eps: float
    source: str
    target: int | None
    dataset: str
    protocol: str
    seed: int
    meta: dict[str, Any]

    @property
    def attack(self) -> str:
        """How it was crafted; `unknown` for a file that does not say."""
        return str(self.meta.get("attack", "unknown"))

    @property
    def delta_255(self) -> npt.NDArray[np.int16]:
        """What is added on the device: whole levels, never beyond eps."""
        return to_levels(self.delta.astype(np.float64) * 255, eps=self.eps)


def to_levels(delta_255: npt.NDArray[Any], *, eps: float) -> npt.NDArray[np.int16]:
    """Round to whole pixel levels, staying within a budget that may not be whole."""
    limit = math.floor(eps)
    levels: npt.NDArray[np.int16] = np.clip(np.rint(delta_255), -limit, limit).astype(np.int16)
    return levels


def from_levels(delta_255: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Pixel levels -> the file's unit, [0, 1]; exact enough that rounding gives the level back."""
    return (delta_255 / 255.0).astype(np.float32)


def random_sign(shape: tuple[int, int, int], *, eps: float, seed: int) -> npt.NDArray[np.float32]:
    """Control: independent +-eps per value, in pixel levels."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=shape) * 2 - 1
    return (signs * eps).astype(np.float32)


def chessboard(shape: tuple[int, int, int], *, eps: float) -> npt.NDArray[np.float32]:
    """Control: +-eps in one-pixel squares, the same in every channel, in pixel levels."""
    _, height, width = shape
    squares = (np.add.outer(np.arange(height), np.arange(width)) % 2) * 2.0 - 1.0
    return np.broadcast_to(squares * eps, shape).astype(np.float32)


def save_perturbation(path: Path, perturbation: Perturbation) -> None:
    """Write the file atomically; the same perturbation gives the same bytes."""
    save_pt(
        path,
        {
            "delta": torch.from_numpy(np.ascontiguousarray(perturbation.delta)),
            "eps": float(perturbation.eps),
            "source": perturbation.source,
            "target": -1 if perturbation.target is None else perturbation.target,
            "dataset": perturbation.dataset,
            "protocol": perturbation.protocol,
            "seed": perturbation.seed,
            "meta": perturbation.meta,
        },
    )


def load_perturbation(path: Path, *, own: bool = False) -> Perturbation:
    """Read a UAP file from anywhere; nothing in it is trusted.

    Args:
        path: the file.
        own: whether the workspace makes it anew when it is missing; only its errors differ.

    Raises:
        UsageError: missing, damaged, holding code, a missing field, a wrong type or shape,
            values that are not finite, or beyond its own budget.
    """
    types: dict[str, type | tuple[type, ...]] = {
        "delta": torch.Tensor,
        "eps": (float, int),
        "source": str,
        "target": int,
        "dataset": str,
        "protocol": str,
        "seed": int,
    }
    content = load_pt(path, what="UAP", remedy=REMAKE if own else "make it again", keys=types)
    for name, wanted in types.items():
        if name not in content:
            raise UsageError(f"UAP {path} has no {name!r}: a UAP file holds {', '.join(types)}")
        if not isinstance(content[name], wanted) or isinstance(content[name], bool):
            raise UsageError(f"UAP {path}: {name} is a {type(content[name]).__name__}")
    delta, eps, seed, target = (content[name] for name in ("delta", "eps", "seed", "target"))
    if not 0 < eps <= 255:  # before float(): a whole number may be too large for one
        raise UsageError(f"UAP {path}: eps is {eps}, but must be in (0, 255], in 1/255 units")
    if not 0 <= seed < 2**63 or target < -1:
        raise UsageError(f"UAP {path}: seed {seed} or target {target} is out of range")
    eps, delta = float(eps), delta.detach()  # a delta saved while it still wanted gradients
    if delta.layout != torch.strided or delta.is_meta:
        raise UsageError(f"UAP {path}: delta is sparse or has no values; save it as a plain tensor")
    if delta.dtype != torch.float32 or delta.ndim != 3 or not 0 < delta.numel() <= MAX_ELEMENTS:
        raise UsageError(
            f"UAP {path}: delta is {delta.dtype} {list(delta.shape)}, not float32 [C, H, W]"
        )
    if not bool(torch.isfinite(delta).all()):
        raise UsageError(f"UAP {path}: delta has values that are not finite")
    largest = float(delta.double().abs().max()) * 255
    if largest > eps + BUDGET_TOLERANCE:
        raise UsageError(f"UAP {path}: |delta| reaches {largest:.3f}/255, over its eps of {eps:g}")
    meta = content.get("meta", {})
    return Perturbation(
        delta=delta.contiguous().numpy(),
        eps=eps,
        source=content["source"],
        target=None if target < 0 else target,
        dataset=content["dataset"],
        protocol=content["protocol"],
        seed=seed,
        meta=meta if isinstance(meta, dict) else {},
    )


def check_fits(
    perturbation: Perturbation,
    path: Path,
    *,
    dataset: str,
    image_shape: tuple[int, ...],
    classes: int,
) -> None:
    """Refuse a perturbation made for other images.

    Raises:
        UsageError: another data set, another shape, or a target class that does not exist.
    """
    if perturbation.dataset != dataset:
        raise UsageError(
            f"UAP {path} was crafted on {perturbation.dataset!r}; this workspace is {dataset!r}"
        )
    if perturbation.delta.shape != tuple(image_shape):
        raise UsageError(
            f"UAP {path} is {list(perturbation.delta.shape)}; images here are {list(image_shape)}"
        )
    if perturbation.target is not None and perturbation.target >= classes:
        raise UsageError(f"UAP {path} targets class {perturbation.target}; there are {classes}")


def uap_record(path: Path, perturbation: Perturbation, *, own: bool = True) -> UapRecord:
    """The perturbation as the results store keeps it; identified by its file's sha256."""
    channels, height, width = perturbation.delta.shape
    meta = {k: v for k, v in perturbation.meta.items() if isinstance(k, str) and _is_plain(v)}
    return UapRecord(
        sha256=sha256_file(path),
        source=perturbation.source,
        attack=perturbation.attack,
        protocol=perturbation.protocol,
        dataset=perturbation.dataset,
        seed=perturbation.seed,
        eps=perturbation.eps,
        target=perturbation.target,
        shape=(channels, height, width),
        delta=np.ascontiguousarray(perturbation.delta, dtype="<f4").tobytes(),
        meta=meta,
        own=own,
    )


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it: a file from elsewhere may carry tensors in its metadata."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return isinstance(value, str | int | bool) or (
        isinstance(value, float) and math.isfinite(value)
    )

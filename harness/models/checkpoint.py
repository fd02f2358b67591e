"""Checkpoint files: a model's spec and weights, nothing executable.

Enters: a trained `ResNet`. Leaves: `cache/<variant>.pt`, and back. A file from elsewhere is
untrusted: every field is checked before a model is built from it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.artefacts import load_pt, save_pt
from harness.models.resnet import ModelSpec, ResNet
from harness.records import UsageError

FORMAT = 1
REMAKE = "delete it, and `harness train` makes it again"
"""What to do about a damaged file."""
MAX_WIDTH = 1024
MAX_CLASSES = 10_000


@dataclass(frozen=True)
class Checkpoint:
    """A model as it is on disk."""

    variant: str
    key: str
    """Digest of everything it was trained from; see `harness.artefacts.cache_key`."""
    spec: ModelSpec
    weights: dict[str, Tensor]
    meta: dict[str, Any]

    def build(self) -> ResNet:
        """The model with its weights, in eval mode."""
        model = ResNet(self.spec)
        model.load_state_dict(self.weights)
        return model.eval()


def save_checkpoint(
    path: Path, model: ResNet, *, variant: str, key: str, meta: dict[str, Any]
) -> None:
    """Write the model atomically; the same model and metadata give the same bytes."""
    # A clone, not contiguous(): that keeps odd strides where a dimension is 1, and so other bytes.
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    save_pt(
        path,
        {
            "format": FORMAT,
            "variant": variant,
            "key": key,
            "spec": dataclasses.asdict(model.spec),
            "weights": weights,
            "meta": meta,
        },
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        UsageError: missing, damaged, not a checkpoint, weights that do not fit or are not finite.
    """
    content = load_pt(path, what="checkpoint", remedy=REMAKE)
    try:
        variant, key, meta = content["variant"], content["key"], content["meta"]
        spec, weights = _spec(content["spec"]), content["weights"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path} is not a checkpoint of this harness ({type(error).__name__}: {error}): "
            f"{REMAKE}"
        ) from None
    if not (isinstance(variant, str) and isinstance(key, str) and isinstance(meta, dict)):
        raise UsageError(f"checkpoint {path} has fields of the wrong type: {REMAKE}")
    try:
        _check_weights(path, spec, weights)
    except UsageError as error:
        raise UsageError(f"{error}: {REMAKE}") from None
    return Checkpoint(variant=variant, key=key, spec=spec, weights=weights, meta=meta)


def _spec(values: dict[str, Any]) -> ModelSpec:
    spec = ModelSpec(
        arch=str(values["arch"]),
        width=int(values["width"]),
        in_channels=int(values["in_channels"]),
        classes=int(values["classes"]),
        mean_255=tuple(int(v) for v in values["mean_255"]),
        std_255=tuple(float(v) for v in values["std_255"]),
        bn_eps=float(values["bn_eps"]),
        bits=None if values["bits"] is None else int(values["bits"]),
        mask_stage=None if values["mask_stage"] is None else int(values["mask_stage"]),
        mask_shape=None if values["mask_shape"] is None else _shape(values["mask_shape"]),
    )
    # Bounds before anything is allocated from numbers a file supplied.
    if not (1 <= spec.width <= MAX_WIDTH and 2 <= spec.classes <= MAX_CLASSES):
        raise ValueError(f"width {spec.width} or classes {spec.classes} out of range")
    if spec.in_channels not in (1, 3) or spec.bits not in (None, 2, 3, 4):
        raise ValueError(f"in_channels {spec.in_channels} or bits {spec.bits} not supported")
    if not len(spec.mean_255) == len(spec.std_255) == spec.in_channels:
        raise ValueError("mean and std need one value a channel")
    if not all(math.isfinite(v) and v > 0 for v in spec.std_255):
        raise ValueError("std must be positive")
    if not (math.isfinite(spec.bn_eps) and spec.bn_eps > 0):
        raise ValueError("bn_eps must be positive")
    if spec.mask_shape is not None and not (
        min(spec.mask_shape) >= 1 and math.prod(spec.mask_shape) <= 2**24
    ):
        raise ValueError(f"mask shape {spec.mask_shape} is out of range")
    return spec


def _shape(values: Any) -> tuple[int, int, int]:
    channels, height, width = (int(v) for v in values)
    return (channels, height, width)


def _check_weights(path: Path, spec: ModelSpec, weights: Any) -> None:
    with torch.device("meta"):
        expected = ResNet(spec).state_dict()
    if spec.mask_stage is not None and spec.mask_shape is not None:
        channels = spec.width * 2 ** (spec.mask_stage - 1)
        if spec.mask_shape[0] != channels:
            raise UsageError(f"checkpoint {path}: its mask does not fit stage {spec.mask_stage}")
    if not isinstance(weights, dict) or set(weights) != set(expected):
        raise UsageError(f"checkpoint {path} does not hold the weights of a {spec.arch}")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.shape != expected[name].shape:
            raise UsageError(f"checkpoint {path}: {name} has the wrong shape for {spec.arch}")
        if tensor.dtype != expected[name].dtype or tensor.layout != torch.strided or tensor.is_meta:
            raise UsageError(f"checkpoint {path}: {name} is not a plain {expected[name].dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"checkpoint {path}: {name} holds values that are not finite")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise UsageError(f"checkpoint {path}: {name} holds negative variances")
        if name.endswith(".mask") and not bool(((tensor == 0) | (tensor == 1)).all()):
            raise UsageError(f"checkpoint {path}: {name} holds more than zeros and ones")

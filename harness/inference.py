"""PyTorch's side of a comparison: predictions on the very bytes a device receives.

Enters: a model in eval mode, uint8 images, an 8-bit perturbation. Leaves: class indices.
"""

from __future__ import annotations

import platform
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from harness.models.folded import FoldedResNet
from harness.models.integer import IntegerResNet
from harness.models.resnet import ResNet
from harness.records import Machine

_ON_GPU = threading.Lock()
"""What a GPU computes with is set for the whole process, and models are evaluated side by side."""
BATCH_SIZE = {"cpu": 256, "cuda": 1024}
TF32_DOUBT = 0.01
"""Of the largest logit: where the best two are closer, TF32 is not asked which is the best. Its
error was at most 0.001 of it (width 8, 18,000 clean and attacked CIFAR-10 images), so that two
logits further apart than 0.002 do not change places."""


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    delta_255: npt.NDArray[np.int16] | None,
    *,
    device: torch.device,
    batch_size: int | None = None,
) -> npt.NDArray[np.int64]:
    """Predicted classes [N] of clip(images + delta, 0, 255), as in float32.

    A GPU computes them in TF32, and those of them again that this leaves in doubt; what an integer
    network computes, whole numbers of at most 11 bits, is exact in TF32.

    Args:
        model: pixels float [N, C, H, W] in [0, 255] -> logits; on `device`.
        images: uint8 [N, C, H, W].
        delta_255: int16 [C, H, W] in pixel levels, or None for clean images.
        device: where the model is.
        batch_size: images at a time; None: what suits the device.
    """
    size = batch_size or BATCH_SIZE.get(device.type, BATCH_SIZE["cpu"])
    if device.type == "cpu":
        logits = _logits(model, images, delta_255, device, size)
        return logits.argmax(dim=1).numpy()
    ours = isinstance(model, FoldedResNet) or (
        isinstance(model, ResNet) and model.spec.bits is None
    )
    exact = isinstance(model, IntegerResNet)
    with _ON_GPU, torch.backends.cudnn.flags(enabled=True, allow_tf32=ours or exact):
        logits = _logits(model, images, delta_255, device, size)
    predictions = logits.argmax(dim=1).cpu().numpy()
    doubtful = in_doubt(logits) if ours else np.zeros(0, dtype=np.int64)
    if len(doubtful):
        with _ON_GPU, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            again = _logits(model, images[doubtful], delta_255, device, size)
        predictions[doubtful] = again.argmax(dim=1).cpu().numpy()
    return predictions


def in_doubt(logits: Tensor) -> npt.NDArray[np.int64]:
    """Positions in [N, classes] where TF32's error might change which logit is the largest."""
    best = logits.topk(2, dim=1).values
    near = best[:, 0] - best[:, 1] <= TF32_DOUBT * logits.abs().max()
    found: npt.NDArray[np.int64] = near.nonzero()[:, 0].cpu().numpy()
    return found


def _logits(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    delta_255: npt.NDArray[np.int16] | None,
    device: torch.device,
    size: int,
) -> Tensor:
    """[N, classes], on the device."""
    delta = None if delta_255 is None else torch.from_numpy(delta_255).to(device)
    parts: list[Tensor] = []
    for start in range(0, len(images), size):
        pixels = torch.from_numpy(images[start : start + size]).to(device)
        if delta is not None:
            pixels = (pixels.to(torch.int16) + delta).clamp_(0, 255)
        parts.append(model(pixels.float().contiguous(memory_format=torch.channels_last)))
    return torch.cat(parts)


def torch_machine(device: torch.device) -> Machine:
    """The record of where PyTorch ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return Machine(
        arch=platform.machine(),
        cpu=name or platform.machine(),
        cores=torch.get_num_threads(),
        os=platform.platform(),
        python=platform.python_version(),
        runtime_version=torch.__version__,
        extra={"accelerator": device.type},
    )

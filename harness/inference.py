"""PyTorch's side of a comparison: predictions on the very bytes a device receives.

Enters: a model in eval mode, uint8 images, an 8-bit perturbation. Leaves: class indices.
"""

from __future__ import annotations

import contextlib
import platform
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from harness.models.integer import IntegerResNet
from harness.records import Machine

_ON_GPU = threading.Lock()
"""What a GPU computes with is set for the whole process, and models are evaluated side by side."""


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    delta_255: npt.NDArray[np.int16] | None,
    *,
    device: torch.device,
    batch_size: int = 256,
) -> npt.NDArray[np.int64]:
    """Predicted classes [N] of clip(images + delta, 0, 255).

    Args:
        model: pixels float [N, C, H, W] in [0, 255] -> logits; on `device`.
        images: uint8 [N, C, H, W].
        delta_255: int16 [C, H, W] in pixel levels, or None for clean images.
        device: where the model is.
        batch_size: images at a time.
    """
    predictions: list[npt.NDArray[np.int64]] = []
    alone = _ON_GPU if device.type == "cuda" else contextlib.nullcontext()
    # A GPU's TF32 would make PyTorch the less exact side of the comparison; of whole numbers of at
    # most 11 bits, as an integer network has, its products and sums are exact.
    whole = isinstance(model, IntegerResNet)
    with alone, torch.backends.cudnn.flags(enabled=True, allow_tf32=whole):
        delta = None if delta_255 is None else torch.from_numpy(delta_255).to(device)
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(images[start : start + batch_size]).to(device)
            if delta is not None:
                pixels = (pixels.to(torch.int16) + delta).clamp_(0, 255)
            logits = model(pixels.float().contiguous(memory_format=torch.channels_last))
            predictions.append(logits.argmax(dim=1).cpu().numpy())
    return np.concatenate(predictions)


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

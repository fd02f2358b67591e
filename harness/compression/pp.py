"""Post-training pruning: mask the least active neurons of one stage's output.

Enters: a trained float `ResNet` and calibration images. Leaves: a model whose stage output is
multiplied by a fixed 0/1 mask; fine-tuning then keeps the mask. Paper, "Post-training pruning":
the 30 % of least mean activation over a validation set are removed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harness.models.resnet import ResNet


@torch.no_grad()
def mean_activation(
    model: ResNet, images: np.ndarray, *, stage: int, batch_size: int = 256
) -> Tensor:
    """Mean output of a stage, after its ReLU, over the images: float64 [C, H, W].

    Args:
        model: in eval mode.
        images: uint8 [N, C, H, W].
        stage: 1-based, as the paper counts.
        batch_size: images at a time.
    """
    block = model.stage_output(stage)
    device = next(model.parameters()).device
    total: list[Tensor] = []

    def add(_module: object, _inputs: object, output: Tensor) -> None:
        total.append(output.double().sum(dim=0))

    handle = block.register_forward_hook(add)
    try:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size])
            model(batch.to(device).float())
    finally:
        handle.remove()
    return torch.stack(total).sum(dim=0) / len(images)


def least_active_mask(activation: Tensor, *, keep: float, granularity: str) -> Tensor:
    """0/1 mask that removes the `int(N * (1 - keep))` least active neurons.

    Args:
        activation: float [C, H, W], the mean activation of each unit.
        keep: share that survives (the paper's p_i = 0.7).
        granularity: `channel` gives float32 [C, 1, 1] and can be slimmed; `unit` gives
            float32 [C, H, W], the authors' mask on single activations, and cannot.
    """
    score = activation.mean(dim=(1, 2), keepdim=True) if granularity == "channel" else activation
    n_zero = int(score.numel() * (1 - keep) + 1e-9)
    weakest = torch.argsort(score.flatten(), stable=True)[:n_zero]
    mask = torch.ones(score.numel(), device=score.device)
    mask[weakest] = 0.0
    return mask.view(score.shape)

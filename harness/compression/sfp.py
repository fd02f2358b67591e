"""Soft filter pruning (He et al. 2018): zero the weakest filters after every epoch, keep training.

Enters: a float `ResNet` in training. Leaves: the same model with, in every convolution but the
shortcuts', the filters of smallest L2 norm at exactly zero. They receive gradients in the next
epoch and may return; which filters are zero is decided anew each time, and once more at the end.

`zero_weakest_channels` is another algorithm, not the paper's: one set of channels for all layers of
a stage. It prunes worse filters than it could, but block outputs can then be cut too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from harness.models.resnet import ResNet


def zero_weakest_filters(model: ResNet, *, keep: float) -> dict[str, tuple[int, ...]]:
    """Zero the `int(N * (1 - keep))` filters of smallest L2 norm in every prunable layer.

    Args:
        model: changed in place; weights [N, I, k, k].
        keep: share of filters that survive (the paper's P_i = 0.9).

    Returns:
        Layer name -> indices of the zeroed filters.
    """
    zeroed: dict[str, tuple[int, ...]] = {}
    for name, conv in prunable_convs(model):
        n_zero = int(conv.out_channels * (1 - keep) + 1e-9)  # 10 * (1 - 0.9) is 0.99...
        norms = conv.weight.detach().flatten(1).norm(dim=1)
        weakest = torch.argsort(norms, stable=True)[:n_zero]
        with torch.no_grad():
            conv.weight[weakest] = 0.0
        zeroed[name] = tuple(sorted(int(i) for i in weakest))
    return zeroed


def zero_weakest_channels(model: ResNet, *, keep: float) -> dict[str, tuple[int, ...]]:
    """Zero the same filters in every layer of a stage (coupled SFP, labelled `stage`).

    A channel's weight is the joint L2 norm of its filters: first and second convolutions of all
    blocks, the shortcut's, and the stem's in stage 1, which writes the same channels.

    Args and returns: as `zero_weakest_filters`, keyed by stage.
    """
    zeroed: dict[str, tuple[int, ...]] = {}
    for index, stage in enumerate(model.stages):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        convs += [model.conv1] if index == 0 else []
        n_zero = int(convs[0].out_channels * (1 - keep) + 1e-9)
        norms = torch.stack([conv.weight.detach().flatten(1).norm(dim=1) for conv in convs])
        weakest = torch.argsort(norms.norm(dim=0), stable=True)[:n_zero]
        with torch.no_grad():
            for conv in convs:
                conv.weight[weakest] = 0.0
        zeroed[f"stages.{index}"] = tuple(sorted(int(i) for i in weakest))
    return zeroed


COUPLINGS = {"layer": zero_weakest_filters, "stage": zero_weakest_channels}
"""Value of `train.sfp_coupling` -> what decides which filters are zeroed."""


def prunable_convs(model: ResNet) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every convolution but the shortcuts', whose outputs must match the residual sum."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "downsample" not in name:
            yield name, module

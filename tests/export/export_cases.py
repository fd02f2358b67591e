"""Small trained models and images that the tests of `export` share. Everything is seeded."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from harness.compression.sfp import zero_weakest_channels
from harness.models.folded import FoldedResNet, fold
from harness.models.integer import IntegerResNet
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, ResNet, build_model

CLASSES = 10
IMAGE_SHAPE = (3, 16, 16)
MEAN_255 = (125, 122, 113)
STD_255 = (63.0, 62.1, 66.7)
WIDTH = 8
KEEP_RATES = (0.9, 0.7, 0.5, 0.3, 0.1)


def spec(*, width: int = WIDTH, bits: int | None = None) -> ModelSpec:
    return ModelSpec("resnet18", width, 3, CLASSES, MEAN_255, STD_255, bits=bits)


@cache
def images(n: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [n, 3, 16, 16]: one smooth pattern a class, plus noise."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).normal(0, 50, (CLASSES, 3, 4, 4)).repeat(4, 2).repeat(4, 3)
    pixels = 120 + patterns[np.arange(n) % CLASSES] + rng.normal(0, 45, (n, *IMAGE_SHAPE))
    return np.clip(pixels, 0, 255).astype(np.uint8)


@cache
def _trained(bits: int | None, width: int) -> ResNet:
    model = build_model(spec(width=width, bits=bits), seed=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pixels, labels = torch.from_numpy(images(40)).float(), torch.arange(40) % CLASSES
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # constants behind zeroed filters, both signs
            nn.init.normal_(module.bias, 0.1, 0.3, generator=generator)
            nn.init.uniform_(module.weight, 0.6, 1.4, generator=generator)
    for _ in range(4):
        optimiser.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimiser.step()
    return model.eval().requires_grad_(requires_grad=False)


def trained(*, bits: int | None = None, width: int = WIDTH) -> ResNet:
    """A model after a few steps on `images`, in eval mode; the caller may change its copy."""
    return copy.deepcopy(_trained(bits, width))


def pruned(keep: float, *, width: int = WIDTH) -> ResNet:
    """Trained, with the lowest-norm filters of every convolution but downsamples zeroed (SFP)."""
    model = trained(width=width)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "downsample" not in name:
            n_zeroed = int(module.out_channels * (1 - keep))
            order = module.weight.flatten(1).norm(dim=1).argsort()
            module.weight[order[:n_zeroed]] = 0
    return model


def coupled(keep: float, *, width: int = WIDTH) -> ResNet:
    """Trained, with the same channels zeroed in every layer of a stage (coupled SFP)."""
    model = trained(width=width)
    zero_weakest_channels(model, keep=keep)
    return model


def masked(stage: int, *, share: float = 0.3) -> ResNet:
    """Trained, with a random share of a stage's output channels masked (PP)."""
    model = trained()
    block = model.stage_output(stage)
    channels = block.bn2.num_features
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(stage))
    block.mask = torch.ones(channels, 1, 1)
    block.mask[order[: int(channels * share)]] = 0
    return model


def twin(bits: int, *, awkward: bool = False) -> IntegerResNet:
    """The integer form of a trained APoT model of width 4.

    `awkward` gives every batch norm a zero, a negative, a vanishing and a huge channel.
    """
    model = trained(bits=bits, width=4)
    for module in model.modules():
        if awkward and isinstance(module, nn.BatchNorm2d):
            module.weight[0] = 0
            module.weight[1] *= -1
            module.weight[2] = 1e-9
            module.bias[2] = 1.5
            module.bias[3] = 1e4 if module.num_features % 8 else -1e4
    return integerise(model)


def logits(model: nn.Module, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.from_numpy(pixels).float()).numpy()


def relative_error(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def full_width(*, zeroed_share: float = 0.0) -> FoldedResNet:
    """ResNet-18 of width 64 with constant weights, which compress and fold fast.

    The first int(C * zeroed_share) filters of every conv1 are zero; all biases are positive, so
    each emits a constant.
    """
    model = fold(build_model(spec(width=64), seed=0))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.fill_(0.01)
            module.bias.fill_(0.5)
    for block in model.blocks():
        block.conv1.weight[: int(block.conv1.out_channels * zeroed_share)] = 0
    return model

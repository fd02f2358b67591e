"""From a trained APoT model to its integer network: fold batch norm, round scales and biases.

Enters: a trained APoT `ResNet` in eval mode. Leaves: an `IntegerResNet`, the model that is
attacked and exported. Scales are folded in float64 and rounded to float32 once, here, so that
PyTorch and the ONNX file hold the same constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from harness.models.apot import MIN_ALPHA, ApotConv2d, Uniform8Conv2d, Uniform8Linear
from harness.models.folded import batchnorm_affine
from harness.models.integer import (
    ActivationQuantiser,
    IntegerBlock,
    IntegerConv,
    IntegerResNet,
    QuantisedLinear,
    RequantisedConv,
    RescaledConv,
)
from harness.models.resnet import BasicBlock, ResNet

EXACT_LIMIT = 2**24
"""Whole numbers up to here are exact in float32."""
WEIGHT_MULTIPLIER = {2: 32, 3: 16, 4: 8}
"""Integer weights are scaled by this so that the int32 bias resolves finer than a code; free,
because the product still fits int8 (32 x 1, 16 x 4, 8 x 10)."""
_BIAS_LIMIT = 2**22
"""A channel whose bias needs more integer steps than this is constant in all but name."""


@dataclass(frozen=True)
class _Affine:
    """A convolution's integers and its per-channel map acc -> acc * scale + shift, scale > 0."""

    weight: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


def integerise(model: ResNet) -> IntegerResNet:
    """The integer network of a trained APoT model in eval mode.

    Raises:
        ValueError: the model is not quantised.
    """
    spec = model.spec
    if spec.bits is None or not isinstance(model.conv1, Uniform8Conv2d):
        raise ValueError("only a model with APoT bits has an integer form")
    levels, step = model.conv1.integer_weight(model.normalise.std_255)
    stem = _affine(levels, step, model.bn1)
    assert isinstance(model.fc, Uniform8Linear)
    fc_levels, fc_scale = model.fc.integer_weight()
    return IntegerResNet(
        model.normalise.mean_255.detach().clone().cpu(),
        _rescaled(stem, stride=1, padding=1),
        [_integer_block(block, spec.bits) for block in model.blocks()],
        QuantisedLinear(
            fc_levels, scale=np.float32(fc_scale), bias=model.fc.bias.detach().clone().cpu()
        ),
        bits=spec.bits,
    )


def _integer_block(block: BasicBlock, bits: int) -> IntegerBlock:
    conv1, conv2 = block.conv1, block.conv2
    assert isinstance(conv1, ApotConv2d)
    assert isinstance(conv2, ApotConv2d)
    quantise1, quantise2 = _quantiser(conv1), _quantiser(conv2)
    quantise_shortcut = shortcut = None
    if block.downsample is not None:
        conv, bn = block.downsample
        assert isinstance(conv, ApotConv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        quantise_shortcut = _quantiser(conv)
        shortcut = _rescaled(
            _conv_affine(conv, bn, unit=quantise_shortcut.unit), stride=conv.stride[0], padding=0
        )
    return IntegerBlock(
        quantise1,
        _requantised(conv1, block.bn1, quantise1, quantise2, multiplier=WEIGHT_MULTIPLIER[bits]),
        _rescaled(_conv_affine(conv2, block.bn2, unit=quantise2.unit), stride=1, padding=1),
        quantise_shortcut,
        shortcut,
    )


def _quantiser(conv: ApotConv2d) -> ActivationQuantiser:
    alpha = max(float(conv.activation_alpha.detach()), MIN_ALPHA)
    return ActivationQuantiser(unit=np.float32(alpha / conv.activation_max), bits=conv.bits)


def _conv_affine(conv: ApotConv2d, bn: nn.BatchNorm2d, *, unit: np.float32) -> _Affine:
    levels, step = conv.integer_weight()
    return _affine(levels, step * float(unit), bn)


def _affine(levels: npt.NDArray[np.int8], step: float, bn: nn.BatchNorm2d) -> _Affine:
    gain, shift = (t.cpu().numpy() for t in batchnorm_affine(bn))
    # Scales must be positive: a negative batch-norm gain flips the sign of the weights instead.
    flipped = np.where((gain < 0)[:, None, None, None], -levels, levels).astype(np.int8)
    return _Affine(flipped, np.abs(gain) * step, shift)


def _rescaled(affine: _Affine, *, stride: int, padding: int) -> RescaledConv:
    return RescaledConv(
        IntegerConv(affine.weight, stride=stride, padding=padding),
        scale=affine.scale.astype(np.float32),
        shift=affine.shift.astype(np.float32),
    )


def _requantised(
    conv: ApotConv2d,
    bn: nn.BatchNorm2d,
    quantise: ActivationQuantiser,
    output: ActivationQuantiser,
    *,
    multiplier: int,
) -> RequantisedConv:
    affine = _conv_affine(conv, bn, unit=quantise.unit)
    scale = affine.scale / multiplier
    # The quantiser subtracts a quarter unit; here that is free, in the bias.
    shift = affine.shift - float(output.quarter_unit)
    constant = (np.abs(shift) > scale * _BIAS_LIMIT) | (scale == 0)
    weight = np.where(constant[:, None, None, None], 0, affine.weight).astype(np.int8)
    scale = np.where(constant, np.maximum(np.abs(shift), 1e-30) / 2**20, scale)
    bias = np.rint(shift / scale).astype(np.int32)
    largest = float(np.abs(weight).sum(axis=(1, 2, 3)).max()) * conv.activation_max
    if largest >= EXACT_LIMIT:
        raise ValueError(f"sums up to {largest:.0f} exceed float32's exact integers (2^24)")
    return RequantisedConv(
        IntegerConv(weight, stride=conv.stride[0], padding=1),
        multiplier=multiplier,
        input_unit=quantise.unit,
        weight_scale=(scale / float(quantise.unit)).astype(np.float32),
        bias=bias,
        output=output,
    )

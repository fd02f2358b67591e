"""The deployed form of an APoT variant: integer arithmetic, written in PyTorch (the "twin").

Enters: a trained APoT `ResNet`. Leaves: an `IntegerResNet` whose tensors hold whole numbers in
float32. Every sum stays below 2^24, so float32 computes it exactly, and onnxruntime's integer
kernels give the same codes bit for bit. Crafting attacks this model, `export` writes it: what was
attacked is what is deployed.

Notation: u = alpha / max(level) is a quantiser's unit, f = u / 2 its half unit, q a level,
c the half-unit count ("code", 0..255) that a 256-entry table maps to q.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models import kernels
from harness.models.apot import (
    ACTIVATION_LEVELS,
    half_unit_table,
    lookup,
)

Float32 = npt.NDArray[np.float32]


class _Levels(torch.autograd.Function):
    """q = table[clip(round(h), 0, 255)] for h half units; straight-through inside the clip.

    A level is about (h + 1/2) / 2, so its slope is 1/2 where 0 <= h + 1/2 <= 2 max(level).
    """

    @staticmethod
    def forward(ctx: Any, half_units: Tensor, table: Tensor, top: int) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(half_units)
            ctx.top = top
        codes = half_units.round().clamp_(0, 255).to(torch.int32)
        return lookup(table, codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (half_units,) = ctx.saved_tensors
        # One pass instead of two comparisons, their product and two more; its bounds are open.
        low, high = _just_outside(-0.5, 2 * ctx.top - 0.5)
        inside: Tensor = torch.ops.aten.hardtanh_backward(grads[0], half_units, low, high)
        return inside.mul_(0.5), None, None


class _Quantised(torch.autograd.Function):
    """`_Levels` of (x - quarter) / half, in one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quarter: Tensor, half: Tensor, levels: LevelTable) -> Tensor:
        ctx.save_for_backward(x, quarter, half)
        ctx.top = levels.top
        return kernels.quantised(x, quarter, half, levels.codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        of_x = kernels.quantised_gradient(grads[0], *ctx.saved_tensors, top=ctx.top)
        return of_x, None, None, None


class _Requantised(torch.autograd.Function):
    """`_Levels` of (multiplier * sums + bias) * gain, in one kernel each way."""

    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, bias: Tensor, gain: Tensor, levels: LevelTable, multiplier: int
    ) -> Tensor:
        ctx.save_for_backward(sums, bias, gain)
        ctx.top, ctx.multiplier = levels.top, multiplier
        return kernels.requantised(sums, bias, gain, levels.codes, multiplier=multiplier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        of_sums = kernels.requantised_gradient(
            grads[0], *ctx.saved_tensors, top=ctx.top, multiplier=ctx.multiplier
        )
        return of_sums, None, None, None, None


class _Rescaled(torch.autograd.Function):
    """round(sums) * scale + shift in one kernel; rounding passes the gradient through."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return kernels.rescaled(sums, scale, shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale, None, None


@cache
def _just_outside(low: float, high: float) -> tuple[float, float]:
    """The open interval of float32 that holds the closed one and nothing more."""
    below = np.nextafter(np.float32(low), np.float32(-np.inf))
    above = np.nextafter(np.float32(high), np.float32(np.inf))
    return float(below), float(above)


class LevelTable(nn.Module):
    """Half-unit counts (float, unrounded) -> integer levels."""

    table: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.top = ACTIVATION_LEVELS[bits][-1]
        table = half_unit_table(ACTIVATION_LEVELS[bits])
        self.codes = tuple(int(level) for level in table)
        self.register_buffer("table", torch.from_numpy(table).float())

    def forward(self, half_units: Tensor) -> Tensor:
        levels: Tensor = _Levels.apply(half_units, self.table, self.top)  # type: ignore[no-untyped-call]
        return levels


class ActivationQuantiser(nn.Module):
    """Float activations -> integer levels, as Sub, QuantizeLinear and a table lookup."""

    half_unit: Tensor
    quarter_unit: Tensor

    def __init__(self, *, unit: np.float32, bits: int) -> None:
        super().__init__()
        half = np.float32(unit / np.float32(2))
        self.unit = unit
        self.register_buffer("half_unit", torch.tensor(half))
        self.register_buffer("quarter_unit", torch.tensor(np.float32(half / np.float32(2))))
        self.levels = LevelTable(bits)

    def forward(self, x: Tensor) -> Tensor:
        levels: Tensor
        if kernels.usable(x):
            levels = _Quantised.apply(x, self.quarter_unit, self.half_unit, self.levels)  # type: ignore[no-untyped-call]
        else:
            levels = self.levels((x - self.quarter_unit).div_(self.half_unit))
        return levels


class IntegerConv(nn.Module):
    """Exact convolution of integer levels: float32 in form, integers in value."""

    weight: Tensor

    def __init__(self, weight: npt.NDArray[np.int8], *, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.register_buffer("weight", torch.from_numpy(weight.astype(np.float32)))

    def forward(self, levels: Tensor) -> Tensor:
        sums = self.unrounded(levels)
        # The sums are whole; rounding removes what a fast convolution algorithm may leave.
        sums.data.round_()  # the gradient passes through
        return sums

    def unrounded(self, levels: Tensor) -> Tensor:
        """For who rounds the sums himself."""
        return F.conv2d(levels, self.weight, None, stride=self.stride, padding=self.padding)

    def weight_int8(self) -> npt.NDArray[np.int8]:
        """The integer weights [O, I, k, k]."""
        return self.weight.cpu().numpy().astype(np.int8)


class RequantisedConv(nn.Module):
    """conv1 of a block: levels -> levels, batch norm in the requantisation (QLinearConv).

    code = clip(round((k * acc + bias) * gain), 0, 255); `weight_scale` is what the ONNX operator
    is given, and gain = input unit * weight_scale / half unit in float32, as onnxruntime does.
    """

    gain: Tensor
    bias: Tensor

    def __init__(
        self,
        conv: IntegerConv,
        *,
        multiplier: int,
        input_unit: np.float32,
        weight_scale: Float32,
        bias: npt.NDArray[np.int32],
        output: ActivationQuantiser,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.multiplier = multiplier
        self.input_unit = input_unit
        self.weight_scale = weight_scale
        self.output = output
        half_unit = np.float32(output.half_unit.item())
        gain = (input_unit * weight_scale).astype(np.float32) / half_unit
        self.register_buffer("gain", _per_channel(gain.astype(np.float32)))
        self.register_buffer("bias", _per_channel(bias.astype(np.float32)))

    def forward(self, levels: Tensor) -> Tensor:
        out: Tensor
        table = self.output.levels
        if kernels.usable(levels):
            sums = self.conv.unrounded(levels)
            out = _Requantised.apply(sums, self.bias, self.gain, table, self.multiplier)  # type: ignore[no-untyped-call]
        else:
            accumulated = torch.add(self.bias, self.conv(levels), alpha=self.multiplier)
            out = table(accumulated.mul_(self.gain))
        return out

    def bias_int32(self) -> npt.NDArray[np.int32]:
        """The integer bias [O]."""
        return self.bias.flatten().cpu().numpy().astype(np.int32)


class RescaledConv(nn.Module):
    """Levels -> float: acc * scale + shift per channel (ConvInteger, Cast, Mul, Add)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, conv: IntegerConv, *, scale: Float32, shift: Float32) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("scale", _per_channel(scale))
        self.register_buffer("shift", _per_channel(shift))

    def forward(self, levels: Tensor) -> Tensor:
        rescaled: Tensor
        if kernels.usable(levels):
            sums = self.conv.unrounded(levels)
            rescaled = _Rescaled.apply(sums, self.scale, self.shift)  # type: ignore[no-untyped-call]
        else:
            rescaled = (self.conv(levels) * self.scale).add_(self.shift)
        return rescaled


class IntegerBlock(nn.Module):
    """One residual block; the skip connection stays float, as in APoT."""

    def __init__(
        self,
        quantise: ActivationQuantiser,
        conv1: RequantisedConv,
        conv2: RescaledConv,
        quantise_shortcut: ActivationQuantiser | None,
        shortcut: RescaledConv | None,
    ) -> None:
        super().__init__()
        self.quantise = quantise
        self.conv1 = conv1
        self.conv2 = conv2
        self.quantise_shortcut = quantise_shortcut
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(self.quantise(x)))
        if self.shortcut is not None and self.quantise_shortcut is not None:
            x = self.shortcut(self.quantise_shortcut(x))
        return (y + x).relu_()


class IntegerResNet(nn.Module):
    """Pixels float [N, C, H, W] in [0, 255] -> logits [N, classes].

    Exact (every code as on the device) when the pixels are whole numbers; differentiable by
    straight-through everywhere. In place is only what a module itself has just made: the export
    compares what modules return.
    """

    mean_255: Tensor

    def __init__(
        self,
        mean_255: Tensor,
        stem: RescaledConv,
        blocks: list[IntegerBlock],
        fc: QuantisedLinear,
        *,
        bits: int,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("mean_255", mean_255)
        self.stem = stem
        self.layers = nn.ModuleList(blocks)
        self.fc = fc
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.stem(pixels - self.mean_255))
        for block in self.layers:
            x = block(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits

    def blocks(self) -> Iterator[IntegerBlock]:
        """The residual blocks from input to output."""
        for block in self.layers:
            assert isinstance(block, IntegerBlock)
            yield block


class QuantisedLinear(nn.Module):
    """Last layer: 8-bit weights, float activations."""

    weight: Tensor
    bias: Tensor

    def __init__(self, levels: npt.NDArray[np.int8], *, scale: np.float32, bias: Tensor) -> None:
        super().__init__()
        self.levels = levels
        self.scale = scale
        weight = levels.astype(np.float32) * scale
        self.register_buffer("weight", torch.from_numpy(weight.astype(np.float32)))
        self.register_buffer("bias", bias)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


def _per_channel(values: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).view(1, -1, 1, 1)

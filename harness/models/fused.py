"""A folded network on an NVIDIA GPU in bfloat16: what crafting runs there.

Crafting is bound by memory traffic in the first stages, where activations are large and channels
few. So biases, shortcuts and ReLUs are computed inside cuDNN's convolutions instead of in passes
of their own, and the backward pass, written by hand, has one pass beside every convolution. Only
the pixels have a gradient.

bfloat16 holds whole numbers up to 256 and no fraction of large ones. A perturbed pixel is therefore
given as two channels, its nearest whole number and the rest (at most 1/2), which the stem convolves
with the same weights: a perturbation keeps 8 significant bits of its own.

Enters: a `FoldedResNet`. Leaves: the same function with bfloat16 rounding, differentiable in the
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models import kernels
from harness.models.folded import FoldedBlock, FoldedResNet

STEM_CHANNELS = 8
"""The stem's input channels are filled up to a multiple of this: tensor cores take no others."""


@dataclass(frozen=True)
class _Conv:
    """A frozen convolution: weight [O, I, k, k] channels last, bias [O]."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int


@dataclass(frozen=True)
class _Block:
    """relu(conv2(relu(conv1(x))) + skip), times a mask of 0 and 1 if it has one."""

    conv1: _Conv
    conv2: _Conv
    shortcut: _Conv | None
    mask: Tensor | None


class FusedResNet:
    """Pixels float32 [N, C, H, W] in [0, 255] -> logits float32 [N, classes].

    Args:
        network: on the device where this is to run; not changed, its weights are copied.
        dtype: of activations and weights; another than bfloat16 for tests.

    Raises:
        ValueError: `can_fuse` is False of the network.
    """

    def __init__(self, network: FoldedResNet, *, dtype: torch.dtype = torch.bfloat16) -> None:
        if not can_fuse(network):
            raise ValueError("a block has channels cut out, or a mask that is not of 0 and 1")
        self.dtype = dtype
        self.mean_255 = network.mean_255.float()
        self.channels = network.stem.in_channels
        self.stem = _stem(network.stem, dtype)
        self.stem_back = _turned(network.stem, dtype)
        self.blocks = [_block(block, dtype) for block in network.blocks()]
        self.fc_weight, self.fc_bias = network.fc.weight.detach(), network.fc.bias.detach()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits, with a graph where the pixels need a gradient."""
        logits: Tensor = _Forward.apply(pixels, self)  # type: ignore[no-untyped-call]
        return logits

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits, what the backward pass needs: the stem's output, then of each block two)."""
        x = _relu_conv(self._packed(pixels), self.stem)
        kept = [x]
        for block in self.blocks:
            inner = _relu_conv(x, block.conv1)
            skip = x if block.shortcut is None else _conv(x, block.shortcut)
            x = _relu_conv(inner, block.conv2, skip)
            if block.mask is not None:
                x = x.mul_(block.mask)
            kept += [inner, x]
        features = x.mean(dim=(2, 3), dtype=torch.float32)
        return F.linear(features, self.fc_weight, self.fc_bias), kept

    def backward(self, logits: Tensor, kept: list[Tensor]) -> Tensor:
        """Gradient [N, C, H, W] of the pixels, float32, from that of the logits."""
        last = kept[-1]
        area = last.shape[2] * last.shape[3]
        features = (logits @ self.fc_weight / area).to(self.dtype)
        # A masked output is zero, so that the same comparison masks its gradient.
        gradient = _where_positive(features[:, :, None, None].expand_as(last), last)
        for i in range(len(self.blocks) - 1, -1, -1):
            block, x, inner = self.blocks[i], kept[2 * i], kept[2 * i + 1]
            through = _where_positive(_gradient(gradient, inner, block.conv2), inner)
            through = _gradient(through, x, block.conv1)
            if block.shortcut is not None:
                gradient = _gradient(gradient, x, block.shortcut)
            gradient = _add_where_positive(through, gradient, x)
        # The whole part and the rest have the same weights, so also the same gradient.
        back: Tensor = F.conv2d(gradient, self.stem_back, padding=self.stem.padding)
        return back[:, : self.channels].float()

    def _packed(self, pixels: Tensor) -> Tensor:
        """[whole part less the mean, rest, zeros] along the channels."""
        n, channels, height, width = pixels.shape
        packed = torch.zeros(
            (n, self.stem.weight.shape[1], height, width), dtype=self.dtype, device=pixels.device
        ).to(memory_format=torch.channels_last)
        whole = pixels.round()
        packed[:, :channels] = whole - self.mean_255
        packed[:, channels : 2 * channels] = pixels - whole
        return packed


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, network: FusedResNet) -> Tensor:
        logits, kept = network.forward(pixels)
        if ctx.needs_input_grad[0]:
            ctx.network = network
            ctx.save_for_backward(*kept)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.network.backward(grads[0], list(ctx.saved_tensors)), None


def can_fuse(network: nn.Module) -> bool:
    """Whether it is a network this file knows, of the sizes that tensor cores take."""
    if not isinstance(network, FoldedResNet):
        return False
    stem = network.stem
    if stem.stride != (1, 1) or stem.padding != (stem.kernel_size[0] // 2,) * 2:
        return False
    return all(
        block.skip_channels is None
        and block.conv1.out_channels % STEM_CHANNELS == 0
        and block.conv2.out_channels % STEM_CHANNELS == 0
        and (block.mask is None or bool(((block.mask == 0) | (block.mask == 1)).all()))
        for block in network.blocks()
    )


def _stem(conv: nn.Conv2d, dtype: torch.dtype) -> _Conv:
    made = _made(conv, torch.float32)
    channels = made.weight.shape[1]
    filling = -2 * channels % STEM_CHANNELS
    weight = F.pad(torch.cat([made.weight, made.weight], dim=1), (0, 0, 0, 0, 0, filling))
    return _Conv(_last(weight, dtype), made.bias.to(dtype), made.stride, made.padding)


def _turned(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """The weight [filled up C, O, k, k] whose convolution is the gradient of the stem's input.

    cuDNN has no tensor-core kernel for a gradient of so few channels, but one for this.
    """
    weight = conv.weight.detach().transpose(0, 1).flip(2, 3)
    return _last(F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % STEM_CHANNELS)), dtype)


def _block(block: FoldedBlock, dtype: torch.dtype) -> _Block:
    return _Block(
        _made(block.conv1, dtype),
        _made(block.conv2, dtype),
        None if block.shortcut is None else _made(block.shortcut, dtype),
        None if block.mask is None else block.mask.to(dtype),
    )


def _made(conv: nn.Conv2d, dtype: torch.dtype) -> _Conv:
    assert conv.bias is not None
    assert not isinstance(conv.padding, str)
    weight = _last(conv.weight.detach(), dtype)
    return _Conv(weight, conv.bias.detach().to(dtype), conv.stride[0], conv.padding[0])


def _last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def _conv(x: Tensor, conv: _Conv) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding)


def _relu_conv(x: Tensor, conv: _Conv, add: Tensor | None = None) -> Tensor:
    """relu(conv(x) + add); on a GPU one kernel."""
    if not x.is_cuda:
        y = _conv(x, conv)
        return (y if add is None else y.add_(add)).relu_()
    stride, padding = (conv.stride, conv.stride), (conv.padding, conv.padding)
    once = (1, 1)
    if add is None:
        return torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, stride, padding, once, groups=1
        )
    return torch.cudnn_convolution_add_relu(
        x, conv.weight, add, 1.0, conv.bias, stride, padding, once, groups=1
    )


def _gradient(gradient: Tensor, x: Tensor, conv: _Conv) -> Tensor:
    """Of the convolution's input; `x` gives its shape."""
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    wanted: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, conv.weight, None, stride, padding, [1, 1], False, [0, 0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    return wanted


def _add_where_positive(one: Tensor, other: Tensor, y: Tensor) -> Tensor:
    if kernels.usable(one):
        return kernels.add_where_positive(one, other, y)
    return _where_positive(one.add_(other), y)


def _where_positive(gradient: Tensor, y: Tensor) -> Tensor:
    masked: Tensor = torch.ops.aten.threshold_backward(gradient, y, 0)
    return masked

"""The deployed form of a float variant: batch norm folded, weights frozen.

Enters: a trained `ResNet` in eval mode. Leaves: a `FoldedResNet`, the same function in fewer
operations. Crafting attacks it, `export` slims it and writes it as ONNX.
Folding is exact algebra done in float64; only the final rounding to float32 remains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.models.resnet import BasicBlock, ResNet


class FoldedBlock(nn.Module):
    """relu(conv2(relu(conv1(x))) + skip), then the mask. Biases carry the batch norm.

    `skip_channels` (int64 [K]) selects the channels of an identity shortcut that survive when
    the block's outputs were cut; None keeps all.
    """

    mask: Tensor | None
    skip_channels: Tensor | None

    def __init__(
        self,
        conv1: nn.Conv2d,
        conv2: nn.Conv2d,
        shortcut: nn.Conv2d | None,
        *,
        mask: Tensor | None = None,
        skip_channels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2
        self.shortcut = shortcut
        self.register_buffer("mask", mask)
        self.register_buffer("skip_channels", skip_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            skip = self.shortcut(x)
        elif self.skip_channels is not None:
            skip = x[:, self.skip_channels]
        else:
            skip = x
        # In place: nobody else needs what the convolutions made, and crafting is 4 % faster.
        y: Tensor = self.conv2(self.conv1(x).relu_()).add_(skip).relu_()
        return y * self.mask if self.mask is not None else y


class FoldedResNet(nn.Module):
    """Pixels float [N, C, H, W] in [0, 255] -> logits [N, classes]; no batch norm, no gradients.

    The mean is subtracted before the stem (zero padding must mean "mean colour" at the border,
    as it did in training); the division by std is folded into the stem's weights.
    """

    mean_255: Tensor

    def __init__(
        self,
        mean_255: Tensor,
        stem: nn.Conv2d,
        blocks: list[FoldedBlock],
        fc: nn.Linear,
    ) -> None:
        super().__init__()
        self.register_buffer("mean_255", mean_255)
        self.stem = stem
        self.layers = nn.ModuleList(blocks)
        self.fc = fc
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels - self.mean_255).relu_()
        for block in self.layers:
            x = block(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits

    def blocks(self) -> Iterator[FoldedBlock]:
        """The residual blocks from input to output."""
        for block in self.layers:
            assert isinstance(block, FoldedBlock)
            yield block


def fold(model: ResNet) -> FoldedResNet:
    """The same function as `model.eval()`, with every batch norm folded into its convolution.

    Raises:
        ValueError: the model is quantised; use `harness.models.integerise`.
    """
    if model.spec.bits is not None:
        raise ValueError("a quantised model has no float folding: integerise it")
    std_255 = model.normalise.std_255.double()
    stem = fold_conv(model.conv1, model.bn1, input_scale=1.0 / std_255)
    return FoldedResNet(
        model.normalise.mean_255.detach().clone(),
        stem,
        [_fold_block(block) for block in model.blocks()],
        _copy_linear(model.fc),
    )


def batchnorm_affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(gain, shift) float64 [C] of a batch norm in eval mode: y = gain * x + shift."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    gain = bn.weight.detach().double() / torch.sqrt(bn.running_var.double() + bn.eps)
    shift = bn.bias.detach().double() - gain * bn.running_mean.double()
    return gain, shift


def fold_conv(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, *, input_scale: Tensor | float = 1.0
) -> nn.Conv2d:
    """One convolution with bias that equals bn(conv(x * input_scale))."""
    gain, shift = batchnorm_affine(bn)
    weight = conv.weight.detach().double() * input_scale * gain.view(-1, 1, 1, 1)
    return make_conv(weight, shift, stride=conv.stride[0], padding=conv.padding[0])


def make_conv(weight: Tensor, bias: Tensor, *, stride: int, padding: int | str) -> nn.Conv2d:
    """A frozen float32 convolution with the given weight [O, I, k, k] and bias [O]."""
    cout, cin, kernel, _ = weight.shape
    conv = nn.utils.skip_init(nn.Conv2d, cin, cout, kernel, stride=stride, padding=padding)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    return conv.requires_grad_(requires_grad=False)


def _fold_block(block: BasicBlock) -> FoldedBlock:
    shortcut = None
    if block.downsample is not None:
        conv, bn = block.downsample
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        shortcut = fold_conv(conv, bn)
    return FoldedBlock(
        fold_conv(block.conv1, block.bn1),
        fold_conv(block.conv2, block.bn2),
        shortcut,
        mask=block.mask.detach().clone() if block.mask is not None else None,
    )


def _copy_linear(linear: nn.Linear) -> nn.Linear:
    copy = nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features)
    assert isinstance(copy, nn.Linear)
    copy.load_state_dict(linear.state_dict())
    return copy

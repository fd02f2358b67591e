"""Removal of channels that are constant in every block output of a stage, exactly.

Enters: a `FoldedResNet`. Leaves: the same function with such channels cut from the residual sum
itself, where soft filter pruning zeroed the same filters in all layers of a stage (coupled SFP).

A chain is what one residual sum runs through: the stem, or a block with a shortcut, and the
identity blocks after it. A channel that the chain's first layer and every second convolution
leave at zero weights holds one constant after each block. All of them give way to ONE channel that
holds 1 everywhere; what reads them reads it with weights sum_j constant_j * w[:, j], so zero
padding takes away at the borders what it took before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.models.folded import FoldedBlock, FoldedResNet, make_conv


@dataclass
class _Chain:
    """Blocks from `first` to `last`, the constants after each of them, and what can go."""

    first: int
    last: int
    starts_at_stem: bool
    constants: list[Tensor]
    """Value of every channel [C] after the stem (if it starts there) and after each block."""
    constant: Tensor
    """Which channels [C] are constant all along."""


@dataclass(frozen=True)
class StageCut:
    """What was cut from the residual sums."""

    channels: int
    """Over all stages, each channel counted once, less the constant ones."""
    constant_filters: int
    """Filters without weights that write the constant channels: in the file on purpose."""


def slim_stages(model: FoldedResNet, *, align: int) -> tuple[FoldedResNet, StageCut]:
    """The same function with constant channels cut; `model` is left as it is.

    Widths are rounded up to multiples of `align`; a stage that reaches its width stays as it was.
    """
    model = copy.deepcopy(model).cpu()
    stem, blocks, fc = model.stem, list(model.blocks()), model.fc
    channels = constant_filters = 0
    for chain in _chains(stem, blocks):
        keep = _kept(chain, align)
        if keep is None:
            continue
        channels += len(chain.constant) - len(keep) - 1
        # One in every second convolution, one in the stem or the shortcut.
        constant_filters += chain.last - chain.first + 2
        after = iter(chain.constants)
        if chain.starts_at_stem:
            stem = _emit(stem, keep, constant=1.0)
            read = next(after)
            blocks[0] = _read(blocks[0], keep, read)
        for index in range(chain.first, chain.last + 1):
            block = blocks[index]
            shortcut = block.shortcut
            blocks[index] = FoldedBlock(
                block.conv1,
                _emit(block.conv2, keep, constant=0.0),
                None if shortcut is None else _emit(shortcut, keep, constant=1.0),
            )
            read = next(after)
            if index + 1 < len(blocks):
                blocks[index + 1] = _read(blocks[index + 1], keep, read)
            else:
                fc = _read_linear(fc, keep, read)
    cut = StageCut(channels, constant_filters)
    return FoldedResNet(model.mean_255, stem, blocks, fc), cut


def _chains(stem: nn.Conv2d, blocks: list[FoldedBlock]) -> list[_Chain]:
    starts = [0, *(i for i, block in enumerate(blocks) if block.shortcut is not None and i)]
    chains: list[_Chain] = []
    for first, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
        at_stem = blocks[first].shortcut is None
        constants: list[Tensor] = []
        constant = torch.ones(blocks[first].conv2.out_channels, dtype=torch.bool)
        value = torch.zeros(len(constant), dtype=torch.float64)
        if at_stem:
            constant &= _zero_filters(stem)
            value = torch.relu(_bias(stem))
            constants.append(value)
        for block in blocks[first:end]:
            constant &= _zero_filters(block.conv2)
            if block.mask is not None or block.skip_channels is not None:
                constant &= False  # a mask and a cut of its own: post-training pruning
            if block.shortcut is not None:
                constant &= _zero_filters(block.shortcut)
                value = _bias(block.shortcut)
            value = torch.relu(_bias(block.conv2) + value)
            constants.append(value)
        chains.append(_Chain(first, end - 1, at_stem, constants, constant))
    return chains


def _kept(chain: _Chain, align: int) -> Tensor | None:
    """Indices of the channels that stay; None when nothing is saved."""
    width, alive = len(chain.constant), int((~chain.constant).sum())
    target = -(-(alive + 1) // align) * align
    if alive == width or target >= width:
        return None
    keep = ~chain.constant
    keep[torch.where(chain.constant)[0][: target - alive - 1]] = True
    return torch.where(keep)[0]


def _emit(conv: nn.Conv2d, keep: Tensor, *, constant: float) -> nn.Conv2d:
    """The convolution writing the kept channels, and one that is `constant`."""
    assert conv.bias is not None
    weight = torch.cat([conv.weight[keep], torch.zeros_like(conv.weight[:1])])
    bias = torch.cat([conv.bias[keep], torch.full_like(conv.bias[:1], constant)])
    return make_conv(weight, bias, stride=conv.stride[0], padding=conv.padding[0])


def _read(block: FoldedBlock, keep: Tensor, constants: Tensor) -> FoldedBlock:
    """The block reading the kept channels, and the constant one for all others."""
    shortcut = block.shortcut
    return FoldedBlock(
        _read_conv(block.conv1, keep, constants),
        block.conv2,
        None if shortcut is None else _read_conv(shortcut, keep, constants),
        mask=block.mask,
        skip_channels=block.skip_channels,
    )


def _read_conv(conv: nn.Conv2d, keep: Tensor, constants: Tensor) -> nn.Conv2d:
    assert conv.bias is not None
    carried = _carried(conv.weight, keep, constants[:, None, None])
    weight = torch.cat([conv.weight[:, keep].double(), carried], dim=1)
    return make_conv(weight, conv.bias, stride=conv.stride[0], padding=conv.padding[0])


def _read_linear(linear: nn.Linear, keep: Tensor, constants: Tensor) -> nn.Linear:
    weight = torch.cat(
        [linear.weight[:, keep].double(), _carried(linear.weight, keep, constants)], dim=1
    )
    read = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    assert isinstance(read, nn.Linear)
    with torch.no_grad():
        read.weight.copy_(weight)
        read.bias.copy_(linear.bias)
    return read


def _carried(weight: Tensor, keep: Tensor, constants: Tensor) -> Tensor:
    """Weights [O, 1, ...] of the constant channel: those cut times what they held."""
    cut = torch.ones(weight.shape[1], dtype=torch.bool)
    cut[keep] = False
    return (weight[:, cut].double() * constants[cut]).sum(dim=1, keepdim=True)


def _zero_filters(conv: nn.Conv2d) -> Tensor:
    return (conv.weight == 0).flatten(1).all(dim=1)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias.double()

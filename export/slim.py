"""Physical removal of pruned channels, exactly (FACTS C and D).

Enters: a `FoldedResNet` with zeroed filters (SFP) or a channel mask (PP). Leaves: a narrower
`FoldedResNet` that computes the same function, and a report of what was and was not removed.

A zeroed filter is not a dead channel: with batch norm folded it emits the constant relu(bias).
All constants of one layer merge into ONE channel (weights 0, bias 1) whose weights in the next
convolution are sum_j relu(bias_j) * w2[:, j]. Moving them into the next bias instead would be
wrong at the borders, where zero padding takes part of the constant away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.stage_slim import StageCut, slim_stages
from harness.models.folded import FoldedBlock, FoldedResNet, make_conv


@dataclass(frozen=True)
class BlockSlim:
    """What slimming did to one residual block; widths are channels."""

    block: str
    inner_before: int
    """Outputs of conv1, inputs of conv2."""
    inner_exact: int
    """The narrowest exact width, the constant channel included, before `align`."""
    inner_after: int
    constants_merged: int
    """Zeroed filters that one constant channel replaced; 0 when none of them emitted anything."""
    output_before: int
    output_after: int
    mask: str
    """none | channels (cut) | units (nothing can be cut: kept as a multiplication)."""


@dataclass(frozen=True)
class SlimReport:
    """What slimming did, block by block, and in one paragraph for people."""

    align: int
    blocks: tuple[BlockSlim, ...]
    stage_channels_cut: int
    """Channels cut from the residual sums of whole stages (coupled SFP)."""
    zero_filters_left: int
    """Filters that are all zero and stay in the file: block outputs keep their width."""
    method: str

    @property
    def changed(self) -> bool:
        """Whether any channel was removed."""
        return any(
            block.inner_after != block.inner_before or block.output_after != block.output_before
            for block in self.blocks
        )


def slim(model: FoldedResNet, *, align: int = 1) -> tuple[FoldedResNet, SlimReport]:
    """The same function with pruned channels gone; `model` is left as it is.

    `align` rounds every kept width up to a multiple, with channels that were to go: widths that
    are not multiples of 8 can be slower than unpruned ones. A layer that reaches its original
    width that way stays as it was. At least one channel remains.

    Raises:
        ValueError: `align` is not positive, a mask holds values other than 0 and 1, or a masked
            block feeds an identity shortcut, whose channels cannot be cut.
    """
    if align < 1:
        raise ValueError(f"align must be at least 1, not {align}")
    originals = list(model.blocks())
    model, cut = slim_stages(model, align=align)
    slimmed: list[FoldedBlock] = []
    rows: list[BlockSlim] = []
    kept: Tensor | None = None
    for index, (original, before) in enumerate(zip(originals, model.blocks(), strict=True)):
        name = f"blocks.{index}"
        block = _cut_inputs(before, kept, name) if kept is not None else before
        mask = _mask_kind(before.mask, name)
        kept = None
        if mask == "channels":
            block, kept = _cut_masked_outputs(block, align)
        block, exact, merged = _merge_constants(block, align)
        slimmed.append(block)
        rows.append(
            BlockSlim(
                name,
                inner_before=original.conv1.out_channels,
                inner_exact=exact,
                inner_after=block.conv1.out_channels,
                constants_merged=merged,
                output_before=original.conv2.out_channels,
                output_after=block.conv2.out_channels,
                mask=mask,
            )
        )
    fc = model.fc if kept is None else _linear(model.fc.weight[:, kept], model.fc.bias)
    result = FoldedResNet(model.mean_255, model.stem, slimmed, fc)
    left = sum(int(_zero_filters(m).sum()) for m in result.modules() if isinstance(m, nn.Conv2d))
    # The constant channels have zero weights too, but they are there on purpose.
    left -= sum(row.constants_merged > 0 for row in rows) + cut.constant_filters
    blocks = tuple(rows)
    sentence = _sentence(blocks, align=align, left=left, cut=cut)
    return result, SlimReport(align, blocks, cut.channels, left, sentence)


def _merge_constants(block: FoldedBlock, align: int) -> tuple[FoldedBlock, int, int]:
    """(block without its zeroed conv1 filters, narrowest exact width, filters merged)."""
    conv1, conv2 = block.conv1, block.conv2
    assert conv1.bias is not None
    assert conv2.bias is not None
    width = conv1.out_channels
    zeroed = _zero_filters(conv1)
    constant = torch.relu(conv1.bias.double())
    emits = zeroed & (constant > 0)
    alive = int((~zeroed).sum())
    constant_channels = int(emits.any())
    exact = max(1, alive + constant_channels)
    target = _aligned(exact, align)
    if target >= width:
        return block, min(exact, width), 0
    # Filters that emit nothing fill up first, so that a constant channel always has a use.
    fillers = torch.cat([torch.where(zeroed & ~emits)[0], torch.where(emits)[0]])
    keep_mask = ~zeroed
    keep_mask[fillers[: target - alive - constant_channels]] = True
    keep, merged = torch.where(keep_mask)[0], torch.where(~keep_mask)[0]
    weight1, bias1 = conv1.weight[keep], conv1.bias[keep]
    weight2 = conv2.weight[:, keep].double()
    if constant_channels:
        carried = (conv2.weight[:, merged].double() * constant[merged, None, None]).sum(1)
        weight1 = torch.cat([weight1, torch.zeros_like(conv1.weight[:1])])
        bias1 = torch.cat([bias1, torch.ones_like(conv1.bias[:1])])
        weight2 = torch.cat([weight2, carried[:, None]], dim=1)
    slimmed = FoldedBlock(
        _like(conv1, weight1, bias1),
        _like(conv2, weight2, conv2.bias),
        block.shortcut,
        mask=block.mask,
        skip_channels=block.skip_channels,
    )
    return slimmed, exact, len(merged) if constant_channels else 0


def _cut_masked_outputs(block: FoldedBlock, align: int) -> tuple[FoldedBlock, Tensor | None]:
    """(block without its masked outputs, indices of the outputs kept; None when all are).

    The mask follows the ReLU, so a masked channel is exactly zero everywhere: no constant.
    """
    assert block.mask is not None
    assert block.conv2.bias is not None
    keep_mask = block.mask.flatten() != 0
    width, alive = len(keep_mask), int(keep_mask.sum())
    target = _aligned(max(1, alive), align)
    if alive == width:
        return FoldedBlock(
            block.conv1, block.conv2, block.shortcut, skip_channels=block.skip_channels
        ), None
    if target >= width:
        return block, None
    fillers = torch.where(~keep_mask)[0][: target - alive]
    keep_mask[fillers] = True
    keep = torch.where(keep_mask)[0]
    # Channels kept only for alignment must stay silent, so their mask stays with them.
    mask = block.mask[keep] if len(fillers) else None
    shortcut, skip_channels = block.shortcut, None
    if shortcut is not None:
        assert shortcut.bias is not None
        shortcut = _like(shortcut, shortcut.weight[keep], shortcut.bias[keep])
    else:
        skip_channels = keep if block.skip_channels is None else block.skip_channels[keep]
    conv2 = _like(block.conv2, block.conv2.weight[keep], block.conv2.bias[keep])
    cut = FoldedBlock(block.conv1, conv2, shortcut, mask=mask, skip_channels=skip_channels)
    return cut, keep


def _cut_inputs(block: FoldedBlock, kept: Tensor, name: str) -> FoldedBlock:
    """The block reading only the channels `kept` of its former input."""
    if block.shortcut is None:
        raise ValueError(
            f"{name} adds its input unchanged, so the masked channels before it cannot be cut: "
            "mask the last block of a stage"
        )
    conv1 = _like(block.conv1, block.conv1.weight[:, kept], block.conv1.bias)
    shortcut = _like(block.shortcut, block.shortcut.weight[:, kept], block.shortcut.bias)
    return FoldedBlock(conv1, block.conv2, shortcut, mask=block.mask)


def _mask_kind(mask: Tensor | None, name: str) -> str:
    if mask is None:
        return "none"
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"the mask of {name} scales activations: only 0 and 1 can be exported")
    return "channels" if mask.shape[1:].numel() == 1 else "units"


def _zero_filters(conv: nn.Conv2d) -> Tensor:
    """Which filters [O] have no weight but zero."""
    return (conv.weight == 0).flatten(1).all(dim=1)


def _aligned(width: int, align: int) -> int:
    return -(-width // align) * align


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    assert bias is not None
    return make_conv(weight, bias, stride=conv.stride[0], padding=conv.padding[0])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def _sentence(blocks: tuple[BlockSlim, ...], *, align: int, left: int, cut: StageCut) -> str:
    parts: list[str] = []
    if cut.channels:
        parts.append(
            f"{cut.channels} channels that were constant through a whole stage are cut from its "
            "residual sum, one constant channel a stage carries them."
        )
    inner = [block for block in blocks if block.inner_after != block.inner_before]
    if inner:
        before = sum(block.inner_before for block in inner)
        after = sum(block.inner_after for block in inner)
        merged = sum(block.constants_merged for block in inner)
        constant = sum(block.constants_merged > 0 for block in inner)
        parts.append(
            f"Zeroed filters removed inside {len(inner)} of {len(blocks)} blocks "
            f"({before} -> {after} channels); the constants of {merged} of them are carried by "
            f"{constant} constant channels, so the function is unchanged."
        )
    parts.extend(
        f"Masked channels cut from the output of {block.block} "
        f"({block.output_before} -> {block.output_after})."
        for block in blocks
        if block.output_after != block.output_before and block.mask == "channels"
    )
    parts.extend(
        f"The mask of {block.block} covers single activations: it is applied at run time and "
        "nothing was saved."
        for block in blocks
        if block.mask == "units"
    )
    parts = parts or ["Nothing to remove."]
    if align > 1:
        parts.append(f"Widths are rounded up to multiples of {align}.")
    if left:
        parts.append(
            f"{left} zeroed filters stay in the file: the stem, second convolutions and "
            "shortcuts keep their width because the residual sums need it, and so do layers "
            "that rounding brought back to full width."
        )
    return " ".join(parts)

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from export_cases import (
    IMAGE_SHAPE,
    KEEP_RATES,
    coupled,
    images,
    logits,
    masked,
    pruned,
    relative_error,
    spec,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export.cost import cost_card
from export.float_graph import float_graph
from export.graph import serialise
from export.slim import slim
from harness.compression.sfp import zero_weakest_channels
from harness.models.folded import FoldedBlock, FoldedResNet, fold, make_conv
from harness.models.resnet import build_model

PIXELS = images(64, seed=5)


def assert_same_function(slimmed: nn.Module, original: nn.Module) -> None:
    expected, actual = logits(original, PIXELS), logits(slimmed, PIXELS)
    assert relative_error(actual, expected) <= 1e-4
    assert (actual.argmax(1) == expected.argmax(1)).all()


def inner_widths(model: FoldedResNet) -> list[int]:
    return [block.conv1.out_channels for block in model.blocks()]


# --- soft filter pruning -------------------------------------------------------------------------


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("keep", KEEP_RATES)
def test_sfp_slim_equals_the_masked_model(keep: float, align: int) -> None:
    model = pruned(keep)
    slimmed, report = slim(fold(model), align=align)
    assert_same_function(slimmed, model)
    # At width 8, rounding to 8 brings keep 0.9 back to full width everywhere.
    assert report.changed == ((keep, align) != (0.9, 8))
    assert (sum(block.constants_merged for block in report.blocks) > 0) == report.changed


@pytest.mark.parametrize("keep", KEEP_RATES)
def test_sfp_widths_are_those_kept_plus_one_constant_channel(keep: float) -> None:
    folded = fold(pruned(keep))
    slimmed, report = slim(folded)
    first_stage = [folded.stem, *(block.conv2 for block in list(folded.blocks())[:2])]
    zeroed_there = [(conv.weight == 0).flatten(1).all(1) for conv in first_stage]
    in_all = int(torch.stack(zeroed_there).all(0).sum())
    for before, after, row in zip(folded.blocks(), slimmed.blocks(), report.blocks, strict=True):
        width = before.conv1.out_channels
        n_zeroed = int(width * (1 - keep))
        zeroed = (before.conv1.weight == 0).flatten(1).all(1)
        assert int(zeroed.sum()) == n_zeroed
        emits = bool((before.conv1.bias[zeroed] > 0).any())
        expected = width - n_zeroed + emits
        assert (row.inner_before, row.inner_exact) == (width, expected)
        assert after.conv1.out_channels == after.conv2.in_channels == row.inner_after == expected
        assert after.conv2.out_channels == row.output_after
        # The stem and the first stage's second convolutions may have zeroed the same channels.
        common = in_all if row.block in ("blocks.0", "blocks.1") else 0
        assert row.output_after == row.output_before - max(common - 1, 0)


@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_dropping_zeroed_filters_or_moving_constants_to_the_bias_is_another_function(
    keep: float,
) -> None:
    """The test above bites: the two obvious ways to slim fail it by orders of magnitude."""
    model = pruned(keep)
    expected = logits(model, PIXELS)
    dropped, moved = fold(model), fold(model)
    for naive in (dropped, moved):
        for block in naive.blocks():
            zeroed = (block.conv1.weight == 0).flatten(1).all(1)
            constant = torch.relu(block.conv1.bias) * zeroed
            if naive is moved:
                block.conv2.bias += (block.conv2.weight * constant[:, None, None]).sum((1, 2, 3))
            block.conv1.bias[zeroed] = 0
        assert relative_error(logits(naive, PIXELS), expected) > 1e-2
    assert (logits(dropped, PIXELS).argmax(1) != expected.argmax(1)).any()


def test_slim_does_not_touch_the_model_it_is_given() -> None:
    model = fold(pruned(0.5))
    before = copy.deepcopy(model.state_dict())
    slim(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_unpruned_model_stays_as_it_is() -> None:
    slimmed, report = slim(fold(trained()), align=8)
    assert not report.changed
    assert report.zero_filters_left == 0
    assert "Nothing to remove" in report.method
    assert_same_function(slimmed, trained())


def test_zeroed_stem_and_second_convolutions_are_reported_as_still_there() -> None:
    model = pruned(0.5)
    _, report = slim(fold(model))
    convolutions = [model.conv1, *(block.conv2 for block in model.blocks())]
    assert report.zero_filters_left == sum(conv.out_channels // 2 for conv in convolutions)
    assert f"{report.zero_filters_left} zeroed filters stay in the file" in report.method


def test_align_must_be_positive() -> None:
    with pytest.raises(ValueError, match="align must be at least 1"):
        slim(fold(trained()), align=0)


# --- coupled soft filter pruning -----------------------------------------------------------------


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("keep", KEEP_RATES)
def test_coupled_slim_equals_the_masked_model(keep: float, align: int) -> None:
    model = coupled(keep)
    slimmed, report = slim(fold(model), align=align)
    assert_same_function(slimmed, model)
    widths = [8, 8, 16, 16, 32, 32, 64, 64]
    expected = []
    for width in widths:
        n_zeroed = int(width * (1 - keep) + 1e-9)
        target = -(-(width - n_zeroed + 1) // align) * align
        expected.append(min(width, target))
    assert [row.output_after for row in report.blocks] == expected
    assert [row.output_before for row in report.blocks] == widths
    assert slimmed.fc.in_features == expected[-1]
    assert report.stage_channels_cut == sum(
        before - after for before, after in zip(widths[::2], expected[::2], strict=True)
    )
    if align == 1 and keep < 0.9:
        assert report.zero_filters_left == 0
        assert "cut from its residual sum" in report.method


def test_coupled_slim_cuts_at_width_64() -> None:
    """FACTS C: -18.3 % MACs at keep 0.9 without constants; one constant channel a stage more."""
    model = fold(build_model(spec(width=64), seed=0).eval())
    macs = {}
    for name, network in (("full", model), ("coupled", _coupled_64())):
        slimmed, _ = slim(network)
        content = serialise(float_graph(slimmed, image_shape=(3, 32, 32), metadata={}))
        macs[name] = cost_card(content, image_shape=(3, 32, 32)).macs
    assert macs["full"] == 555_422_720
    saved = 1 - macs["coupled"] / macs["full"]
    assert 0.15 < saved < 0.183


def _coupled_64() -> FoldedResNet:
    model = build_model(spec(width=64), seed=0).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.1)
    zero_weakest_channels(model, keep=0.9)
    return fold(model)


def test_channels_that_layers_zero_by_chance_alone_do_not_count_as_a_stages() -> None:
    """Layer-wise SFP leaves shortcuts alone, so only the first stage can have such channels."""
    model = pruned(0.5)
    slimmed, report = slim(fold(model))
    for row in report.blocks[2:]:
        assert row.output_after == row.output_before
    assert_same_function(slimmed, model)


# --- post-training pruning -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_pp_slim_equals_the_masked_model(stage: int) -> None:
    model = masked(stage)
    slimmed, report = slim(fold(model))
    assert_same_function(slimmed, model)
    cut = report.blocks[2 * stage - 1]
    assert cut.output_after == cut.output_before - int(cut.output_before * 0.3)
    block = list(slimmed.blocks())[2 * stage - 1]
    assert block.mask is None
    assert block.skip_channels is not None
    assert len(block.skip_channels) == block.conv2.out_channels == cut.output_after


def test_pp_alignment_keeps_masked_channels_with_their_mask() -> None:
    model = masked(3)  # 32 channels, 9 masked: 23 kept, 24 with alignment
    slimmed, report = slim(fold(model), align=8)
    block = list(slimmed.blocks())[5]
    assert report.blocks[5].output_after == 24
    assert block.mask is not None
    assert int((block.mask == 0).sum()) == 1
    assert_same_function(slimmed, model)


def test_pp_alignment_that_reaches_the_full_width_changes_nothing() -> None:
    model = masked(2)  # 16 channels, 4 masked
    slimmed, report = slim(fold(model), align=16)
    assert not report.changed
    assert_same_function(slimmed, model)


def test_pp_on_a_strided_block_cuts_its_downsample() -> None:
    model = masked(3)
    folded = fold(model)
    blocks = list(folded.blocks())
    # Mask the first block of stage 3 and let the second one read it through a convolution.
    blocks[4].mask, blocks[5].mask = blocks[5].mask, None
    eye = torch.eye(32)[:, :, None, None]
    blocks[5].shortcut = make_conv(eye, torch.zeros(32), stride=1, padding=0)
    slimmed, report = slim(folded)
    assert report.blocks[4].output_after == 23
    assert_same_function(slimmed, folded)


def test_a_mask_before_an_identity_shortcut_is_refused() -> None:
    model = trained()
    next(iter(model.blocks())).mask = (torch.arange(8) > 2).float()[:, None, None]
    with pytest.raises(ValueError, match=r"blocks\.1 adds its input unchanged"):
        slim(fold(model))


def test_a_mask_that_scales_is_refused() -> None:
    model = masked(2)
    block = model.stage_output(2)
    assert block.mask is not None
    block.mask[0] = 0.5
    with pytest.raises(ValueError, match="only 0 and 1"):
        slim(fold(model))


def test_a_fully_masked_stage_keeps_one_channel() -> None:
    model = masked(2, share=1.0)
    slimmed, report = slim(fold(model))
    assert report.blocks[3].output_after == 1
    assert_same_function(slimmed, model)


def test_a_mask_of_single_activations_saves_nothing_and_says_so() -> None:
    model = trained()
    block = model.stage_output(3)
    units = torch.rand(32, IMAGE_SHAPE[1] // 4, IMAGE_SHAPE[2] // 4)
    block.mask = (units > 0.3).float()
    slimmed, report = slim(fold(model))
    assert not report.changed
    assert report.blocks[5].mask == "units"
    assert "nothing was saved" in report.method
    assert_same_function(slimmed, model)


# --- any network ---------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> FoldedResNet:
    """Three residual blocks of random width; zeroed filters, biases and a mask at random."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def conv(cin: int, cout: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
        weight = torch.randn(cout, cin, kernel, kernel, generator=generator) / (cin * kernel) ** 0.5
        bias = torch.randn(cout, generator=generator)
        return make_conv(weight, bias, stride=stride, padding=kernel // 2)

    blocks, cin = [], draw(st.integers(1, 5))
    stem = conv(3, cin)
    for stride in (1, 2, 1):
        cout = draw(st.integers(1, 12))
        blocks.append(FoldedBlock(conv(cin, cout, stride=stride), conv(cout, cout), None))
        blocks[-1].shortcut = conv(cin, cout, kernel=1, stride=stride)
        n_zeroed = draw(st.integers(0, cout))
        order = torch.randperm(cout, generator=generator)[:n_zeroed]
        blocks[-1].conv1.weight[order] = 0
        if draw(st.booleans()):
            blocks[-1].conv1.bias[order] = -blocks[-1].conv1.bias[order].abs()
        if draw(st.booleans()):
            mask = torch.rand(cout, 1, 1, generator=generator) > draw(st.floats(0, 1))
            blocks[-1].mask = mask.float()
        cin = cout
    return FoldedResNet(torch.full((1, 3, 1, 1), 120.0), stem, blocks, nn.Linear(cin, 4))


@given(model=networks(), align=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_slimming_any_network_keeps_its_function(model: FoldedResNet, align: int) -> None:
    pixels = images(6)[:, :, :6, :6]
    slimmed, report = slim(model, align=align)
    expected, actual = logits(model, pixels), logits(slimmed, pixels)
    assert np.abs(actual - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    for block, row in zip(slimmed.blocks(), report.blocks, strict=True):
        for before, after, width in (
            (row.inner_before, row.inner_after, block.conv1.out_channels),
            (row.output_before, row.output_after, block.conv2.out_channels),
        ):
            assert after == width
            assert 1 <= after <= before
            assert after == before or after % align == 0
    again, _ = slim(slimmed, align=align)
    assert inner_widths(again) == inner_widths(slimmed)

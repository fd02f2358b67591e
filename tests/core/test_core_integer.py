"""The integer twin against an independent oracle in numpy int64 and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core_cases import MEAN_255, spec, split, trained
from torch import nn

from harness.models.apot import ACTIVATION_LEVELS, ApotConv2d, half_unit_table
from harness.models.folded import batchnorm_affine
from harness.models.integer import IntegerConv, IntegerResNet, LevelTable
from harness.models.integerise import EXACT_LIMIT, integerise
from harness.models.resnet import ResNet, build_model

BITS = (2, 3, 4)
IMAGES = split(8, seed=7).images


def awkward(model: ResNet) -> ResNet:
    """Every batch norm gets a zero, a negative and a vanishing gain."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0] = 0.0
                module.weight[1] *= -1
                module.weight[2] = 1e-12
    return model


def convolve(x: np.ndarray, weight: np.ndarray, *, stride: int, padding: int) -> np.ndarray:
    """Plain int64 convolution, [N, I, H, W] * [O, I, k, k], by summing shifted windows."""
    kernel = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    side = (padded.shape[2] - kernel) // stride + 1
    out = np.zeros((x.shape[0], weight.shape[0], side, side), dtype=np.int64)
    for dy in range(kernel):
        for dx in range(kernel):
            window = padded[
                :, :, dy : dy + stride * side : stride, dx : dx + stride * side : stride
            ]
            out += np.einsum("nihw,oi->nohw", window, weight[:, :, dy, dx])
    return out


def nearest_level(x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    """The level nearest to float x, in units of alpha / top."""
    levels = np.array(ACTIVATION_LEVELS[bits], dtype=np.int64)
    units = np.clip(x * levels[-1] / alpha, 0, levels[-1])
    return levels[np.abs(units[..., None] - levels).argmin(axis=-1)]


def affine(conv: ApotConv2d, bn: nn.BatchNorm2d, x: np.ndarray, unit: float) -> np.ndarray:
    """bn(conv(unit * x)) for integer levels x, in float64 over exact int64 sums."""
    weight, step = conv.integer_weight()
    sums = convolve(x, weight.astype(np.int64), stride=conv.stride[0], padding=int(conv.padding[0]))
    gain, shift = (t.numpy()[:, None, None] for t in batchnorm_affine(bn))
    return sums * (step * unit) * gain + shift


def inputs_and_outputs(twin: IntegerResNet, pixels: torch.Tensor) -> dict[str, Any]:
    """What every module received and returned, by name."""
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
        for name, module in twin.named_modules()
    ]
    with torch.no_grad():
        twin(pixels)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["trained", "awkward"])
def test_every_sum_is_a_whole_number_that_float32_holds(bits: int, kind: str) -> None:
    model = trained(bits=bits)
    twin = integerise(awkward(model) if kind == "awkward" else model)
    seen = inputs_and_outputs(twin, torch.from_numpy(IMAGES).float())
    checked = 0
    for name, module in twin.named_modules():
        if isinstance(module, IntegerConv):
            levels, sums = seen[name]
            assert torch.equal(levels, levels.round())
            assert float(sums.abs().max()) < EXACT_LIMIT
            exact = convolve(
                levels.long().numpy(),
                module.weight_int8().astype(np.int64),
                stride=module.stride,
                padding=module.padding,
            )
            assert np.array_equal(sums.numpy(), exact)
            checked += 1
    assert checked == 1 + 8 * 2 + 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("index", [0, 2], ids=["identity shortcut", "downsample"])
@pytest.mark.parametrize("kind", ["trained", "awkward"])
def test_a_block_is_the_oracles(bits: int, index: int, kind: str) -> None:
    model = trained(bits=bits)
    model = awkward(model) if kind == "awkward" else model
    block = list(model.blocks())[index]
    twin_block = list(integerise(model).blocks())[index]
    channels = block.conv1.in_channels
    x = np.random.default_rng(0).gamma(1.0, 2.0, (4, channels, 6, 6)).astype(np.float32)
    with torch.no_grad():
        q1 = twin_block.quantise(torch.from_numpy(x))
        q2 = twin_block.conv1(q1)
        y = twin_block(torch.from_numpy(x)).double().numpy()

    alpha1, alpha2 = block.conv1.activation_alpha.item(), block.conv2.activation_alpha.item()
    top = ACTIVATION_LEVELS[bits][-1]
    oracle_q1 = nearest_level(x.astype(np.float64), alpha1, bits)
    assert np.mean(q1.numpy() == oracle_q1) > 0.999  # but for exact ties between levels
    q1_whole = q1.long().numpy()
    hidden = affine(block.conv1, block.bn1, q1_whole, alpha1 / top)
    oracle_q2 = nearest_level(hidden, alpha2, bits)
    # The bias is rounded to whole accumulator steps: only values that close to a midpoint between
    # levels may go either way.
    gain = batchnorm_affine(block.bn1)[0].abs().numpy()[:, None, None]
    step = gain * block.conv1.integer_weight()[1] * (alpha1 / top) / twin_block.conv1.multiplier
    levels = np.array(ACTIVATION_LEVELS[bits])
    middles = (levels[1:] + levels[:-1]) / 2 * (alpha2 / top)
    distance = np.abs(hidden[..., None] - middles).min(axis=-1)
    clear = distance > 0.5 * step + 1e-5 * alpha2
    assert clear.mean() > 0.9
    assert np.array_equal(q2.numpy()[clear], oracle_q2[clear])
    skip = x.astype(np.float64)
    if block.downsample is not None:
        conv, bn = block.downsample
        alpha = conv.activation_alpha.item()
        levels = nearest_level(skip, alpha, bits)
        skip = affine(conv, bn, levels, alpha / top)
    expected = np.maximum(affine(block.conv2, block.bn2, q2.long().numpy(), alpha2 / top) + skip, 0)
    assert y == pytest.approx(expected, abs=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bits", BITS)
def test_first_codes_agree_with_fake_quantisation(bits: int) -> None:
    model = trained(bits=bits)
    twin = integerise(model)
    pixels = torch.from_numpy(IMAGES).float()
    received: list[torch.Tensor] = []
    block = next(model.blocks())
    handle = block.register_forward_hook(lambda _m, inputs, _o: received.append(inputs[0]))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    alpha = block.conv1.activation_alpha.item()
    trained_codes = nearest_level(received[0].double().numpy(), alpha, bits)
    seen = inputs_and_outputs(twin, pixels)
    codes = seen["layers.0.quantise"][1].numpy()
    assert np.mean(codes == trained_codes) > 0.99
    assert len(np.unique(codes)) >= 3  # not all at one end


@pytest.mark.parametrize("bits", BITS)
def test_logits_are_close_to_those_of_training(bits: int) -> None:
    model = trained(bits=bits, steps=40)
    pixels = torch.from_numpy(split(64).images).float()
    with torch.no_grad():
        both = torch.stack([integerise(model)(pixels).flatten(), model(pixels).flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95


@pytest.mark.parametrize("bits", BITS)
def test_the_stem_convolves_whole_centred_pixels(bits: int) -> None:
    model = trained(bits=bits)
    stem = inputs_and_outputs(integerise(model), torch.from_numpy(IMAGES).float())["stem"][1]
    levels, scale = model.conv1.integer_weight(model.normalise.std_255)
    centred = IMAGES.astype(np.int64) - np.array(MEAN_255).reshape(1, 3, 1, 1)
    sums = convolve(centred, levels.astype(np.int64), stride=1, padding=1)
    gain, shift = (t.numpy()[:, None, None] for t in batchnorm_affine(model.bn1))
    expected = sums * scale * gain + shift
    assert stem.numpy() == pytest.approx(expected, abs=1e-5 * np.abs(expected).max())


# --- straight-through gradients -----------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_the_slope_of_a_quantiser(bits: int) -> None:
    table, top = LevelTable(bits), ACTIVATION_LEVELS[bits][-1]
    low, high = np.float32(-0.5), np.float32(2 * top - 0.5)
    outside = np.nextafter(low, np.float32(-9)), np.nextafter(high, np.float32(999))
    half_units = torch.tensor(
        [-3.0, outside[0], low, 0.0, 1.3, high, outside[1], 2 * top + 9.0], requires_grad=True
    )
    weights = torch.arange(1.0, 9.0)
    (table(half_units) * weights).sum().backward()
    inside = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0])
    assert half_units.grad is not None
    assert torch.equal(half_units.grad, 0.5 * inside * weights)


@pytest.mark.parametrize("bits", BITS)
def test_the_quantiser_is_the_identity_but_for_rounding(bits: int) -> None:
    """Over the clip, level * unit follows x: straight-through slope 1 in x / unit."""
    model = trained(bits=bits)
    quantise = next(integerise(model).blocks()).quantise
    x = torch.linspace(-1.0, 12.0, 3001, requires_grad=True)
    levels = quantise(x)
    levels.sum().backward()
    unit, top = float(quantise.unit), ACTIVATION_LEVELS[bits][-1]
    inside = (x.detach() > 1e-4) & (x.detach() < unit * top - 1e-4)
    outside = (x.detach() < -1e-4) | (x.detach() > unit * top + 1e-4)
    assert x.grad is not None
    assert x.grad[inside].numpy() == pytest.approx(1 / unit, rel=1e-5)
    assert not x.grad[outside].any()
    widest = max(np.diff(ACTIVATION_LEVELS[bits])) / 2
    error = (levels * unit - x).detach()[inside].abs().max()
    assert float(error) <= unit * widest * 1.001
    assert bool((levels.diff() >= 0).all())  # monotonic


@pytest.mark.parametrize("bits", BITS)
def test_pixels_receive_the_gradient_of_the_slope_formula(bits: int) -> None:
    """A twin's gradient equals that of the same network with the quantisers' slopes written out."""
    twin = integerise(trained(bits=bits))
    pixels = torch.from_numpy(IMAGES).float().requires_grad_()
    chosen = torch.randn(4, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((twin(pixels) @ chosen).sum(), pixels)
    assert float((gradient != 0).float().mean()) > 0.5
    assert bool(torch.isfinite(gradient).all())

    block = next(twin.blocks())
    x = torch.rand((2, 4, 6, 6), generator=torch.Generator().manual_seed(1)) * 6
    x.requires_grad_()
    weights = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    (actual,) = torch.autograd.grad((block.conv1(block.quantise(x)) * weights).sum(), x)
    top = 2 * block.quantise.levels.top
    with torch.no_grad():
        h1 = (x - block.quantise.quarter_unit) / block.quantise.half_unit
        h2 = block.conv1.conv(block.quantise(x)) * block.conv1.multiplier + block.conv1.bias
        h2 *= block.conv1.gain
        upstream = weights * 0.5 * ((h2 >= -0.5) & (h2 <= top - 0.5)) * block.conv1.gain
        back = nn.functional.conv_transpose2d(
            upstream * block.conv1.multiplier, block.conv1.conv.weight, padding=1
        )
        expected = back * 0.5 * ((h1 >= -0.5) & (h1 <= top - 0.5)) / block.quantise.half_unit
    assert actual.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


# --- corners ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift_in_quarters", [0.0, 1.0, 500.0, -500.0])
def test_a_channel_without_gain_is_the_constant_of_its_shift(
    bits: int, shift_in_quarters: float
) -> None:
    """Gain 0 and a shift of exactly a quarter unit leave nothing to scale: no NaN, level 0."""
    model = trained(bits=bits)
    block = next(model.blocks())
    half = np.float32(
        np.float32(block.conv2.activation_alpha.item() / block.conv2.activation_max) / np.float32(2)
    )
    quarter = float(np.float32(half / np.float32(2)))
    with torch.no_grad():
        block.bn1.weight[0] = 0.0
        block.bn1.bias[0] = shift_in_quarters * quarter
    conv1 = next(integerise(model).blocks()).conv1
    assert bool(torch.isfinite(conv1.bias).all())
    assert bool((conv1.gain > 0).all())
    assert not conv1.conv.weight[0].any()
    levels = torch.full((1, 4, 5, 5), float(block.conv1.activation_max))
    expected = nearest_level(
        np.array([block.bn1.bias[0].item()]), block.conv2.activation_alpha.item(), bits
    )
    assert np.unique(conv1(levels)[0, 0].numpy()).tolist() == expected.tolist()


def test_a_negative_gain_flips_the_integer_weights() -> None:
    model = trained(bits=3)
    before = next(integerise(model).blocks()).conv1
    block = next(model.blocks())
    with torch.no_grad():
        block.bn1.weight[1] *= -1
    after = next(integerise(model).blocks()).conv1
    assert bool((after.gain > 0).all())
    assert torch.equal(after.conv.weight[1], -before.conv.weight[1])
    assert torch.equal(after.conv.weight[0], before.conv.weight[0])


@pytest.mark.parametrize("bits", BITS)
def test_integer_weights_times_their_multiplier_fit_eight_bits(bits: int) -> None:
    twin = integerise(trained(bits=bits))
    for block in twin.blocks():
        assert float(block.conv1.conv.weight.abs().max()) * block.conv1.multiplier <= 127
        assert block.conv1.bias_int32().dtype == np.int32


def test_levels_of_a_table_never_fall() -> None:
    for levels in ACTIVATION_LEVELS.values():
        table = half_unit_table(levels).astype(int)
        assert (np.diff(table) >= 0).all()
        assert (table[0], table[-1]) == (0, levels[-1])


def test_a_float_model_has_no_integer_form() -> None:
    with pytest.raises(ValueError, match="APoT bits"):
        integerise(build_model(spec(), seed=0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_weights_are_those_trained_with_whatever_the_threads(bits: int) -> None:
    torch.manual_seed(4)
    conv = ApotConv2d(128, 128, 3, stride=1, padding=1, bits=bits)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(conv.integer_weight())
    finally:
        torch.set_num_threads(before)
    (levels, step), (others, other_step) = made
    assert np.array_equal(levels, others)
    assert step == other_step
    with torch.no_grad():
        trained = (conv.quantised_weight() / step).round().numpy()
    assert np.mean(levels != trained) < 1e-4  # a level at a threshold may fall either way
    assert len(np.unique(levels)) >= 3

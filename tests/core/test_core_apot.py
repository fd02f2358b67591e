"""APoT layers against brute force, and their gradients against the paper's formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness.models.apot import (
    ACTIVATION_LEVELS,
    MIN_ALPHA,
    WEIGHT_LEVELS,
    ApotConv2d,
    Uniform8Conv2d,
    Uniform8Linear,
    half_unit_table,
    lookup,
)

BITS = (2, 3, 4)
ALL_LEVELS = [*ACTIVATION_LEVELS.values(), *WEIGHT_LEVELS.values()]


def conv(bits: int, *, cin: int = 3, cout: int = 5, kernel: int = 3, seed: int = 0) -> ApotConv2d:
    layer = ApotConv2d(cin, cout, kernel, stride=1, padding=kernel // 2, bits=bits)
    weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.weight.copy_(weight * 0.3 + 0.1)
    return layer


def identity(bits: int, alpha: float) -> ApotConv2d:
    """A 1x1 layer from one channel to two, with quantised weights -1 and 1."""
    layer = conv(bits, cin=1, cout=2, kernel=1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
        layer.weight_alpha.fill_(1.0)  # +-1 standard deviation are the outermost levels
        layer.activation_alpha.fill_(alpha)
    return layer


def quantise(x: torch.Tensor, alpha: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(quantised activations, the clip they depend on)."""
    layer = identity(bits, alpha)
    y = layer(x.view(1, 1, 1, -1))[0, 1].flatten()
    return y, layer.activation_alpha


def nearest(x: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    grid = np.array(levels, dtype=np.float64)
    return grid[np.abs(x[:, None] - grid).argmin(axis=1)]


def not_ties(x: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    middles = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    return np.abs(x[:, None] - middles).min(axis=1) > 1e-4


def test_levels_are_those_of_additive_powers_of_two() -> None:
    # Built from the definition (Li et al. 2020, eq. 5): sums of one power of two from each set.
    def sums(*sets: tuple[float, ...]) -> list[float]:
        totals = {0.0}
        for powers in sets:
            totals = {t + p for t in totals for p in powers}
        return sorted(totals)

    assert sums((0, 1, 2, 4)) == list(ACTIVATION_LEVELS[2])
    assert sums((0, 1, 4, 2), (0,)) == list(ACTIVATION_LEVELS[2])
    assert sums((0, 2, 4, 8), (0, 1))[:4] == [0, 1, 2, 3]
    assert ACTIVATION_LEVELS == {
        2: (0, 1, 2, 4),
        3: (0, 1, 2, 3, 4, 6, 8, 10),
        4: (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48),
    }
    assert WEIGHT_LEVELS == {2: (0, 1), 3: (0, 1, 2, 4), 4: (0, 1, 2, 3, 4, 6, 8, 10)}


@pytest.mark.parametrize("bits", BITS)
def test_the_number_of_levels_fits_the_bits(bits: int) -> None:
    assert len(ACTIVATION_LEVELS[bits]) == 2**bits
    assert 2 * len(WEIGHT_LEVELS[bits]) - 1 == 2**bits - 1


@pytest.mark.parametrize("levels", ALL_LEVELS, ids=str)
def test_the_table_gives_the_nearest_level(levels: tuple[int, ...]) -> None:
    table = half_unit_table(levels)
    assert (table.dtype, table.shape) == (np.uint8, (256,))
    x = np.linspace(0, 127.999, 20_001)
    x = x[not_ties(x, levels)]
    assert np.array_equal(table[np.floor(2 * x).astype(int)], nearest(x, levels))


@pytest.mark.parametrize(
    "cells",
    [
        torch.arange(7, dtype=torch.int32),
        torch.arange(120, dtype=torch.int32).view(2, 3, 4, 5),
        torch.arange(120, dtype=torch.int32)
        .view(2, 3, 4, 5)
        .contiguous(memory_format=torch.channels_last),
        torch.arange(120, dtype=torch.int32).view(5, 4, 3, 2).permute(3, 1, 0, 2),
        torch.zeros((0, 3, 4, 5), dtype=torch.int32),
    ],
    ids=["flat", "images", "channels last", "transposed", "empty"],
)
def test_a_lookup_is_an_index_in_any_layout(cells: torch.Tensor) -> None:
    table = torch.rand(256, generator=torch.Generator().manual_seed(0))
    found = lookup(table, cells)
    assert torch.equal(found, table[cells.long()])
    if cells.ndim == 4 and cells.is_contiguous(memory_format=torch.channels_last):
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("alpha", [8.0, 0.37])
def test_activations_go_to_the_nearest_level(bits: int, alpha: float) -> None:
    levels = ACTIVATION_LEVELS[bits]
    step = alpha / levels[-1]
    units = np.linspace(-3, levels[-1] + 5, 5001)
    units = units[not_ties(units, levels)]
    y, _ = quantise(torch.from_numpy(units * step).float(), alpha, bits)
    assert y.detach().numpy() == pytest.approx(nearest(units, levels) * step, abs=alpha * 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_levels_times_one_step(bits: int) -> None:
    layer = conv(bits, cin=16, cout=16)
    levels, step = layer.integer_weight()
    assert step == pytest.approx(3.0 / WEIGHT_LEVELS[bits][-1])
    assert np.array_equal(
        layer.quantised_weight().detach().numpy(), levels.astype(np.float32) * np.float32(step)
    )
    signed = {sign * level for level in WEIGHT_LEVELS[bits] for sign in (-1, 1)}
    assert set(np.unique(levels)) <= signed
    assert len(np.unique(levels)) <= 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_normalised_then_go_to_the_nearest_level(bits: int) -> None:
    layer = conv(bits, cin=16, cout=16)
    weight = layer.weight.detach().double().numpy().flatten()
    normalised = (weight - weight.mean()) / weight.std()
    units = normalised / (3.0 / WEIGHT_LEVELS[bits][-1])
    clear = not_ties(np.abs(units), WEIGHT_LEVELS[bits])
    expected = np.sign(units) * nearest(np.abs(units), WEIGHT_LEVELS[bits])
    assert np.array_equal(layer.integer_weight()[0].flatten()[clear], expected[clear])
    assert clear.mean() > 0.99


@pytest.mark.parametrize("bits", BITS)
def test_weights_do_not_depend_on_their_scale_and_offset(bits: int) -> None:
    layer, scaled = conv(bits), conv(bits)
    with torch.no_grad():
        scaled.weight.mul_(4.0).add_(0.5)
    assert np.array_equal(layer.integer_weight()[0], scaled.integer_weight()[0])


@pytest.mark.parametrize("bits", BITS)
def test_the_layer_is_a_convolution_of_what_was_quantised(bits: int) -> None:
    layer = conv(bits)
    x = torch.rand((2, 3, 6, 6), generator=torch.Generator().manual_seed(1)) * 10
    step = 8.0 / ACTIVATION_LEVELS[bits][-1]
    units = x.flatten().double().numpy() / step
    levels = nearest(np.clip(units, 0, None), ACTIVATION_LEVELS[bits])
    quantised = torch.from_numpy(levels * step).float().view(x.shape)
    expected = F.conv2d(quantised, layer.quantised_weight(), padding=1)
    assert layer(x).detach().numpy() == pytest.approx(expected.detach().numpy(), abs=1e-4)


# --- gradients: RCF (Li et al. 2020, eq. 8) -----------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_the_activation_clip(bits: int) -> None:
    alpha, levels = 2.0, ACTIVATION_LEVELS[bits]
    for value in (0.05, 0.31, 0.77, 1.2, 1.93, 2.5, 40.0, -0.5):
        y, parameter = quantise(torch.tensor([value]), alpha, bits)
        (gradient,) = torch.autograd.grad(y.sum(), parameter)
        ratio = value / alpha
        inside = nearest(np.array([ratio * levels[-1]]), levels)[0] / levels[-1] - ratio
        # Outside it is the sign of the clipped value: 1 above, and 0 below for an unsigned clip.
        expected = inside if 0 <= ratio <= 1 else float(ratio > 1)
        assert gradient.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_activations_passes_inside_the_clip_only(bits: int) -> None:
    x = torch.tensor([-1.0, 0.3, 1.7, 2.3], requires_grad=True)
    y, _ = quantise(x, 2.0, bits)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0, 1, 1, 0], abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_the_weight_clip(bits: int) -> None:
    layer, top = conv(bits, cin=16, cout=16), WEIGHT_LEVELS[bits][-1]
    with torch.no_grad():
        layer.weight_alpha.fill_(1.1)  # about a quarter of the weights are beyond it
    quantised = layer.quantised_weight()
    chosen = torch.randn(quantised.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((quantised * chosen).sum(), layer.weight_alpha)
    weight = layer.weight.detach().double()
    ratio = (weight - weight.mean()) / weight.std(correction=0) / layer.weight_alpha.item()
    inside = torch.from_numpy(layer.integer_weight()[0]).double() / top - ratio
    per_weight = torch.where(ratio.abs() <= 1, inside, ratio.sign())
    assert 0.1 < (ratio.abs() > 1).double().mean() < 0.4
    assert gradient.item() == pytest.approx(float((per_weight * chosen).sum()), rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_weights_is_that_of_normalising_and_clipping(bits: int) -> None:
    layer = conv(bits, cin=8, cout=8)
    with torch.no_grad():
        layer.weight_alpha.fill_(1.1)
    chosen = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((layer.quantised_weight() * chosen).sum(), layer.weight)
    weight = layer.weight.detach().double().requires_grad_()
    normalised = (weight - weight.mean()) / weight.std(correction=0)
    alpha = layer.weight_alpha.item()
    (expected,) = torch.autograd.grad((normalised.clamp(-alpha, alpha) * chosen).sum(), weight)
    assert gradient.numpy() == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-5)


def test_a_clip_driven_below_zero_keeps_a_positive_step() -> None:
    layer = conv(3)
    with torch.no_grad():
        layer.weight_alpha.fill_(-5.0)
        layer.activation_alpha.fill_(-5.0)
    assert layer.integer_weight()[1] == pytest.approx(MIN_ALPHA / 4)
    assert bool(torch.isfinite(layer(torch.rand(1, 3, 4, 4))).all())


# --- first and last layer -----------------------------------------------------------------------


def test_eight_bit_weights_are_rounded_to_a_127th_of_the_largest() -> None:
    layer = Uniform8Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, -0.5, 0.004, 0.006], [0.0, 0.254, 1.0, -1.0]]))
        layer.bias.copy_(torch.tensor([1.0, -2.0]))
    levels, scale = layer.integer_weight()
    assert levels.dtype == np.int8
    assert levels.tolist() == [[127, -50, 0, 1], [0, 25, 100, -100]]
    assert scale == pytest.approx(0.01)
    out = layer(torch.ones(1, 4)).detach()
    assert out[0].tolist() == pytest.approx([0.78 + 1, 0.25 - 2], abs=1e-6)


def test_the_first_layer_quantises_weights_divided_by_std() -> None:
    layer = Uniform8Conv2d(3, 4, 3, padding=1, bias=False)
    std = torch.tensor([60.0, 30.0, 90.0]).view(1, 3, 1, 1)
    levels, scale = layer.integer_weight(std)
    divided = (layer.weight / std).detach().double().numpy()
    assert scale == pytest.approx(np.abs(divided).max() / 127, rel=1e-6)
    assert np.abs(levels).max() == 127
    assert np.abs(levels * scale - divided).max() <= scale * 0.5001
    pixels = torch.randint(-120, 130, (2, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    whole = F.conv2d(pixels.double(), torch.from_numpy(levels).double(), padding=1)
    actual = layer.over_integers(pixels.float(), std).detach().numpy()
    assert actual == pytest.approx((whole * scale).numpy(), abs=1e-4)


def test_eight_bit_weights_pass_their_gradient() -> None:
    layer = Uniform8Linear(4, 2)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert gradient.numpy() == pytest.approx(x.expand(2, 4).numpy(), rel=1e-6)

"""APoT layers (Li, Dong and Wang 2019): additive powers-of-two levels with learned clipping.

Every level is a whole multiple of one step, so a layer is (integer weights) * (integer
activations) * (one scale). That is what makes an exact integer deployment possible; these layers
are the trainable, fake-quantised form of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models import kernels

ACTIVATION_LEVELS: dict[int, tuple[int, ...]] = {
    2: (0, 1, 2, 4),
    3: (0, 1, 2, 3, 4, 6, 8, 10),
    4: (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48),
}
"""Unsigned levels in units of the step alpha / max(levels)."""
WEIGHT_LEVELS: dict[int, tuple[int, ...]] = {
    2: (0, 1),
    3: (0, 1, 2, 4),
    4: (0, 1, 2, 3, 4, 6, 8, 10),
}
"""Magnitudes; one bit of the weight is its sign."""
WEIGHT_ALPHA_INIT = 3.0
"""Clip of the normalised weights, in standard deviations (the authors' initial value)."""
ACTIVATION_ALPHA_INIT = 8.0
MIN_ALPHA = 1e-2
"""A clip that training drove to zero or below would make the scale meaningless."""


def half_unit_table(levels: tuple[int, ...]) -> np.ndarray:
    """uint8 [256]: the level nearest to each half-unit cell.

    All midpoints between levels are multiples of half a unit, so the quantiser is: count half
    units, look the level up. Cell c covers x / unit in [c/2, (c+1)/2).
    """
    midpoints = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    cells = np.arange(256) / 2 + 0.25
    return np.array(levels, dtype=np.uint8)[np.searchsorted(midpoints, cells)]


def lookup(table: Tensor, cells: Tensor) -> Tensor:
    """table[cells] for int32 cells of any shape, in their memory format.

    `index_select` on flat indices is several times faster than indexing, and quantisers spend
    most of their time here.
    """
    if cells.ndim == 4 and cells.is_contiguous(memory_format=torch.channels_last):
        flat = cells.permute(0, 2, 3, 1)
        found = table.index_select(0, flat.reshape(-1)).view(flat.shape)
        return found.permute(0, 3, 1, 2)
    return table.index_select(0, cells.reshape(-1)).view(cells.shape)


def _cells(levels: tuple[int, ...]) -> tuple[int, ...]:
    """Level of every half-unit cell up to the largest level."""
    return tuple(int(level) for level in half_unit_table(levels)[: 2 * levels[-1] + 1])


class _Project(torch.autograd.Function):
    """q = nearest level of u (u clipped to [0, max] by the caller); gradient passes through."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, table: Tensor) -> Tensor:  # noqa: ARG004
        cells = (units * 2).to(torch.int32).clamp_(0, table.numel() - 1)
        return lookup(table, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _ProjectAndScale(torch.autograd.Function):
    """A step times the level nearest to clip(x / step, low, top), in one kernel each way.

    With the gradients of the operations that it stands for: of x through the clip alone, of the
    step what they add up to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, table: tuple[int, ...], low: int, top: int
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.table, ctx.low, ctx.top = table, low, top
        return kernels.projected(x, step, table, low=low, top=top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, step = ctx.saved_tensors
        of_x, of_step = kernels.projected_gradients(
            grads[0], x, step, ctx.table, low=ctx.low, top=ctx.top
        )
        return of_x, of_step.sum(), None, None, None


class ApotConv2d(nn.Conv2d):
    """Convolution over APoT activations with APoT weights; each has its own learned clip.

    Reparameterised clipping (RCF): quantised(x) = alpha * Q(clip(x / alpha)), so the gradient
    with respect to alpha is sign(x) outside the clip and Q(x/alpha) - x/alpha inside it.
    Weights are normalised per tensor, (w - mean) / std, before they are quantised.
    """

    activation_table: Tensor
    weight_table: Tensor

    def __init__(
        self, cin: int, cout: int, kernel: int, *, stride: int, padding: int, bits: int
    ) -> None:
        super().__init__(cin, cout, kernel, stride=stride, padding=padding, bias=False)
        self.bits = bits
        self.activation_max = ACTIVATION_LEVELS[bits][-1]
        self.weight_max = WEIGHT_LEVELS[bits][-1]
        self.activation_alpha = nn.Parameter(torch.tensor(ACTIVATION_ALPHA_INIT))
        self.weight_alpha = nn.Parameter(torch.tensor(WEIGHT_ALPHA_INIT))
        self._activation_cells = _cells(ACTIVATION_LEVELS[bits])
        self._weight_cells = _cells(WEIGHT_LEVELS[bits])
        for name, cells in (
            ("activation_table", self._activation_cells),
            ("weight_table", self._weight_cells),
        ):
            self.register_buffer(name, torch.tensor(cells, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.activation_alpha.clamp(min=MIN_ALPHA)
        step = alpha / self.activation_max
        if kernels.usable(x):
            quantised: Tensor = _ProjectAndScale.apply(  # type: ignore[no-untyped-call]
                x, step, self._activation_cells, 0, self.activation_max
            )
            return F.conv2d(quantised, self.quantised_weight(), None, self.stride, self.padding)
        units = (x / step).clamp(0, self.activation_max)
        # clamp() has no gradient for alpha beyond the clip; multiplying by step restores it.
        levels = _Project.apply(units, self.activation_table)  # type: ignore[no-untyped-call]
        return F.conv2d(levels * step, self.quantised_weight(), None, self.stride, self.padding)

    def quantised_weight(self) -> Tensor:
        """Weights as alpha * Q(clip(normalised weight / alpha)), differentiable."""
        if kernels.usable(self.weight):
            normalised, step = self._normalised_weight()
            quantised: Tensor = _ProjectAndScale.apply(  # type: ignore[no-untyped-call]
                normalised, step, self._weight_cells, -self.weight_max, self.weight_max
            )
            return quantised
        levels, step = self._weight_levels()
        return levels * step

    def integer_weight(self) -> tuple[np.ndarray, float]:
        """(int8 levels [O, I, k, k], step): the weight is levels * step, exactly."""
        # In float64, by numpy: PyTorch's float32 sums depend on the number of threads, and a level
        # at a threshold with them. One checkpoint is one network wherever it is made into one.
        weight = self.weight.detach().cpu().double().numpy()
        step = float(self.weight_alpha.detach().clamp(min=MIN_ALPHA) / self.weight_max)
        units = (weight - weight.mean()) / weight.std() / step
        cells = np.minimum(2 * np.abs(units), 2 * self.weight_max).astype(np.int64)
        magnitudes = np.array(self._weight_cells)[cells]
        return (magnitudes * np.sign(units)).astype(np.int8), step

    def _normalised_weight(self) -> tuple[Tensor, Tensor]:
        # Population std: one definition for the twin and for training.
        normalised = (self.weight - self.weight.mean()) / self.weight.std(correction=0)
        return normalised, self.weight_alpha.clamp(min=MIN_ALPHA) / self.weight_max

    def _weight_levels(self) -> tuple[Tensor, Tensor]:
        normalised, step = self._normalised_weight()
        units = (normalised / step).clamp(-self.weight_max, self.weight_max)
        levels: Tensor = _Project.apply(units.abs(), self.weight_table)  # type: ignore[no-untyped-call]
        return levels * torch.sign(units).detach(), step


class Uniform8Conv2d(nn.Conv2d):
    """First layer: 8-bit uniform weights (absmax per tensor) over whole pixel values."""

    def over_integers(self, centred: Tensor, std_255: Tensor) -> Tensor:
        """Convolve (pixels - mean), quantising weight / std. `centred` [N, C, H, W]."""
        levels, scale = _uniform8(self.weight / std_255)
        return F.conv2d(centred, levels * scale, None, self.stride, self.padding)

    def integer_weight(self, std_255: Tensor) -> tuple[np.ndarray, float]:
        """(int8 levels, scale) of weight / std."""
        with torch.no_grad():
            levels, scale = _uniform8(self.weight / std_255)
        return levels.cpu().numpy().astype(np.int8), float(scale)


class Uniform8Linear(nn.Linear):
    """Last layer: 8-bit uniform weights (absmax per tensor), float activations and bias."""

    def forward(self, x: Tensor) -> Tensor:
        levels, scale = _uniform8(self.weight)
        return F.linear(x, levels * scale, self.bias)

    def integer_weight(self) -> tuple[np.ndarray, float]:
        """(int8 levels [classes, features], scale)."""
        with torch.no_grad():
            levels, scale = _uniform8(self.weight)
        return levels.cpu().numpy().astype(np.int8), float(scale)


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes through (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0]


def round_through(x: Tensor) -> Tensor:
    """Round half to even, with the straight-through gradient."""
    rounded: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def _uniform8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.detach().abs().max().clamp(min=1e-12) / 127
    return round_through(weight / scale), scale

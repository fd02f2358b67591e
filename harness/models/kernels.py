"""Chains of elementwise operations as one GPU kernel each, where PyTorch has a kernel an operation.

A quantiser is a dozen operations and its gradient as many, each a pass over the activations: on a
GPU those passes, not the convolutions, are most of an APoT network's time. PyTorch's jiterator
compiles a chain, written here in CUDA C++, when it is first used. The values are those of the
operations, bit for bit: nothing here may be contracted to a fused multiply-add that rounds once
where the operations round twice.

Enters: float tensors on an NVIDIA GPU; everything else uses PyTorch's operations. Leaves: a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

SMALLEST = 2**18
"""Elements below which a GPU is not short of memory bandwidth; compiling a kernel takes a second or
two, once a machine."""
_Kernel = Callable[..., Tensor]
_HEAD = "template <typename T> "


def usable(x: Tensor) -> bool:
    """Whether these kernels run where `x` is, and pay for being compiled."""
    return (
        x.is_cuda
        and x.numel() >= SMALLEST
        and torch.version.cuda is not None
        and hasattr(torch.cuda, "jiterator")
    )


def add_where_positive(one: Tensor, other: Tensor, y: Tensor) -> Tensor:
    """(one + other) where y > 0, else 0: the gradient of a sum behind a ReLU."""
    return _add_where_positive()(one, other, y)


def quantised(x: Tensor, quarter: Tensor, half: Tensor, table: tuple[int, ...]) -> Tensor:
    """table[clip(round((x - quarter) / half), 0, 255)] as float; units are 0-dim tensors."""
    return _quantised(table)(x, quarter, half)


def quantised_gradient(
    gradient: Tensor, x: Tensor, quarter: Tensor, half: Tensor, *, top: int
) -> Tensor:
    """Straight-through: half a level a half unit inside the clip."""
    return _quantised_gradient(top)(gradient, x, quarter, half)


def requantised(
    sums: Tensor, bias: Tensor, gain: Tensor, table: tuple[int, ...], *, multiplier: int
) -> Tensor:
    """table[clip(round((multiplier * round(sums) + bias) * gain), 0, 255)] as float.

    `bias` and `gain` [1, C, 1, 1].
    """
    return _requantised(table, multiplier)(sums, bias, gain)


def requantised_gradient(
    gradient: Tensor, sums: Tensor, bias: Tensor, gain: Tensor, *, top: int, multiplier: int
) -> Tensor:
    """As `quantised_gradient`, times what the sums are multiplied by."""
    return _requantised_gradient(top, multiplier)(gradient, sums, bias, gain)


def rescaled(sums: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """round(sums) * scale + shift, each rounded; `scale` and `shift` [1, C, 1, 1]."""
    return _rescaled()(sums, scale, shift)


def projected(x: Tensor, step: Tensor, table: tuple[int, ...], *, low: int, top: int) -> Tensor:
    """The step times sign(u) table[floor(2 |u|)] for u = clip(x / step, low, top)."""
    return _projected(table, low, top)(x, step)


def projected_gradients(
    gradient: Tensor, x: Tensor, step: Tensor, table: tuple[int, ...], *, low: int, top: int
) -> tuple[Tensor, Tensor]:
    """(of x, each element's part in that of step), straight-through inside the clip."""
    of_x, of_step = _projected_gradients(table, low, top)(gradient, x, step)
    return of_x, of_step


@cache
def _add_where_positive() -> _Kernel:
    return _compiled("T add_where_positive(T a, T b, T y) { return y > T(0) ? a + b : T(0); }")


@cache
def _quantised(table: tuple[int, ...]) -> _Kernel:
    return _compiled(
        "T quantised(T x, T quarter, T half) { return level<T>(code<T>((x - quarter) / half)); }",
        _code() + _level(table),
    )


@cache
def _quantised_gradient(top: int) -> _Kernel:
    return _compiled(
        "T quantised_gradient(T g, T x, T quarter, T half) {"
        " return inside<T>((x - quarter) / half) ? g * T(0.5) / half : T(0); }",
        _inside(top),
    )


@cache
def _requantised(table: tuple[int, ...], multiplier: int) -> _Kernel:
    # The multiplier is a power of two: its product is exact, and the addition rounds once, fused or
    # not.
    return _compiled(
        "T requantised(T sum, T bias, T gain) {"
        f" return level<T>(code<T>((bias + T({multiplier}) * rint(sum)) * gain)); }}",
        _code() + _level(table),
    )


@cache
def _requantised_gradient(top: int, multiplier: int) -> _Kernel:
    return _compiled(
        "T requantised_gradient(T g, T sum, T bias, T gain) {"
        f" return inside<T>((bias + T({multiplier}) * rint(sum)) * gain)"
        f" ? g * T(0.5) * gain * T({multiplier}) : T(0); }}",
        _inside(top),
    )


@cache
def _rescaled() -> _Kernel:
    return _compiled(
        "T rescaled(T sum, T scale, T shift) {"
        " return __fadd_rn(__fmul_rn(rint(sum), scale), shift); }"
    )


@cache
def _projected(table: tuple[int, ...], low: int, top: int) -> _Kernel:
    return _compiled(
        "T projected(T x, T step) { return nearest<T>(clipped<T>(x / step)) * step; }",
        _level(table) + _nearest(low, top),
    )


@cache
def _projected_gradients(
    table: tuple[int, ...], low: int, top: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    code = (
        _level(table)
        + _nearest(low, top)
        + _HEAD
        + "void projected_gradients(T g, T x, T step, T& of_x, T& of_step) {"
        f" T u = x / step; bool in = u >= T({low}) && u <= T({top});"
        " of_x = in ? g : T(0); of_step = g * (nearest<T>(clipped<T>(u)) - (in ? u : T(0))); }"
    )
    make = torch.cuda.jiterator._create_multi_output_jit_fn  # noqa: SLF001
    made: Callable[..., tuple[Tensor, Tensor]] = make(code, num_outputs=2)
    return made


def _compiled(kernel: str, helpers: str = "") -> _Kernel:
    make = torch.cuda.jiterator._create_jit_fn  # noqa: SLF001
    made: _Kernel = make(helpers + _HEAD + kernel)
    return made


def _level(table: tuple[int, ...]) -> str:
    """Level of a whole non-negative code, as a sum of the table's steps."""
    steps = [
        f"(c >= T({code}) ? T({after - before}) : T(0))"
        for code, (before, after) in enumerate(pairwise(table), start=1)
        if after != before
    ]
    return _HEAD + f"T level(T c) {{ return {' + '.join([f'T({table[0]})', *steps])}; }} "


def _code() -> str:
    return _HEAD + (
        "T code(T h) { T c = rint(h); return c < T(0) ? T(0) : c > T(255) ? T(255) : c; } "
    )


def _inside(top: int) -> str:
    return _HEAD + f"bool inside(T h) {{ return h >= T(-0.5) && h <= T({2 * top - 0.5}); }} "


def _nearest(low: int, top: int) -> str:
    return (
        _HEAD
        + f"T clipped(T u) {{ return u < T({low}) ? T({low}) : u > T({top}) ? T({top}) : u; }} "
        + _HEAD
        + "T nearest(T u) { T c = floor((u < T(0) ? -u : u) * T(2));"
        " return u < T(0) ? -level<T>(c) : level<T>(c); } "
    )

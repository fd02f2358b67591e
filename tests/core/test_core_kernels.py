"""The GPU's elementwise kernels, compiled for the CPU: the same values as PyTorch's operations.

Their CUDA C++ is plain C++ but for two intrinsics. What only a GPU shows, tests/gpu asks there.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.models import kernels
from harness.models.apot import ApotConv2d
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, build_model

HEAD = """
#include <cmath>
using std::rint; using std::floor;
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
"""
CACHED = (
    kernels._add_where_positive,
    kernels._quantised,
    kernels._quantised_gradient,
    kernels._requantised,
    kernels._requantised_gradient,
    kernels._rescaled,
    kernels._projected,
    kernels._projected_gradients,
)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="no g++ here to compile the kernels with: apt-get install g++",
)


def on_cpu(folder: Path) -> Callable[..., Callable[..., object]]:
    """In place of the jiterator's two functions."""

    def create(code: str, num_outputs: int = 1) -> Callable[..., object]:
        entry = code.rpartition("template <typename T> ")[2]
        signature = entry.split(")")[0]
        name, inputs = signature.split("(")[0].split()[-1], signature.split("(")[1].count("T ")
        taken = ", ".join(f"const float* in{i}" for i in range(inputs))
        given = ", ".join(f"in{i}[k]" for i in range(inputs))
        outs = [f"out{i}" for i in range(num_outputs)]
        call = (
            f"out0[k] = {name}<float>({given});"
            if num_outputs == 1
            else f"{name}<float>({given}, {', '.join(f'{out}[k]' for out in outs)});"
        )
        source = f'{HEAD}{code}\nextern "C" void run(long n, {taken}, ' + (
            ", ".join(f"float* {out}" for out in outs)
            + f") {{ for (long k = 0; k < n; ++k) {{ {call} }} }}"
        )
        stem = folder / f"{name}{len(list(folder.iterdir()))}"
        stem.with_suffix(".cpp").write_text(source)
        subprocess.run(
            ["g++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", f"{stem}.so",
             f"{stem}.cpp"],
            check=True,
        )  # fmt: skip
        run = ctypes.CDLL(f"{stem}.so").run

        def kernel(*tensors: Tensor) -> object:
            spread = [t.contiguous() for t in torch.broadcast_tensors(*tensors)]
            made = [torch.full_like(spread[0], np.nan) for _ in outs]
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*spread, *made)]
            run(ctypes.c_long(spread[0].numel()), *pointers)
            return made[0] if num_outputs == 1 else tuple(made)

        return kernel

    return create


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From here on the kernels are usable, and used, on the CPU."""
    create = on_cpu(tmp_path)
    monkeypatch.setattr(torch.cuda.jiterator, "_create_jit_fn", create)
    monkeypatch.setattr(torch.cuda.jiterator, "_create_multi_output_jit_fn", create)
    monkeypatch.setattr(kernels, "usable", lambda _x: True)
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


def with_gradient(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = network(leaf)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, generator=generator)
    return out.detach(), torch.autograd.grad((out * weight).sum(), leaf)[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_network_through_kernels_is_the_same_bit_for_bit(
    bits: int, request: pytest.FixtureRequest
) -> None:
    spec = ModelSpec("resnet20", 8, 3, 10, (125, 122, 113), (63.0, 62.1, 66.7), bits=bits)
    model = build_model(spec, seed=0).eval()
    for module in model.modules():
        if isinstance(module, ApotConv2d):  # untrained clips leave 2 bits no signal
            nn.init.constant_(module.activation_alpha, 2.0)
            nn.init.constant_(module.weight_alpha, 1.5)
    network = integerise(model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=generator).float()
    expected, expected_gradient = with_gradient(network, pixels)
    request.getfixturevalue("compiled")
    logits, gradient = with_gradient(network, pixels)
    assert torch.equal(logits, expected)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fake_quantised_convolution_through_kernels_has_the_same_gradients(
    bits: int, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(2)
    conv = ApotConv2d(8, 16, 3, stride=1, padding=1, bits=bits)
    x = 12 * torch.rand(4, 8, 10, 10) - 1  # below, inside and above the clip
    parameters = [conv.weight, conv.activation_alpha, conv.weight_alpha]

    def everything() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = conv(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), [leaf, *parameters])]

    expected = everything()
    request.getfixturevalue("compiled")
    for one, other in zip(everything(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_sum_behind_a_relu(compiled: None) -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.5])
    y = torch.tensor([1.0, 0.0, 0.1])
    assert kernels.add_where_positive(one, other, y).tolist() == [1.5, 0.0, 3.5]


def test_not_used_on_a_cpu() -> None:
    assert not kernels.usable(torch.zeros(1))

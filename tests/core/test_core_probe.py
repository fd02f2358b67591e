"""The probe of gradients, where the answer can be written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from core_cases import CLASSES, CPU, split
from torch import Tensor, nn

from harness.crafting.probe import probe_gradients


class Linear(nn.Module):
    """logits = W x: what a gradient promises is exactly what happens, at any distance."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight = torch.from_numpy(rng.normal(0, 0.002, (CLASSES, 192)).astype(np.float32))
        self.weight[2:] = -0.01  # never the largest: the margin has no kink

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weight.T


def probe(model: nn.Module, **changes: Any) -> Any:
    values = {"eps": 10.0, "beta": 8.0, "seed": 0, "device": CPU} | changes
    return probe_gradients(model, split(40), **values)


def test_a_linear_network_does_what_its_gradient_promises() -> None:
    found = probe(Linear(), beta=1e9)
    assert found.images == 40
    assert found.zero_gradient == found.saturated == 0
    assert found.reach_255 == 5.0
    assert np.allclose(found.own_promised, found.own_measured, rtol=1e-2)
    promised, measured = np.array(found.random_promised), np.array(found.random_measured)
    assert promised.shape == (40, 8)
    two_classes = np.isin(split(40).labels[: len(promised)], (0, 1))
    assert two_classes.any()
    assert np.corrcoef(promised.ravel(), measured.ravel())[0, 1] > 0.99


def test_a_sample_beyond_the_clamp_has_no_gradient() -> None:
    found = probe(Linear(), beta=1e-6)
    assert found.saturated == found.zero_gradient > 0


def test_a_constant_network_has_none_at_all() -> None:
    class Constant(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.eye(CLASSES)[0].expand(len(pixels), -1) + 0 * pixels.flatten(1)[:, :1]

    found = probe(Constant())
    assert found.zero_gradient == 40
    assert not np.any(found.own_promised)
    assert probe(Constant()) == found  # the same seed, the same numbers

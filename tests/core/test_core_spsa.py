"""The gradient-free search and the probe of gradients, where the answer can be written down."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import CLASSES, CPU, IMAGE_SHAPE, split, trained
from torch import Tensor, nn

from harness.artefacts import read_partial
from harness.crafting import together
from harness.crafting.perturbation import random_sign, to_levels
from harness.crafting.probe import probe_gradients
from harness.crafting.spsa import Searched, SpsaSettings, craft_spsa, margin
from harness.crafting.together import Job, Request
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise

SETTINGS = SpsaSettings(epochs=6, pairs=16)
LARGE = Request(40.0)


class ForwardOnly(nn.Module):
    """Refuses to be differentiated, and counts the images it sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.images = 0

    def forward(self, pixels: Tensor) -> Tensor:
        assert not pixels.requires_grad
        assert not torch.is_grad_enabled()
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 255
        self.images += len(pixels)
        logits: Tensor = self.model(pixels)
        return logits


def search(
    model: nn.Module,
    partial: Path,
    request: Request = LARGE,
    **changes: Any,
) -> Searched:
    values: dict[str, Any] = {
        "settings": SETTINGS, "seed": 3, "key": "mine", "progress": lambda _n: None, **changes,
    }  # fmt: skip
    return craft_spsa(
        model,
        split(64),
        Job(request, values["seed"]),
        values["settings"],
        key=values["key"],
        partial=partial,
        device=CPU,
        progress=values["progress"],
    )


def uer(model: nn.Module, delta: np.ndarray | None, eps: float = 40.0) -> float:
    images = split(120, seed=8)
    levels = None if delta is None else to_levels(delta, eps=eps)
    return float((predict(model, images.images, levels, device=CPU) != images.labels).mean())


@pytest.mark.parametrize("bits", [None, 4])
def test_the_search_beats_random_signs_with_forward_passes_only(
    bits: int | None, tmp_path: Path
) -> None:
    model = (fold if bits is None else integerise)(trained(bits=bits, steps=40))
    asked = ForwardOnly(model)
    found = search(asked, tmp_path / "p.pt", settings=replace(SETTINGS, epochs=12))
    assert asked.images == found.forwards == 2 * 12 * 64
    assert np.abs(found.delta_255).max() <= 40.0
    controls = [uer(model, random_sign(IMAGE_SHAPE, eps=40.0, seed=s)) for s in range(5)]
    assert uer(model, found.delta_255) > max(controls) + 0.2
    assert found.objective[-1] > found.objective[0]


@pytest.mark.parametrize("pairs", [16, 48, 500])
def test_a_set_smaller_than_a_step_costs_no_queries(tmp_path: Path, pairs: int) -> None:
    """64 images: a step asks about each at most once, and there are as many steps more."""
    model = ForwardOnly(fold(trained()))
    found = search(model, tmp_path / "p.pt", settings=replace(SETTINGS, pairs=pairs))
    a_step = min(pairs, 64)
    assert model.images == found.forwards == 2 * a_step * (6 * 64 // a_step)


def test_a_target_is_searched_for_too(tmp_path: Path) -> None:
    model = fold(trained(steps=40))
    found = search(
        model, tmp_path / "p.pt", Request(40.0, 1), settings=replace(SETTINGS, epochs=12)
    )
    images = split(120, seed=8)
    attacked, clean = (
        predict(model, images.images, levels, device=CPU)
        for levels in (to_levels(found.delta_255, eps=40.0), None)
    )
    assert np.mean(attacked == 1) > np.mean(clean == 1) + 0.2


def test_no_scale_of_the_logits_changes_what_is_found(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.model, self.by = fold(trained()), by

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixels) * self.by  # a power of two: exact

    one, other = (search(Scaled(by), tmp_path / f"{by}.pt") for by in (1.0, 2.0**20))
    assert np.array_equal(one.delta_255, other.delta_255)


def test_the_budget_is_whole_levels(tmp_path: Path) -> None:
    found = search(fold(trained()), tmp_path / "p.pt", Request(3.7))
    assert np.abs(found.delta_255).max() == 3.0


def test_a_killed_search_continues_to_the_very_same_perturbation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "SAVE_INTERVAL_SECONDS", -1.0)
    model, partial = fold(trained()), tmp_path / "partial.pt"
    expected = search(model, tmp_path / "whole.pt")
    left = itertools.count()

    def dies(_n: int) -> None:
        if next(left) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, partial, progress=dies)
    saved = read_partial(partial, key="mine")
    assert saved is not None
    assert saved["step"] == 9
    counts: list[int] = []
    resumed = search(model, partial, progress=counts.append)
    assert sum(counts) == 6 * 64 - 9 * 16
    assert np.array_equal(resumed.delta_255, expected.delta_255)
    assert resumed.objective == pytest.approx(expected.objective)
    assert not np.array_equal(search(model, partial, seed=4).delta_255, expected.delta_255)


def test_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert margin(logits, torch.tensor([1, 0])).tolist() == [-2.0, 3.0]


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

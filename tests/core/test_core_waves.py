"""The gradient-free search over plane waves, where the answer can be written down."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import CLASSES, CPU, IMAGE_SHAPE, split, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness import unfinished
from harness.artefacts import read_partial
from harness.crafting.arithmetic import margin
from harness.crafting.momentum import MomentumSettings
from harness.crafting.perturbation import chessboard, random_sign, to_levels
from harness.crafting.together import Job, Request, craft_together, planned_steps
from harness.crafting.waves import (
    FourierSettings,
    Searched,
    Wave,
    craft_fourier,
    find_wave,
    frequencies,
    rounds,
)
from harness.data.splits import Split
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.records import TimeLimitReached


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


class AfraidOf(nn.Module):
    """Right about everything until an image holds this pattern, of either sign."""

    def __init__(self, signs: np.ndarray, labels: Split, *, then: int | None = None) -> None:
        super().__init__()
        self.then = then  # the class it sees instead
        self.pattern = torch.from_numpy(signs.copy())
        self.known = torch.from_numpy(labels.images).flatten(1).float()
        self.labels = torch.from_numpy(labels.labels)

    def forward(self, pixels: Tensor) -> Tensor:
        clean = torch.cdist(pixels.flatten(1), self.known).argmin(dim=1)
        change = pixels - self.known[clean].view_as(pixels)
        felt = (change * self.pattern).mean(dim=(1, 2, 3)).abs() / (
            change.abs().mean(dim=(1, 2, 3)) + 1e-6
        )
        right = nn.functional.one_hot(self.labels[clean], CLASSES).float()
        if self.then is not None:
            right[:, self.then] += 2 * felt
        return right * (1 - 1.5 * felt * (self.then is None))[:, None]


def search(
    model: nn.Module, partial: Path, *, eps: float = 40.0, passes: int = 600, **changes: Any
) -> Searched:
    values = {"target": None, "seed": 3, "key": "mine", "progress": lambda _n: None, **changes}
    images = values.pop("split", split(64))
    return craft_fourier(
        [model],
        images,
        eps=eps,
        settings=FourierSettings(passes),
        partial=partial,
        device=CPU,
        **values,
    )


def uer(model: nn.Module, delta: np.ndarray | None, eps: float = 40.0) -> float:
    images = split(120, seed=8)
    levels = None if delta is None else to_levels(delta, eps=eps)
    return float((predict(model, images.images, levels, device=CPU) != images.labels).mean())


# --- the family ----------------------------------------------------------------------------------


def test_waves_by_hand() -> None:
    stripes = Wave(across=4, down=0, phase=1 / 3, sign=1).signs((3, 8, 8))
    assert stripes.dtype == np.float32
    assert np.array_equal(stripes[0, 0], [1, -1, 1, -1, 1, -1, 1, -1])
    assert all(np.array_equal(stripes[0, 0], row) for channel in stripes for row in channel)
    slow = Wave(across=0, down=1, phase=1 / 3, sign=-1).signs((1, 8, 8))[0]
    assert np.array_equal(slow[:, 0], [-1, -1, 1, 1, 1, 1, -1, -1])
    everywhere = Wave(across=0, down=0, phase=1 / 3, sign=-1).signs((1, 4, 4))
    assert np.array_equal(everywhere, -np.ones((1, 4, 4)))


def test_the_highest_frequency_both_ways_is_the_chessboard() -> None:
    wave = Wave(across=4, down=4, phase=1 / 3, sign=-1).signs(IMAGE_SHAPE)
    assert np.array_equal(wave, chessboard(IMAGE_SHAPE, eps=1.0))


def test_frequencies_by_hand() -> None:
    assert frequencies((3, 2, 4)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    found = frequencies((3, 32, 32))
    octaves = [0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert {across for across, _ in found} == set(octaves)
    assert {abs(down) for _, down in found} == set(octaves)
    assert len(found) == 9 * 9 + 7 * 7  # the inner ones lean both ways


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 12, 7), (3, 32, 32), (1, 1, 5)])
def test_no_two_frequencies_are_one_and_none_has_a_zero(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    seen = set()
    for across, down in frequencies(shape):
        assert across <= width // 2
        assert abs(down) <= height // 2
        for phase in (1 / 3, 1 / 3 + math.pi / 2):
            turns = np.add.outer(
                down * np.arange(height) / height, across * np.arange(width) / width
            )
            assert np.abs(np.cos(2 * np.pi * turns + phase)).min() > 1e-3
        signs = Wave(across, down, 1 / 3, 1).signs((1, height, width))[0]
        seen.add(
            min(  # whatever its sign
                signs.tobytes(), (-signs).tobytes()
            )
        )
    assert len(seen) == len(frequencies(shape))


@given(st.integers(1, 400), st.integers(1, 40_000), st.integers(1, 5_000))
def test_the_plan_halves_and_keeps_to_its_passes(count: int, passes: int, n: int) -> None:
    plan = rounds(count, passes, n)
    left = [a for a, _ in plan]
    assert all(b == -(-a // 2) for a, b in itertools.pairwise(left))
    assert all(1 <= k <= n for _, k in plan)
    assert sum(a * k for a, k in plan) <= passes
    if plan:
        assert left[0] <= count
        assert left[-1] == 2
    if passes >= 2 * count * 10:  # enough for two images of each in each of ten rounds
        assert left[:1] == ([count] if count > 1 else [])


# --- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("feared", [(3, 0), (1, 4), (2, -1), (4, 4)])
def test_the_wave_a_network_fears_is_found(feared: tuple[int, int], tmp_path: Path) -> None:
    images = split(24)
    wave = Wave(*feared, 1 / 3, 1)
    model = AfraidOf(wave.signs(IMAGE_SHAPE), images)
    found = search(model, tmp_path / "p.pt", eps=4.0, passes=4_000, split=images)
    assert (found.found.wave.across, found.found.wave.down) == feared
    # Either phase of the highest frequencies is the same wave, of either sign.
    assert np.abs((found.delta_255 * wave.signs(IMAGE_SHAPE)).mean()) == 4.0
    assert found.found.success == 1.0


@pytest.mark.parametrize("bits", [None, 4])
def test_it_beats_random_signs_with_forward_passes_only(bits: int | None, tmp_path: Path) -> None:
    model = (fold if bits is None else integerise)(trained(bits=bits, steps=40))
    asked, told = ForwardOnly(model), list[int]()
    found = search(asked, tmp_path / "p.pt", progress=told.append)
    assert asked.images == found.found.forwards == sum(told) <= 600
    assert set(np.abs(found.delta_255).ravel()) == {40.0}
    controls = [uer(model, random_sign(IMAGE_SHAPE, eps=40.0, seed=s)) for s in range(5)]
    assert uer(model, found.delta_255) > max(controls) + 0.1


@pytest.mark.parametrize("passes", [1, 2, 7, 40, 10**9])
def test_any_number_of_passes_will_do(passes: int, tmp_path: Path) -> None:
    model = ForwardOnly(fold(trained()))
    found = search(model, tmp_path / "p.pt", passes=passes, split=split(8))
    assert found.found.forwards == model.images
    assert model.images <= max(passes, 4)
    # With passes to spare every image is asked about, not one of them twice in a round.
    assert model.images <= 8 * (41 * 2 + 8)


def test_a_target_is_searched_for_too(tmp_path: Path) -> None:
    images, wave = split(24), Wave(3, 1, 1 / 3, 1)
    model = AfraidOf(wave.signs(IMAGE_SHAPE), images, then=1)
    found = search(model, tmp_path / "p.pt", target=1, eps=4.0, passes=4_000, split=images)
    predicted, clean = (
        predict(model, images.images, levels, device=CPU)
        for levels in (to_levels(found.delta_255, eps=4.0), None)
    )
    assert np.mean(predicted == 1) == pytest.approx(found.found.success)
    assert np.mean(predicted == 1) > np.mean(clean == 1) + 0.3


def test_no_scale_of_the_logits_changes_what_is_found(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.model, self.by = fold(trained()), by

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixels) * self.by  # a power of two: exact

    one, other = (search(Scaled(by), tmp_path / f"{by}.pt") for by in (1.0, 2.0**20))
    assert one.found == other.found


def test_the_budget_is_whole_levels(tmp_path: Path) -> None:
    found = search(fold(trained()), tmp_path / "p.pt", eps=3.7)
    assert np.abs(found.delta_255).max() == 3.0


def test_several_networks_are_asked_alike(tmp_path: Path) -> None:
    images = split(48)
    first, second = (
        AfraidOf(Wave(across, 0, 1 / 3, 1).signs(IMAGE_SHAPE), images) for across in (1, 3)
    )

    def forwards(models: list[nn.Module]) -> tuple[Wave, list[int]]:
        asked = [ForwardOnly(model) for model in models]
        found = find_wave(
            asked,
            torch.from_numpy(images.images),
            torch.from_numpy(images.labels),
            eps=4.0,
            targeted=False,
            seed=0,
            passes=3_000,
        )
        return found.wave, [a.images for a in asked]

    wave, counts = forwards([first, second])
    assert wave.across in (1, 3)  # what either fears: each errs on half of the images
    assert min(counts) > 0.8 * max(counts)
    alone, _ = forwards([second])
    assert alone.across == 3


def test_a_killed_search_continues_to_the_very_same_wave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", -1.0)  # save after every round
    model, partial = fold(trained()), tmp_path / "partial.pt"
    expected = search(model, tmp_path / "whole.pt")
    left = itertools.count()

    def dies(_n: int) -> None:
        if next(left) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, partial, progress=dies)
    saved = read_partial(partial, key="mine")
    assert saved is not None
    counts: list[int] = []
    resumed = search(model, partial, progress=counts.append)
    assert resumed.found == expected.found
    assert sum(counts) == expected.found.forwards - saved["forwards"] < expected.found.forwards
    assert np.array_equal(resumed.delta_255, expected.delta_255)


def test_what_ends_a_search_finds_its_last_round_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", 1e9)
    model, partial = fold(trained()), tmp_path / "partial.pt"
    expected = search(model, tmp_path / "whole.pt")
    left = itertools.count()

    def ends(_n: int) -> None:
        if next(left) == 6:
            raise TimeLimitReached

    with pytest.raises(TimeLimitReached):
        search(model, partial, progress=ends)
    counts: list[int] = []
    resumed = search(model, partial, progress=counts.append)
    assert resumed.found == expected.found
    assert sum(counts) < expected.found.forwards


def test_momentum_does_not_lose_to_a_wave(tmp_path: Path) -> None:
    """Even where no gradient leads anywhere: the network's answer is a nearest neighbour's."""
    images = split(64)
    wave = Wave(2, 1, 1 / 3, 1)

    class Flat(AfraidOf):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels.detach()) + 0 * pixels.flatten(1)[:, :1]

    settings = MomentumSettings(40, 8, 0.2, 8.0, 0.8, True, False, selection=32, waves=2_000)
    (crafted,) = craft_together(
        Flat(wave.signs(IMAGE_SHAPE), images),
        images,
        [Job(Request(4.0), seed=0)],
        settings.rule,
        key="k",
        partial=tmp_path / "p.pt",
        device=CPU,
        progress=lambda _n: None,
    )
    assert crafted.chosen == "wave"
    assert crafted.wave is not None
    assert (crafted.wave.across, crafted.wave.down) == (2, 1)
    assert np.array_equal(crafted.delta_255, 4 * crafted.wave.signs(IMAGE_SHAPE))


def test_what_a_wave_costs_is_taken_from_the_steps() -> None:
    without = MomentumSettings(10, 8, 0.2, 8.0, 0.8, True, False, selection=16)
    rule = replace(without, waves=160).rule
    # 160 passes are 80 gradients, 10 steps of 8; one candidate more on 16 images is one step.
    assert planned_steps(rule, 64) == planned_steps(without.rule, 64) - 10 - 1


def test_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert margin(logits, torch.tensor([1, 0])).tolist() == [-2.0, 3.0]

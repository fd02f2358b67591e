"""Comparing models of which a device saw a sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from harness.metrics import mcnemar, most_unseen
from reports.sampled import SHARE, Sampled, sampled_difference

N = 10_000


def model(wrong: npt.NDArray[np.bool_], n: int, *, flipped: int = 0, seed: int = 0) -> Sampled:
    """A device that errs as PyTorch does on a sample, but for `flipped` of each kind of image."""
    indices = np.sort(np.random.default_rng(seed).choice(wrong.size, n, replace=False))
    device = wrong[indices].copy()
    for kind in (np.flatnonzero(device), np.flatnonzero(~device)):
        device[kind[:flipped]] = ~device[kind[:flipped]]
    return Sampled(wrong, device, indices)


def pair_of(more: int, less: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Who errs alone on so many images, spread over the set."""
    order = np.random.default_rng(3).permutation(N)
    first, second = np.zeros(N, dtype=bool), np.zeros(N, dtype=bool)
    first[order[:more]] = True
    second[order[more : more + less]] = True
    return first, second


def test_a_difference_of_all_images_is_shown_beyond_the_sample() -> None:
    first, second = (model(wrong, 500) for wrong in pair_of(1_300, 800))
    value, p = sampled_difference(first, second)
    assert value == pytest.approx(0.05)
    assert p == pytest.approx(2 * SHARE, rel=1e-3)
    assert sampled_difference(second, first) == (pytest.approx(-0.05), pytest.approx(p))


def test_what_the_sample_leaves_possible_is_not_shown() -> None:
    """500 images without a disagreement leave some 120 of 10,000: each may count twice."""
    most = most_unseen(500, population=N, confidence=1 - SHARE)
    assert 100 < most < 150
    first, second = (model(wrong, 500) for wrong in pair_of(1_000 + 2 * most - 60, 1_000))
    assert sampled_difference(first, second)[1] > 0.05


def test_a_device_that_differs_from_pytorch_shows_less() -> None:
    first, second = pair_of(1_300, 800)
    as_torch, otherwise = (
        sampled_difference(model(first, 500, flipped=k), model(second, 500))[1] for k in (0, 10)
    )
    assert as_torch < 0.01
    assert otherwise > 0.05


def test_a_small_sample_speaks_for_itself() -> None:
    first, second = (model(wrong, 100) for wrong in pair_of(1_300, 800))
    seen = mcnemar(first.device_wrong, second.device_wrong)
    assert sampled_difference(first, second)[1] == seen
    larger = [model(wrong, 200) for wrong in pair_of(1_300, 800)]
    assert sampled_difference(*larger)[1] != mcnemar(*(one.device_wrong for one in larger))


@pytest.mark.parametrize(("n", "points"), [(250, 9), (500, 6)])
def test_a_large_family_can_show_something(n: int, points: int) -> None:
    """What p is never below is small enough to be adjusted; what is not seen counts for more."""
    family = 60
    first, second = (model(wrong, n) for wrong in pair_of(800 + 100 * points, 800))
    assert family * sampled_difference(first, second)[1] > 0.05
    assert family * sampled_difference(first, second, family=family)[1] < 0.05
    first, second = (model(wrong, n) for wrong in pair_of(800 + 50 * points, 800))
    assert sampled_difference(first, second, family=family)[1] > 0.05


def test_models_of_different_images_are_refused() -> None:
    few = Sampled(np.zeros(5, dtype=bool), np.zeros(1, dtype=bool), np.array([0]))
    with pytest.raises(ValueError, match="different images"):
        sampled_difference(model(np.zeros(N, dtype=bool), 10), few)


@pytest.mark.parametrize("family", [1, 20])
def test_a_null_effect_is_rarely_shown(family: int) -> None:
    """Equal error rates on the device, PyTorch off by 1 % of the images in one model's favour."""
    rng = np.random.default_rng(7)
    shown = 0
    for seed in range(300):
        truth = rng.random((2, 2_000)) < 0.3
        torch = truth.copy()
        torch[0, rng.choice(2_000, 20, replace=False)] = False
        indices = np.sort(np.random.default_rng(seed).choice(2_000, 400, replace=False))
        one, other = (Sampled(t, d[indices], indices) for t, d in zip(torch, truth, strict=True))
        shown += sampled_difference(one, other, family=family)[1] < 0.05
    assert shown <= 25  # 5 % of 300 are 15; 25 is beyond the 99 % point

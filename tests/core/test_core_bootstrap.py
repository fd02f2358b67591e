"""Intervals over images and crafting seeds, against simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.bootstrap import agreement, difference, mean_over_seeds, slope_ratio
from harness.metrics import mcnemar, wilson


def worlds(
    rng: np.random.Generator, seeds: int, n: int, *, seed_spread: float, rate: float = 0.0
) -> np.ndarray:
    """bool [seeds, n]: image difficulty and crafting luck on a probit scale."""
    images = rng.normal(0, 1, n)
    luck = rng.normal(0, seed_spread, (seeds, 1))
    return images + luck + rng.normal(0, 0.5, (seeds, n)) + rate > 0


@pytest.mark.parametrize(("seeds", "seed_spread"), [(3, 0.3), (5, 0.0), (5, 0.3)])
def test_the_interval_covers_the_rate_of_all_images_and_all_seeds(
    seeds: int, seed_spread: float
) -> None:
    rng = np.random.default_rng(1)
    truth = 0.5  # by symmetry
    found = [mean_over_seeds(worlds(rng, seeds, 100, seed_spread=seed_spread)) for _ in range(100)]
    covered = np.mean([f.low <= truth <= f.high for f in found])
    assert covered >= 0.88  # measured with 400: 0.93 with 3 seeds, 0.95 with 5
    assert all(f.seeds == seeds and f.n == 100 for f in found)
    if seed_spread:  # images alone would be far too sure
        images_only = [wilson(round(100 * f.value), 100) for f in found]
        assert np.mean([low <= truth <= high for low, high in images_only]) < covered


@pytest.mark.parametrize("seeds", [(3, 3), (5, 1), (5, 5)])
def test_pure_noise_is_called_a_difference_at_most_one_time_in_twenty(
    seeds: tuple[int, int],
) -> None:
    rng = np.random.default_rng(2)
    p = []
    for _ in range(120):
        both = worlds(rng, sum(seeds), 100, seed_spread=0.2 if seeds[1] > 1 else 0.0)
        p.append(difference(both[: seeds[0]], both[seeds[0] :], same_seeds=False).p)
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 120)


def test_a_real_difference_is_found_and_its_sign_is_right() -> None:
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 1, 400)
    first, second = (
        shared + rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 0.5, (5, 400)) + shift > 0
        for shift in (0.4, 0.0)
    )
    found = difference(first, second, same_seeds=False)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.low > 0
    assert found.p < 1e-4


def test_the_same_perturbations_are_drawn_together() -> None:
    """Both victims met the same lucky and unlucky perturbations: the luck cancels."""
    rng = np.random.default_rng(4)
    luck = rng.normal(0, 0.6, (4, 1))
    shared = rng.normal(0, 1, 300)
    first, second = (
        shared + luck + rng.normal(0, 0.3, (4, 300)) + shift > 0 for shift in (0.15, 0.0)
    )
    paired = difference(first, second, same_seeds=True)
    apart = difference(first, second, same_seeds=False)
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
    assert paired.p < 0.05 < apart.p


def test_one_seed_is_close_to_the_exact_test_of_images() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random(500) < 0.5, rng.random(500) < 0.42
    found = difference(first[None], second[None], same_seeds=True)
    exact = mcnemar(first, second)
    assert found.p == pytest.approx(exact, rel=0.1)
    few = np.zeros(500, dtype=bool)
    few[:3] = True  # three images, all one way: no proof, exactly 0.25
    assert difference(few[None], ~np.ones((1, 500), bool), same_seeds=True).p > 0.2


def test_no_mistake_among_n_is_not_none_at_all() -> None:
    found = mean_over_seeds(np.zeros((3, 100), dtype=bool))
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(wilson(0, 100)[1])


def test_images_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to pair"):
        difference(np.ones((2, 5)), np.ones((2, 6)), same_seeds=False)
    with pytest.raises(ValueError, match="nothing to pair"):
        difference(np.ones((2, 5)), np.ones((3, 5)), same_seeds=True)
    with pytest.raises(ValueError, match="need \\[seeds, images\\]"):
        mean_over_seeds(np.ones((0, 5), dtype=bool))


def test_agreement_is_the_cosine_of_the_two_gradients() -> None:
    """Random directions see the cosine between what is promised and what is true."""
    rng = np.random.default_rng(6)
    for cosine in (1.0, 0.6, 0.0):
        first, other = rng.normal(0, 1, (2, 64, 300))
        other -= (other * first).sum(1, keepdims=True) / (first**2).sum(1, keepdims=True) * first
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        true = cosine * first + np.sqrt(1 - cosine**2) * other
        along = rng.choice([-1.0, 1.0], (64, 8, 300))
        promised, measured = (np.einsum("nd,nkd->nk", g, along) for g in (first, 7 * true))
        found = agreement(promised, measured)
        assert found is not None
        assert found.value == pytest.approx(cosine, abs=0.1)
        assert found.low <= cosine + 1e-9
        assert found.high >= cosine - 1e-9
    assert agreement(np.zeros((4, 2)), np.ones((4, 2))) is None  # no gradient promises nothing


def test_the_kept_slope_is_a_ratio_of_sums() -> None:
    promised = np.array([1.0, 2.0, 3.0, 4.0] * 8)
    found = slope_ratio(promised, 0.4 * promised)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.4, 0.4))
    noise = np.random.default_rng(8).normal(0, 1, 32)
    noisy = slope_ratio(promised, 0.4 * promised + noise)
    assert noisy is not None
    assert noisy.low < 0.4 < noisy.high
    half_width = stats.norm.ppf(0.975) * np.sqrt(32) / promised.sum()
    assert noisy.high - noisy.low == pytest.approx(2 * half_width, rel=0.5)
    assert slope_ratio(np.zeros(4), np.ones(4)) is None


@pytest.mark.parametrize("n", [1, 3, 5, 600])
def test_images_that_all_agree_show_what_their_number_can(n: int) -> None:
    found = difference(np.ones((2, n), bool), np.zeros((2, n), bool), same_seeds=False)
    assert found.value == found.high == 1.0
    assert found.p == pytest.approx(min(1.0, 2 * 0.5**n))  # as exact McNemar says of n to none
    assert found.low < 1.0
    assert found.low == pytest.approx(2 * 0.025 ** (1 / n) - 1)
    negative = difference(np.zeros((2, n), bool), np.ones((2, n), bool), same_seeds=True)
    assert (negative.low, negative.high) == (-1.0, pytest.approx(-found.low))
    nothing = difference(np.ones((2, n), bool), np.ones((3, n), bool), same_seeds=False)
    assert (nothing.value, nothing.p) == (0.0, 1.0)


@pytest.mark.parametrize("images", [1, 100])
def test_seeds_that_err_on_opposite_images_have_an_interval(images: int) -> None:
    wrong = np.tile(np.array([[True, False], [False, True]]), (1, images))
    found = mean_over_seeds(wrong)
    assert found.value == 0.5
    assert 0 <= found.low < 0.5 < found.high <= 1

"""Which images are chosen: quotas are exact, draws are frozen, roles are disjoint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.splits import (
    CALIBRATION_MAX,
    balanced,
    frozen_random,
    hold_out,
    stratified,
)

labels_of_any_mix = st.lists(st.integers(0, 6), min_size=1, max_size=300).map(np.array)
seeds = st.integers(0, 2**40)


@given(labels_of_any_mix, st.integers(1, 400), seeds)
def test_stratified_quotas_are_floor_or_ceil_of_the_exact_share(labels, count, seed):
    chosen = stratified(labels, count, frozen_random(seed))
    count = min(count, len(labels))
    assert len(chosen) == count == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    sizes = np.bincount(labels)
    drawn = np.bincount(labels[chosen], minlength=len(sizes))
    assert (drawn * len(labels) > sizes * count - len(labels)).all()
    assert (drawn * len(labels) < sizes * count + len(labels)).all()


@given(labels_of_any_mix, st.integers(1, 400), seeds)
def test_balanced_takes_equally_from_every_class_that_has_enough(labels, count, seed):
    chosen = balanced(labels, count, frozen_random(seed))
    assert len(chosen) == min(count, len(labels)) == len(set(chosen.tolist()))
    sizes = np.bincount(labels)
    drawn = np.bincount(labels[chosen], minlength=len(sizes))
    not_exhausted = drawn[drawn < sizes]
    if len(not_exhausted):
        # Nobody gave more than one above a class that could have given more.
        assert drawn.max() <= not_exhausted.min() + 1


@given(labels_of_any_mix, seeds)
def test_hold_out_parts_the_images_and_leaves_every_class_in_training(labels, seed):
    train, calibration = hold_out(labels, seed)
    assert sorted([*train, *calibration]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels)
    assert (len(calibration) == 0) == (np.bincount(labels).max() == 1)
    assert len(calibration) <= max(1, len(labels) // 10)


def test_hold_out_of_a_large_set_is_capped_and_balanced():
    labels = np.repeat(np.arange(10), 2000)
    _, calibration = hold_out(labels, 0)
    assert np.bincount(labels[calibration]).tolist() == [CALIBRATION_MAX // 10] * 10


def test_a_rare_class_keeps_three_quarters_of_its_images():
    labels = np.repeat([0, 1], [1000, 8])
    train, calibration = hold_out(labels, 0)
    assert np.bincount(labels[train]).tolist() == [1000 - 98, 6]
    assert len(calibration) == 100


@given(labels_of_any_mix, st.integers(1, 300), seeds)
def test_a_key_decides_the_draw(labels, count, seed):
    for choose in (stratified, balanced):
        first, second = (choose(labels, count, frozen_random(seed, 1)) for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_the_frozen_stream_is_the_one_experiments_were_judged_on():
    assert frozen_random(1797, 0).randint(0, 1000, 5, dtype=np.int64).tolist() == [
        370,
        151,
        351,
        6,
        646,
    ]
    assert (
        frozen_random(0, 1).permutation(6).tolist() != frozen_random(0, 2).permutation(6).tolist()
    )


@pytest.mark.parametrize("count", [1, 9, 10, 11])
def test_stratified_ties_go_to_the_lower_class(count):
    labels = np.repeat(np.arange(10), 3)
    drawn = np.bincount(labels[stratified(labels, count, frozen_random(3))], minlength=10)
    expected = [count // 10 + (c < count % 10) for c in range(10)]
    assert drawn.tolist() == expected

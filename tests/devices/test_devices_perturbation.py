from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from devices.perturbation import delta_to_255, perturb
from harness.records import UsageError

SHAPE = (2, 3, 4)
image_arrays = hnp.arrays(np.uint8, (3, *SHAPE))
delta_arrays = hnp.arrays(np.int16, SHAPE, elements=st.integers(-255, 255))


@given(image_arrays, delta_arrays)
def test_attacked_images_are_the_clipped_sum(images: np.ndarray, delta_255: np.ndarray) -> None:
    attacked = perturb(images, delta_255)
    assert attacked.dtype == np.uint8
    expected = [
        min(max(int(x) + int(d), 0), 255)
        for image in images
        for x, d in zip(image.flat, delta_255.flat, strict=True)
    ]
    assert attacked.ravel().tolist() == expected


@given(image_arrays, delta_arrays)
def test_grid_deltas_follow_the_rule_of_the_design(images: np.ndarray, steps: np.ndarray) -> None:
    delta = (steps / 255).astype(np.float32)  # as a UAP file stores it
    rule = np.clip(np.round(images + 255 * delta.astype(np.float64)), 0, 255)
    delta_255 = delta_to_255(delta)
    np.testing.assert_array_equal(delta_255, steps)
    np.testing.assert_array_equal(perturb(images, delta_255), rule)


@pytest.mark.parametrize("eps_255", [1, 6, 8, 10, 16, 255])
def test_a_sign_perturbation_keeps_its_budget_exactly(eps_255: int) -> None:
    delta = np.float32(eps_255 / 255) * np.array([[[-1, 1]]], dtype=np.float32)
    assert delta_to_255(delta).tolist() == [[[-eps_255, eps_255]]]


@pytest.mark.parametrize(
    ("images", "delta_255", "message"),
    [
        (np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE, np.int16), "uint8"),
        (np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.int16), "uint8"),
        (np.zeros((0, *SHAPE), np.uint8), np.zeros(SHAPE, np.int16), "not empty"),
        (np.zeros((1, *SHAPE), np.uint8), np.zeros((2, 4, 3), np.int16), r"\(2, 4, 3\).*3, 4"),
        (np.zeros((1, *SHAPE), np.uint8), np.zeros(SHAPE, np.float32), "integers"),
        (np.zeros((1, *SHAPE), np.uint8), np.full(SHAPE, 256, np.int16), "255"),
        (np.zeros((1, *SHAPE), np.uint8), np.full(SHAPE, -32768, np.int16), "255"),
    ],
)
def test_what_is_not_an_image_or_a_perturbation_is_refused(
    images: np.ndarray, delta_255: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        perturb(images, delta_255)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.1, -1e9])
def test_a_float_perturbation_outside_pixel_space_is_refused(value: float) -> None:
    with pytest.raises(UsageError):
        delta_to_255(np.full(SHAPE, value))

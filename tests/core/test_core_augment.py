"""Augmentation against brute force, one image at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.training.augment import cutout, mixup, random_crop, random_flip

N, SIDE = 200, 9
FILL = torch.tensor([300.0, 400.0, 500.0]).view(1, 3, 1, 1)  # colours no image has


def images(n: int = N) -> Tensor:
    """Every pixel of the set is different."""
    count = n * 3 * SIDE * SIDE
    return torch.arange(count).view(n, 3, SIDE, SIDE) % 251 + torch.arange(n).view(-1, 1, 1, 1) / n


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    x, padding = images(), 2
    out = random_crop(x, padding=padding, fill_255=FILL, rng=rng())
    assert out.shape == x.shape
    padded = FILL.expand(N, 3, SIDE + 4, SIDE + 4).clone()
    padded[:, :, 2:-2, 2:-2] = x
    offsets = set()
    for image, source in zip(out, padded, strict=True):
        found = [
            (dy, dx)
            for dy in range(2 * padding + 1)
            for dx in range(2 * padding + 1)
            if torch.equal(image, source[:, dy : dy + SIDE, dx : dx + SIDE])
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) == 25  # every place is drawn, corners and centre included


class NoOffset:
    """A generator that always cuts where the original was."""

    def integers(self, low: int, high: int, size: tuple[int, ...]) -> np.ndarray:
        return np.full(size, (high - 1) // 2)


def test_a_crop_without_offset_is_the_image() -> None:
    x = images(5)
    same = random_crop(x, padding=3, fill_255=FILL, rng=NoOffset())  # type: ignore[arg-type]
    assert torch.equal(same, x)
    assert random_crop(x, padding=0, fill_255=FILL, rng=rng()) is x


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    x = images()
    out = random_flip(x, rng=rng())
    mirrored = torch.from_numpy(np.ascontiguousarray(x.numpy()[..., ::-1]))
    flipped = [torch.equal(a, b) for a, b in zip(out, mirrored, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(out, x, strict=True)]
    assert [not f for f in flipped] == kept
    assert 70 <= sum(flipped) <= 130  # 200 fair coins: 4 standard deviations


@pytest.mark.parametrize("size", [1, 4, 5])
def test_a_hole_is_a_filled_square_cut_off_at_the_border(size: int) -> None:
    x = images()
    out = cutout(x, size=size, fill_255=FILL, rng=rng())
    areas = []
    for before, after in zip(x, out, strict=True):
        hole = (after == FILL[0]).all(dim=0)
        assert torch.equal(after[:, ~hole], before[:, ~hole])
        rows, columns = hole.any(dim=1).nonzero().flatten(), hole.any(dim=0).nonzero().flatten()
        height, width = len(rows), len(columns)
        assert int(hole.sum()) == height * width  # a solid rectangle
        assert rows.tolist() == list(range(int(rows[0]), int(rows[0]) + height))
        assert columns.tolist() == list(range(int(columns[0]), int(columns[0]) + width))
        for first, length in ((int(rows[0]), height), (int(columns[0]), width)):
            assert length == size or (
                size // 2 <= length < size and (first == 0 or first + length == SIDE)
            )
        areas.append(height * width)
    assert max(areas) == size**2
    assert size == 1 or min(areas) < size**2


def test_a_hole_as_large_as_two_images_leaves_nothing() -> None:
    out = cutout(images(3), size=2 * SIDE, fill_255=FILL, rng=rng())
    assert torch.equal(out, FILL.expand_as(out))
    x = images(3)
    assert cutout(x, size=0, fill_255=FILL, rng=rng()) is x


def test_mixup_is_a_convex_combination_of_images_and_their_labels() -> None:
    x, y = images(40), torch.arange(40)
    lams = []
    for seed in range(20):
        mixed, other, lam = mixup(x, y, alpha=1.0, rng=rng(seed))
        assert 0 <= lam <= 1
        assert sorted(other.tolist()) == y.tolist()  # a shuffled copy
        assert torch.allclose(mixed, lam * x + (1 - lam) * x[other], atol=1e-4)
        lams.append(lam)
    assert np.std(lams) > 0.15  # Beta(1, 1) is uniform: 0.29


@pytest.mark.parametrize(
    "augment",
    [
        lambda x, g: random_crop(x, padding=2, fill_255=FILL, rng=g),
        lambda x, g: random_flip(x, rng=g),
        lambda x, g: cutout(x, size=4, fill_255=FILL, rng=g),
        lambda x, g: mixup(x, torch.arange(len(x)), alpha=1.0, rng=g)[0],
    ],
    ids=["crop", "flip", "cutout", "mixup"],
)
def test_the_generator_alone_decides(
    augment: Callable[[Tensor, np.random.Generator], Tensor],
) -> None:
    x = images(30)
    before = x.clone()
    first = augment(x, rng(1))
    torch.manual_seed(0)
    assert torch.equal(augment(x, rng(1)), first)
    assert not torch.equal(augment(x, rng(2)), first)
    assert torch.equal(x, before)

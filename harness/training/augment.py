"""Augmentation on resident uint8 batches: crop, flip, cutout, mixup.

Enters: uint8 images [B, C, H, W] and a numpy generator. Leaves: float pixels in [0, 255].
Whatever is painted over gets the training mean, which is zero after normalisation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_crop(
    images: Tensor, *, padding: int, fill_255: Tensor, rng: np.random.Generator
) -> Tensor:
    """Pad by `padding` pixels on every side and cut the original size at a random place.

    Args:
        images: float [B, C, H, W].
        padding: pixels; 0 returns the images as they are.
        fill_255: float [1, C, 1, 1], the colour of the padding.
        rng: draws one (row, column) offset an image.
    """
    if padding == 0:
        return images
    n, channels, height, width = images.shape
    padded = fill_255.expand(n, channels, height + 2 * padding, width + 2 * padding).clone()
    padded[:, :, padding : padding + height, padding : padding + width] = images
    offsets = torch.from_numpy(rng.integers(0, 2 * padding + 1, size=(2, n))).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    which = torch.arange(n, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: Tensor, *, rng: np.random.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    flips = torch.from_numpy(rng.random(images.shape[0]) < 0.5).to(images.device)
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)


def cutout(images: Tensor, *, size: int, fill_255: Tensor, rng: np.random.Generator) -> Tensor:
    """One square hole of `size` pixels an image, cut off at the border (DeVries & Taylor 2017)."""
    if size == 0:
        return images
    n, _, height, width = images.shape
    centre_y = torch.from_numpy(rng.integers(0, height, size=n)).to(images.device)
    centre_x = torch.from_numpy(rng.integers(0, width, size=n)).to(images.device)
    y = torch.arange(height, device=images.device) - centre_y[:, None]
    x = torch.arange(width, device=images.device) - centre_x[:, None]
    low, high = -(size // 2), size - size // 2
    hole = ((y >= low) & (y < high))[:, None, :, None] & ((x >= low) & (x < high))[:, None, None, :]
    return torch.where(hole, fill_255, images)


def mixup(
    images: Tensor, labels: Tensor, *, alpha: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Convex combination with a shuffled copy of the batch (Zhang et al. 2018).

    Returns:
        (mixed images, labels of the shuffled copy, lambda): the loss is
        lambda * CE(labels) + (1 - lambda) * CE(shuffled labels), lambda ~ Beta(alpha, alpha).
    """
    lam = float(rng.beta(alpha, alpha))
    order = torch.from_numpy(rng.permutation(images.shape[0])).to(images.device)
    return lam * images + (1 - lam) * images[order], labels[order], lam

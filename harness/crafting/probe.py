"""Whether a network's gradients say where its loss rises: measured on attack images, clean.

Three signs of masked gradients that need no attack (Athalye, Carlini, Wagner 2018). A quantised
network's gradient is straight-through, a guess by construction: here it is held to the network:

- samples whose gradient is exactly zero, because nothing flows back or the loss is beyond its
  clamp: nothing steers them;
- the slope of the true network along the gradient's own direction, by a central difference of one
  pixel level, against what the gradient promises;
- the same along random low-frequency directions, over half of the budget: the scale of the attack.

The slopes are of the margin (largest other logit minus the label's), which does not saturate.
Enters: a frozen deployed model, uint8 images. Leaves: raw numbers, image by image; what they mean
is for whoever reads them (`harness.bootstrap.agreement`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.crafting.arithmetic import margin
from harness.data.dataset import Split

IMAGES = 64
DIRECTIONS = 8
GRID = 8
DIGITS = 5
"""Significant digits kept: the file is read as text by the store."""


@dataclass(frozen=True)
class Probe:
    """What was measured on n clean attack images. Slopes are in logits per pixel level."""

    images: int
    zero_gradient: int
    """Images whose clamped cross-entropy has a gradient of exactly zero everywhere."""
    saturated: int
    """Images whose cross-entropy is beyond the clamp; they are among those without gradient."""
    own_promised: tuple[float, ...]
    """[n] slope that the gradient promises along its own sign."""
    own_measured: tuple[float, ...]
    """[n] central difference of one level along it."""
    random_promised: tuple[tuple[float, ...], ...]
    """[n][D] the same along D random directions an image."""
    random_measured: tuple[tuple[float, ...], ...]
    """[n][D] central differences over half of the budget."""
    reach_255: float
    """That half, in pixel levels."""


def probe_gradients(
    model: nn.Module, split: Split, *, eps: float, beta: float, seed: int, device: torch.device
) -> Probe:
    """Measure on at most `IMAGES` images of a split; some 1,300 forward passes.

    Args:
        model: pixels float [N, C, H, W] in [0, 255] -> logits, in eval mode, on `device`.
        split: attack images, uint8 [N, C, H, W], with labels.
        eps: the attack's budget, in pixel levels.
        beta: where the attack clamps the loss of a sample.
        seed: of the images and directions.
        device: where the model is.
    """
    rng = np.random.default_rng(seed)
    n, reach = min(IMAGES, len(split)), eps / 2
    chosen = rng.choice(len(split), size=n, replace=False)
    pixels = torch.from_numpy(split.images[chosen]).float().to(device)
    labels = torch.from_numpy(split.labels[chosen]).to(device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        leaf = pixels.clone().requires_grad_()
        losses = F.cross_entropy(_logits(model, leaf), labels, reduction="none")
        clamped = losses.clamp(max=beta).sum()
        (steering,) = torch.autograd.grad(clamped, leaf)
        (gradient,) = torch.autograd.grad(margin(_logits(model, leaf), labels).sum(), leaf)

        def slopes(along: Tensor, distance: float) -> tuple[list[float], list[float]]:
            with torch.no_grad():
                above = margin(_logits(model, pixels + distance * along), labels)
                below = margin(_logits(model, pixels - distance * along), labels)
            promised = (gradient * along).flatten(1).sum(dim=1)
            return _plain(promised), _plain((above - below) / (2 * distance))

        own_promised, own_measured = slopes(gradient.sign(), 1.0)
        shape = tuple(pixels.shape[1:])
        found = [
            slopes(_directions(rng, n, shape, GRID).to(device), reach) for _ in range(DIRECTIONS)
        ]
    promised, measured = zip(*found, strict=True)
    return Probe(
        images=n,
        zero_gradient=int((steering.flatten(1) == 0).all(dim=1).sum()),
        saturated=int((losses > beta).sum()),
        own_promised=tuple(own_promised),
        own_measured=tuple(own_measured),
        random_promised=tuple(zip(*promised, strict=True)),
        random_measured=tuple(zip(*measured, strict=True)),
        reach_255=reach,
    )


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    logits: Tensor = model(pixels.contiguous(memory_format=torch.channels_last))
    return logits.float()


def _plain(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _directions(rng: np.random.Generator, n: int, shape: tuple[int, ...], grid: int) -> Tensor:
    """+-1, float32 [n, C, H, W], constant on the cells of a grid."""
    channels, height, width = shape
    cells = (n, channels, min(grid, height), min(grid, width))
    signs = torch.from_numpy(rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=cells))
    return F.interpolate(signs, size=(height, width), mode="nearest")

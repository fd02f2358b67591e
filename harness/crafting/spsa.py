"""A gradient-free attack: what can be reached with nothing but the deployed function's outputs.

Simultaneous perturbation (Spall 1992), which Uesato et al. (2018) use to tell a robust model from
one whose gradients are masked, made universal: every image of a batch has a random direction of its
own, so that each pair of queries is an independent look at the one gradient they share.

    u_i   = random signs on a coarse grid, one block for every cell   (low frequencies)
    g     = mean_i (M_i(x_i + clip(delta + c u_i)) - M_i(x_i + clip(delta - c u_i))) u_i
    v    <- momentum * v + g / mean |g|
    delta <- clip(delta + (step * eps) * (1 - t/T) * sign(v), -eps, eps)

M is tanh of the margin, (largest other logit - logit of the label) / its typical size: it has no
scale, so a network whose logits are blown up until its softmax has no slope hides nothing from it.
c is half of the budget: steps of a staircase smaller than that hide nothing either.

Enters: a frozen deployed model, uint8 images. Leaves: one perturbation; pixel levels, 0..255. One
query pair costs what one gradient evaluation does: two forward passes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.artefacts import read_partial, write_partial
from harness.crafting import together
from harness.crafting.together import TINY, Job, Progress
from harness.data.dataset import Split
from harness.models.brought import BroughtModel


@dataclass(frozen=True)
class SpsaSettings:
    """The search. The defaults were the best of those tried (docs/adr/0010)."""

    epochs: int
    """Query pairs an image: as many as gradient attacks have gradient evaluations."""
    pairs: int
    """Query pairs of one step, each of another image."""
    momentum: float = 0.95
    step: float = 0.2
    """Of the first update, as a fraction of eps; it falls linearly to nothing."""
    reach: float = 0.5
    """How far from the perturbation it is asked, as a fraction of eps."""
    grid: int = 8
    """Cells along each side of the picture; an image of fewer pixels has one cell a pixel."""


@dataclass(frozen=True)
class Searched:
    """A perturbation and what the search saw."""

    delta_255: np.ndarray
    """float32 [C, H, W] in pixel levels, |delta_255| <= eps."""
    objective: tuple[float, ...]
    """Mean tanh of the margin in each epoch, in [-1, 1]; above 0 more images err than not."""
    forwards: int
    """Images that went through the network."""


def planned_searches(settings: SpsaSettings, n: int) -> int:
    """Steps of one search over n images: a step asks about each image at most once."""
    return max(1, settings.epochs * n // min(settings.pairs, n))


@torch.no_grad()
def craft_spsa(
    model: nn.Module,
    split: Split,
    job: Job,
    settings: SpsaSettings,
    *,
    key: str,
    partial: Path,
    device: torch.device,
    progress: Progress,
) -> Searched:
    """Search for one perturbation; a `partial` file of the same `key` is continued.

    Args:
        model: pixels float [N, C, H, W] in [0, 255] -> logits; only ever run forward.
        split: the images it is crafted on, uint8 [N, C, H, W], with labels.
        job: budget in pixel levels, target class or None, seed.
        settings: the search.
        key: identifies the work, for `partial`.
        partial: state of unfinished work, at most every few seconds.
        device: where to craft; the model is there already.
        progress: told after every step, image pairs.
    """
    n, request = len(split), job.request
    eps = float(math.floor(request.eps))  # whole levels: more of the budget is not deployed
    images = torch.from_numpy(split.images).to(device)  # uint8, resident
    labels = torch.from_numpy(split.labels).to(device)
    wanted = labels if request.target is None else torch.full_like(labels, request.target)
    sense = 1.0 if request.target is None else -1.0
    shape = tuple(split.images.shape[1:])
    delta, velocity = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    steps, pairs = planned_searches(settings, n), min(settings.pairs, n)
    per_epoch = -(-steps // settings.epochs)
    scale, at_step, objective = 0.0, 0, [0.0] * settings.epochs
    saved = read_partial(partial, key=key)
    if saved is not None:
        at_step, scale, objective = int(saved["step"]), float(saved["scale"]), saved["objective"]
        delta, velocity = saved["delta"].to(device), saved["velocity"].to(device)
    last_save = time.monotonic()
    # TF32's error, a thousandth of the largest logit, is nothing beside what half of the budget
    # moves; but what a user brought is taken as it comes.
    fast = not isinstance(model, BroughtModel)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=fast):
        for t in range(at_step, steps):
            rng = np.random.default_rng((job.seed, t))
            batch = torch.from_numpy(rng.choice(n, size=pairs, replace=False)).to(device)
            along = directions(rng, pairs, shape, settings.grid).to(device)
            reach = settings.reach * eps * along
            asked = torch.cat([delta + reach, delta - reach]).clamp(-eps, eps)
            attacked = (images[batch].repeat(2, 1, 1, 1).float() + asked).clamp(0, 255)
            logits = model(attacked.contiguous(memory_format=torch.channels_last)).float()
            margins = sense * margin(logits, wanted[batch].repeat(2))
            if t == 0:
                scale = float(margins.abs().median())
            values = torch.tanh(margins / (scale + TINY))
            slopes = (values[:pairs] - values[pairs:]).view(-1, 1, 1, 1)
            gradient = (slopes * along).mean(dim=0)
            velocity = settings.momentum * velocity + gradient / (gradient.abs().mean() + TINY)
            delta = delta + settings.step * eps * (1 - t / steps) * velocity.sign()
            delta = delta.clamp(-eps, eps)
            objective[t // per_epoch] += float(values.mean())
            progress(pairs)
            if t + 1 < steps and time.monotonic() - last_save > together.SAVE_INTERVAL_SECONDS:
                state = {"step": t + 1, "delta": delta.cpu(), "velocity": velocity.cpu()}
                state |= {"scale": scale, "objective": objective}
                write_partial(partial, key=key, state=state)
                last_save = time.monotonic()
    counts = [max(0, min(per_epoch, steps - e * per_epoch)) for e in range(settings.epochs)]
    means = tuple(total / count for total, count in zip(objective, counts, strict=True) if count)
    return Searched(delta.cpu().numpy(), means, forwards=2 * pairs * steps)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's, [N]: positive where the prediction is another."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own[:, 0]


def directions(rng: np.random.Generator, n: int, shape: tuple[int, ...], grid: int) -> Tensor:
    """+-1, float32 [n, C, H, W], constant on the cells of a grid."""
    channels, height, width = shape
    cells = (n, channels, min(grid, height), min(grid, width))
    signs = torch.from_numpy(rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=cells))
    return F.interpolate(signs, size=(height, width), mode="nearest")

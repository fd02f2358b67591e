"""The training loop every variant shares.

Enters: a model, a split and a `Recipe`. Leaves: the same model, trained. It can be killed at any
moment: the state after the last saved epoch is in the `partial` file, and every random draw
derives from (seed, epoch), so a resumed run takes exactly the steps an uninterrupted one takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.artefacts import read_partial, write_partial
from harness.data.dataset import Split
from harness.models.resnet import ResNet
from harness.training import augment

SAVE_INTERVAL_SECONDS = 5.0
"""At most this much training is lost to a kill, plus the epoch in progress."""
WARM_UP_FRACTION = 0.2
"""Share of a one-cycle schedule spent rising."""

Progress = Callable[[int, int, str], None]
"""(images done, images in all, note)."""


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Learning rates belong to parameter groups."""

    epochs: int
    batch_size: int
    schedule: str
    decay_epochs: tuple[int, ...]
    momentum: float
    weight_decay: float
    learning_rates: dict[str, float]
    """Parameter-name suffix -> learning rate; the empty suffix is the rest."""
    crop_padding: int
    flip: bool
    mixup_alpha: float | None = None
    cutout_size: int | None = None
    after_epoch: Callable[[ResNet], None] | None = None
    """Called after every epoch, before it is saved (soft filter pruning)."""


def train(
    model: ResNet,
    split: Split,
    recipe: Recipe,
    *,
    seed: int,
    key: str,
    partial: Path,
    device: torch.device,
    progress: Progress,
) -> None:
    """Train `model` in place and leave it in eval mode on `device`.

    Args:
        model: any state; a `partial` file that carries the same `key` replaces it.
        split: uint8 images [N, C, H, W] and labels [N].
        recipe: what to do.
        seed: every draw derives from it and from the epoch.
        key: identifies what is being trained, so that another run's partial is not resumed.
        partial: where to keep the state; removed by the caller when the result is safe.
        device: where to train.
        progress: told after every batch.
    """
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe), momentum=recipe.momentum, nesterov=False
    )
    start = 0
    saved = read_partial(partial, key=key)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = int(saved["epoch"])
    images = torch.from_numpy(split.images).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    total = recipe.epochs * images.shape[0]
    last_save = time.monotonic()
    for epoch in range(start, recipe.epochs):
        _train_epoch(
            model,
            optimizer,
            images,
            labels,
            recipe,
            seed=seed,
            epoch=epoch,
            progress=lambda done, base=epoch * images.shape[0]: progress(  # type: ignore[misc]
                base + done, total, f"epoch {base // images.shape[0] + 1}/{recipe.epochs}"
            ),
        )
        if recipe.after_epoch is not None:
            recipe.after_epoch(model)
        if time.monotonic() - last_save > SAVE_INTERVAL_SECONDS and epoch + 1 < recipe.epochs:
            state = {
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            write_partial(partial, key=key, state=state)
            last_save = time.monotonic()
    model.eval()


def _train_epoch(
    model: ResNet,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    epoch: int,
    progress: Callable[[int], None],
) -> None:
    rng = np.random.default_rng((seed, epoch))
    n = images.shape[0]
    order = torch.from_numpy(rng.permutation(n)).to(images.device)
    fill = model.normalise.mean_255
    model.train()
    for start in range(0, n, recipe.batch_size):
        batch = order[start : start + recipe.batch_size]
        if batch.numel() < 2:  # batch norm has no variance over one image
            break
        _set_learning_rate(optimizer, recipe, epoch + start / n)
        x, y = images[batch].float(), labels[batch]
        if recipe.crop_padding:
            x = augment.random_crop(x, padding=recipe.crop_padding, fill_255=fill, rng=rng)
            if recipe.flip:
                x = augment.random_flip(x, rng=rng)
        if recipe.cutout_size is not None:
            x = augment.cutout(x, size=recipe.cutout_size, fill_255=fill, rng=rng)
        loss = _loss(model, x, y, recipe, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress(min(start + recipe.batch_size, n))


def _loss(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, rng: np.random.Generator
) -> Tensor:
    if recipe.mixup_alpha is None:
        return F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
    mixed, other, lam = augment.mixup(x, y, alpha=recipe.mixup_alpha, rng=rng)
    logits = model(mixed.contiguous(memory_format=torch.channels_last))
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, other)


def schedule_factor(recipe: Recipe, epoch: float) -> float:
    """What learning rates are multiplied by at a fractional epoch."""
    if recipe.schedule == "step":
        return float(0.1 ** sum(epoch >= decay for decay in recipe.decay_epochs))
    position = epoch / recipe.epochs
    if position < WARM_UP_FRACTION:
        return position / WARM_UP_FRACTION
    return (1 - position) / (1 - WARM_UP_FRACTION)


def _set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    factor = schedule_factor(recipe, epoch)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _parameter_groups(model: ResNet, recipe: Recipe) -> list[dict[str, object]]:
    groups: dict[str, list[nn.Parameter]] = {suffix: [] for suffix in recipe.learning_rates}
    for name, parameter in model.named_parameters():
        suffix = max((s for s in groups if name.endswith(s)), key=len)
        groups[suffix].append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.learning_rates[suffix],
            "base_lr": recipe.learning_rates[suffix],
            "weight_decay": recipe.weight_decay,
        }
        for suffix, parameters in groups.items()
        if parameters
    ]

"""The training loop every variant shares.

Enters: a model, a split and a `Recipe`. Leaves: the same model, trained. It can be killed at any
moment: the state after the last saved step is in the `partial` file, that of the epoch's generator
too, so a resumed run takes exactly the steps an uninterrupted one takes.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.data.dataset import Split
from harness.models.resnet import ResNet
from harness.training import augment
from harness.unfinished import Keeper

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
    nesterov: bool = False
    precision: str = "fp32"
    """`bf16`: products in bfloat16 on a GPU, weights and sums in float32; no effect elsewhere."""
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
        _parameter_groups(model, recipe), momentum=recipe.momentum, nesterov=recipe.nesterov
    )
    at = _Position()
    keeper = Keeper(partial, key)
    saved = keeper.kept()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        at = _Position(int(saved["epoch"]), int(saved.get("step", 0)), saved.get("generator", ""))
    images = torch.from_numpy(split.images).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    n = images.shape[0]
    for epoch in range(at.epoch, recipe.epochs):
        rng = np.random.default_rng((seed, epoch))
        order = torch.from_numpy(rng.permutation(n)).to(device)
        first = at.step if epoch == at.epoch else 0
        if first:
            rng.bit_generator.state = json.loads(at.generator)
        for step, batch in enumerate(order.split(recipe.batch_size)):
            if step < first:
                continue
            if batch.numel() < 2:  # batch norm has no variance over one image
                break
            done = step * recipe.batch_size
            _set_learning_rate(optimizer, recipe, epoch + done / n)
            _train_step(model, optimizer, images[batch], labels[batch], recipe, rng)
            done += batch.numel()
            if done < n:
                state = functools.partial(_state, model, optimizer, epoch, step + 1, rng)
                keeper.keep(state)
                with keeper.before_the_end(state):
                    progress(epoch * n + done, recipe.epochs * n, _named(epoch, recipe))
        if recipe.after_epoch is not None:
            recipe.after_epoch(model)
        state = functools.partial(_state, model, optimizer, epoch + 1, 0)
        if epoch + 1 < recipe.epochs:
            keeper.keep(state)
        with keeper.before_the_end(state):
            progress((epoch + 1) * n, recipe.epochs * n, _named(epoch, recipe))
    model.eval()


def _named(epoch: int, recipe: Recipe) -> str:
    return f"epoch {epoch + 1}/{recipe.epochs}"


@dataclass(frozen=True)
class _Position:
    """The step that comes next."""

    epoch: int = 0
    step: int = 0
    generator: str = ""
    """State of the epoch's generator before it, as JSON; of no use before the first step."""


def _state(
    model: ResNet,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    step: int,
    rng: np.random.Generator | None = None,
) -> dict[str, Any]:
    """Before that step of that epoch; with the epoch's generator, where it was used already."""
    return {
        "epoch": epoch,
        "step": step,
        "generator": json.dumps(rng.bit_generator.state) if rng is not None else "",
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def _train_step(
    model: ResNet,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    y: Tensor,
    recipe: Recipe,
    rng: np.random.Generator,
) -> None:
    fill = model.normalise.mean_255
    model.train()
    x = pixels.float()
    if recipe.crop_padding:
        x = augment.random_crop(x, padding=recipe.crop_padding, fill_255=fill, rng=rng)
        if recipe.flip:
            x = augment.random_flip(x, rng=rng)
    if recipe.cutout_size is not None:
        x = augment.cutout(x, size=recipe.cutout_size, fill_255=fill, rng=rng)
    with _arithmetic(x.device, recipe):
        loss = _loss(model, x, y, recipe, rng)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _arithmetic(device: torch.device, recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    """Mixed precision where the recipe asks for it and a GPU makes it pay."""
    if recipe.precision == "bf16" and device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


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

"""SGD universal adversarial perturbations (Shafahi et al. 2020), as the paper runs them.

For every batch X of images:      delta <- clip(delta + (step * eps) * sign(g), -eps, eps)
                                  g = grad_delta  mean_{x in X} min(CE(F(clip(x + delta)), y), beta)
Targeted: y is the target class and the loss is descended.

Enters: a frozen deployed model, uint8 images. Leaves: one perturbation per request. Units here
are pixel levels, 0..255, so eps 10 is 10.
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

SAVE_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True)
class Request:
    """One perturbation to craft; `target` None is untargeted. `eps` in pixel levels (1/255)."""

    eps: float
    target: int | None = None


@dataclass(frozen=True)
class SgdSettings:
    """The attack's parameters; see `harness.config.CraftConfig`."""

    epochs: int
    batch_size: int
    step: float
    beta: float
    shuffle: bool
    """False: the images in their order, as the authors had it."""
    batch_statistics: bool
    """True: batch norm in train mode, as the authors had it (protocol `paper`)."""


@dataclass(frozen=True)
class Crafted:
    """A perturbation and what its optimisation saw."""

    delta_255: np.ndarray
    """float32 [C, H, W] in pixel levels, |delta_255| <= eps."""
    loss: tuple[float, ...]
    """Mean clamped loss of each epoch."""
    saturated_fraction: float
    """Share of samples in the last epoch whose loss exceeded beta: they gave no gradient."""
    zero_gradient_fraction: float
    """Share of pixels whose batch gradient was exactly zero in the last epoch."""


Progress = Callable[[int], None]
"""Images processed since the last call."""


def craft_sgd(
    model: nn.Module,
    split: Split,
    request: Request,
    settings: SgdSettings,
    *,
    seed: int,
    key: str,
    partial: Path,
    device: torch.device,
    progress: Progress,
) -> Crafted:
    """Craft one perturbation; a `partial` file of the same `key` is continued.

    Args:
        model: pixels float [N, C, H, W] in [0, 255] -> logits; weights are not changed.
        split: the images it is crafted on, uint8 [N, C, H, W], with labels.
        request: budget and target.
        settings: the attack.
        seed: decides the initial signs and the order of images.
        key: identifies the perturbation, for `partial`.
        partial: state of unfinished work, at most every few seconds.
        device: where to craft; the model is there already.
        progress: told after every batch.

    Returns:
        The last iterate, as in the paper; not rounded.
    """
    eps = request.eps
    images = torch.from_numpy(split.images).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    if request.target is not None:
        labels = torch.full_like(labels, request.target)
    sign = 1.0 if request.target is None else -1.0
    rng = np.random.default_rng(seed)
    start_signs = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), size=split.images.shape[1:])
    delta = torch.from_numpy(start_signs * (eps / 2)).to(device)
    epoch, losses = 0, []
    saved = read_partial(partial, key=key)
    if saved is not None:
        delta, epoch, losses = saved["delta"].to(device), int(saved["epoch"]), saved["losses"]
    saturated = zero_gradient = 0.0
    last_save = time.monotonic()
    _set_batch_statistics(model, settings.batch_statistics)
    n = images.shape[0]
    for epoch in range(epoch, settings.epochs):  # noqa: B020 - resumes at the saved epoch
        order = torch.arange(n, device=device)
        if settings.shuffle:
            permutation = np.random.default_rng((seed, epoch)).permutation(n)
            order = torch.from_numpy(permutation).to(device)
        loss_sum, saturated_count, zero_sum, steps = 0.0, 0, 0.0, 0
        for start in range(0, n, settings.batch_size):
            batch = order[start : start + settings.batch_size]
            gradient, loss, over = _batch_gradient(
                model, images[batch].float(), labels[batch], delta, beta=settings.beta
            )
            delta = (delta + sign * settings.step * eps * gradient.sign()).clamp_(-eps, eps)
            loss_sum += loss * batch.numel()
            saturated_count += over
            zero_sum += float((gradient == 0).float().mean())
            steps += 1
            progress(batch.numel())
        losses = [*losses, loss_sum / n]
        saturated, zero_gradient = saturated_count / n, zero_sum / steps
        unfinished = epoch + 1 < settings.epochs
        if unfinished and time.monotonic() - last_save > SAVE_INTERVAL_SECONDS:
            state = {"delta": delta.cpu(), "epoch": epoch + 1, "losses": losses}
            write_partial(partial, key=key, state=state)
            last_save = time.monotonic()
    _set_batch_statistics(model, False)
    return Crafted(delta.cpu().numpy(), tuple(losses), saturated, zero_gradient)


def _batch_gradient(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, *, beta: float
) -> tuple[Tensor, float, int]:
    """(gradient [C, H, W] of the mean clamped loss, that loss, samples beyond beta)."""
    delta = delta.detach().requires_grad_()
    attacked = (x + delta).clamp(0, 255).contiguous(memory_format=torch.channels_last)
    per_sample = F.cross_entropy(model(attacked), y, reduction="none")
    loss = per_sample.clamp(max=beta).mean()
    (gradient,) = torch.autograd.grad(loss, delta)
    return gradient, float(loss.detach()), int((per_sample.detach() > beta).sum())


def _set_batch_statistics(model: nn.Module, enabled: bool) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Batch statistics, but the running ones stay as trained: the authors' runs
            # polluted each other's models, ours start from the same model every time.
            module.train(enabled)
            module.track_running_stats = not enabled

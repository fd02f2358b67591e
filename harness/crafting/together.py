"""Crafting the perturbations of a model together: one pass over the images, all of them in it.

For every step t of T, and for each of K perturbations with its own batch X of the same images:

    g      = grad_delta  mean_{x in X} min(CE(F(clip(x + delta)), y), beta)
    v     <- momentum * v + g / mean |g|          (no momentum: v = g)
    delta <- clip(delta + (step * eps) * decay(t) * sign(v), -eps, eps)

Targeted: y is the target class and the loss is descended. The K perturbed copies of a batch lie
along the batch axis, so the network runs once for many of them. No perturbation sees another:
each is what it would be if crafted alone (bit for bit on one CPU thread).

Enters: a frozen deployed model, uint8 images. Leaves: one perturbation per request. Units are
pixel levels, 0..255, so eps 10 is 10.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.artefacts import read_partial, write_partial
from harness.crafting.perturbation import chessboard, to_levels
from harness.data.dataset import Split
from harness.models.brought import BroughtModel
from harness.models.integer import IntegerResNet

SAVE_INTERVAL_SECONDS = 5.0
IMAGES_AT_ONCE = {"cpu": 64, "cuda": 4096}
"""Perturbed images in one call of the network at most; a batch of one perturbation is not cut.
On a CPU more do not fit its caches; fewer pay for every call (64: 2.2 times the images a second
of 8 at width 8)."""
PIXEL_VALUES = 3 * 32 * 32
"""Of the images those numbers are for; of larger ones proportionally fewer run at once."""
TINY = 1e-12


@dataclass(frozen=True)
class Request:
    """One perturbation to craft; `target` None is untargeted. `eps` in pixel levels (1/255)."""

    eps: float
    target: int | None = None


@dataclass(frozen=True)
class Job:
    """A request, and the seed of its start and of its order of images."""

    request: Request
    seed: int


@dataclass(frozen=True)
class Rule:
    """How every perturbation of a pass is optimised."""

    epochs: int
    batch_size: int
    step: float
    """Of one update, as a fraction of eps."""
    beta: float
    """Each sample's loss is clamped here."""
    shuffle: bool
    """False: the images in their order, as the authors had it."""
    batch_statistics: bool
    """True: batch norm in train mode, as the authors had it; then one perturbation at a time."""
    momentum: float = 0.0
    decay: bool = False
    """Whether the step falls linearly to nothing; else it is constant."""
    selection: int = 0
    """Attack images on which the result must not lose to its start's signs and to a chessboard;
    0: the last iterate is the result, as in the paper."""


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
    chosen: str = "last iterate"
    """Which candidate it is: the last iterate, `start` or `chessboard`."""


Progress = Callable[[int], None]
"""Images processed since the last call."""


def planned_steps(rule: Rule, n: int) -> int:
    """Steps of one perturbation: the epochs asked for, less what the selection costs.

    A forward pass counts as half a gradient evaluation, so that attacks with and without a
    selection have the same budget.
    """
    steps = rule.epochs * -(-n // rule.batch_size)
    candidates_cost = math.ceil(len(_CANDIDATES) * min(rule.selection, n) / 2)
    return max(1, steps - -(-candidates_cost // rule.batch_size))


def craft_together(
    model: nn.Module,
    split: Split,
    jobs: Sequence[Job],
    rule: Rule,
    *,
    key: str,
    partial: Path,
    device: torch.device,
    progress: Progress,
) -> list[Crafted]:
    """Craft all perturbations in one pass; a `partial` file of the same `key` is continued.

    Args:
        model: pixels float [N, C, H, W] in [0, 255] -> logits; weights are not changed.
        split: the images they are crafted on, uint8 [N, C, H, W], with labels.
        jobs: what to craft, K requests.
        rule: the optimiser.
        key: identifies the jobs, for `partial`.
        partial: state of unfinished work, at most every few seconds.
        device: where to craft; the model is there already.
        progress: told after every step, perturbed images.

    Returns:
        One perturbation a job: whole levels where the rule has a selection, else as it comes.
    """
    n = len(split)
    images = torch.from_numpy(split.images).to(device)  # uint8, resident
    labels = _labels(split, jobs).to(device)  # [K, n]
    # What is selected is whole levels: more of a budget than those cannot be deployed.
    budgets = [_budget(job.request, rule) for job in jobs]
    eps = torch.tensor(budgets, device=device).view(-1, 1, 1, 1)
    direction = torch.tensor([1.0 if j.request.target is None else -1.0 for j in jobs])
    direction = direction.view(-1, 1, 1, 1).to(device)
    start = _start_signs(split, jobs).to(device)
    delta, velocity = start * (eps / 2), torch.zeros_like(start)
    seen = _Seen(len(jobs), device)
    at_step = 0
    saved = read_partial(partial, key=key)
    if saved is not None:
        at_step, delta = int(saved["step"]), saved["delta"].to(device)
        velocity = saved["velocity"].to(device)
        seen.restore(saved["seen"])
    steps, per_epoch = planned_steps(rule, n), -(-n // rule.batch_size)
    order = _orders(jobs, rule, n, epoch=at_step // per_epoch).to(device)
    last_save = time.monotonic()
    with _mode(model, rule, device):
        for t in range(at_step, steps):
            epoch, within = divmod(t, per_epoch)
            if within == 0:
                order = _orders(jobs, rule, n, epoch=epoch).to(device)
                seen.new_epoch()
            batch = order[:, within * rule.batch_size : (within + 1) * rule.batch_size]  # [K, B]
            y = labels.gather(1, batch)
            gradient, loss, over = _gradients(model, images, batch, y, delta, rule)
            update = gradient
            if rule.momentum > 0:
                scale = gradient.abs().mean(dim=(1, 2, 3), keepdim=True) + TINY
                velocity = rule.momentum * velocity + gradient / scale
                update = velocity
            fraction = rule.step * (1 - t / steps if rule.decay else 1.0)
            delta = delta + direction * (fraction * eps) * update.sign()
            delta = torch.minimum(torch.maximum(delta, -eps), eps)
            seen.add(loss, over, gradient, images=batch.shape[1])
            progress(batch.numel())
            if t + 1 < steps and time.monotonic() - last_save > SAVE_INTERVAL_SECONDS:
                state = {"step": t + 1, "delta": delta.cpu(), "velocity": velocity.cpu()}
                write_partial(partial, key=key, state={**state, "seen": seen.state()})
                last_save = time.monotonic()
        found = [(delta[k].cpu().numpy(), "last iterate") for k in range(len(jobs))]
        if rule.selection:
            signs = start.cpu().numpy()
            found = [
                _select(model, images, labels[k], job.request, found[k][0], signs[k], rule)
                for k, job in enumerate(jobs)
            ]
    return [Crafted(*seen.of(k, values), chosen) for k, (values, chosen) in enumerate(found)]


def _budget(request: Request, rule: Rule) -> float:
    return float(math.floor(request.eps)) if rule.selection else request.eps


def _gradients(
    model: nn.Module, images: Tensor, batch: Tensor, y: Tensor, delta: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient [K, C, H, W] of each mean clamped loss, that loss [K], samples beyond beta [K])."""
    K, B = batch.shape
    limit = IMAGES_AT_ONCE.get(delta.device.type, IMAGES_AT_ONCE["cpu"])
    limit = limit * PIXEL_VALUES // max(PIXEL_VALUES, delta[0].numel())
    at_once = 1 if rule.batch_statistics else max(1, limit // B)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, K, at_once):
        chunk = slice(first, min(first + at_once, K))
        leaf = delta[chunk].detach().requires_grad_()
        attacked = (images[batch[chunk]].float() + leaf.unsqueeze(1)).clamp(0, 255).flatten(0, 1)
        logits = model(attacked.contiguous(memory_format=torch.channels_last)).float()
        per_sample = F.cross_entropy(logits, y[chunk].flatten(), reduction="none").view(-1, B)
        loss = per_sample.clamp(max=rule.beta).mean(dim=1)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        over = (per_sample.detach() > rule.beta).sum(dim=1)
        parts.append((gradient, loss.detach(), over))
    gradients, losses, overs = zip(*parts, strict=True)
    return torch.cat(gradients), torch.cat(losses), torch.cat(overs)


_CANDIDATES = ("last iterate", "chessboard", "start")


@torch.no_grad()
def _select(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    request: Request,
    iterate: np.ndarray,
    signs: np.ndarray,
    rule: Rule,
) -> tuple[np.ndarray, str]:
    """The best of the iterate and two patterns nobody optimised, as the device receives them."""
    n, eps = len(images), request.eps
    shape: tuple[int, int, int] = iterate.shape
    candidates: list[np.ndarray] = [iterate, chessboard(shape, eps=eps), signs * eps]
    chosen = torch.linspace(0, n - 1, min(rule.selection, n), device=images.device).long()
    pixels, y = images[chosen].to(torch.int16), labels[chosen]
    best: tuple[int, np.ndarray, str] | None = None
    for values, name in zip(candidates, _CANDIDATES, strict=True):
        levels = to_levels(values, eps=eps)
        attacked = (pixels + torch.from_numpy(levels).to(images.device)).clamp_(0, 255).float()
        successes = 0
        for part, wanted in zip(attacked.split(256), y.split(256), strict=True):
            predicted = model(part.contiguous(memory_format=torch.channels_last)).argmax(dim=1)
            hit = predicted != wanted if request.target is None else predicted == wanted
            successes += int(hit.sum())
        if best is None or successes > best[0]:  # a tie is the optimiser's
            best = successes, levels.astype(np.float32), name
    assert best is not None
    return best[1], best[2]


def _labels(split: Split, jobs: Sequence[Job]) -> Tensor:
    labels = torch.from_numpy(split.labels).expand(len(jobs), -1).clone()
    for k, job in enumerate(jobs):
        if job.request.target is not None:
            labels[k] = job.request.target
    return labels


def _start_signs(split: Split, jobs: Sequence[Job]) -> Tensor:
    """+-1, float32 [K, C, H, W], of each job's own generator."""
    choices, shape = np.array([-1.0, 1.0], dtype=np.float32), split.images.shape[1:]
    signs = [np.random.default_rng(job.seed).choice(choices, size=shape) for job in jobs]
    return torch.from_numpy(np.stack(signs))


def _orders(jobs: Sequence[Job], rule: Rule, n: int, *, epoch: int) -> Tensor:
    """The order of images of each job in an epoch, int64 [K, n]."""
    if not rule.shuffle:
        return torch.arange(n).expand(len(jobs), -1)
    orders = [np.random.default_rng((job.seed, epoch)).permutation(n) for job in jobs]
    return torch.from_numpy(np.stack(orders))


class _Seen:
    """What the optimisation saw, per perturbation: losses of epochs, counts of the last one."""

    def __init__(self, jobs: int, device: torch.device) -> None:
        self._epochs: list[list[float]] = []
        self._counts = torch.zeros(3, jobs, device=device)
        """Sums of loss and of saturated samples over images, of zero gradients over steps."""
        self._images = self._steps = 0

    def new_epoch(self) -> None:
        if self._images:
            self._epochs.append((self._counts[0] / self._images).tolist())
        self._counts.zero_()
        self._images = self._steps = 0

    def add(self, loss: Tensor, over: Tensor, gradient: Tensor, *, images: int) -> None:
        zero = (gradient == 0).float().mean(dim=(1, 2, 3))
        self._counts += torch.stack([loss * images, over.float(), zero])
        self._images += images
        self._steps += 1

    def state(self) -> dict[str, Any]:
        counts = self._counts.cpu()
        return {"epochs": self._epochs, "counts": counts, "n": [self._images, self._steps]}

    def restore(self, state: dict[str, Any]) -> None:
        self._epochs = list(state["epochs"])
        self._counts.copy_(state["counts"])
        self._images, self._steps = state["n"]

    def of(self, k: int, values: np.ndarray) -> tuple[np.ndarray, tuple[float, ...], float, float]:
        loss, over, zero = self._counts[:, k].tolist()
        losses = (*(epoch[k] for epoch in self._epochs), loss / self._images)
        return values, losses, over / self._images, zero / self._steps


@contextlib.contextmanager
def _mode(model: nn.Module, rule: Rule, device: torch.device) -> Iterator[None]:
    """The network as the rule wants it; fast arithmetic on a GPU where that changes no code."""
    set_batch_statistics(model, rule.batch_statistics)
    try:
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                # Whole numbers up to 2^24 are exact in float32 only: no bf16, no TF32 for them.
                # And what reproduces the authors' runs has their arithmetic.
                # What a user brought may not bear bf16 (fake quantisation, operators of its own).
                exact = isinstance(model, IntegerResNet | BroughtModel) or rule.batch_statistics
                flags = torch.backends.cudnn.flags(
                    enabled=True, deterministic=True, allow_tf32=not exact
                )
                stack.enter_context(flags)
                if not exact:
                    stack.enter_context(torch.autocast("cuda", dtype=torch.bfloat16))
            yield
    finally:
        set_batch_statistics(model, False)


def set_batch_statistics(model: nn.Module, enabled: bool) -> None:
    """Batch norm by the batch at hand, or by what training left."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Batch statistics, but the running ones stay as trained: the authors' runs
            # polluted each other's models, ours start from the same model every time.
            module.train(enabled)
            module.track_running_stats = not enabled

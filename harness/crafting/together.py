"""Crafting the perturbations of a model together: one pass over the images, all of them in it.

For every step t of T, and for each of K perturbations with its own batch X of the same images:

    g      = grad_delta  mean_{x in X} min(CE(F(clip(x + delta)), y), beta)
    v     <- momentum * v + g / mean |g|          (no momentum: v = g)
    delta <- clip(delta + (step * eps) * decay(t) * sign(v), -eps, eps)

Targeted: y is the target class, the loss is descended. The K perturbed copies of a batch lie along
the batch axis; each is what it would be if crafted alone (bit for bit on one CPU thread).

A perturbation of several networks takes each step's gradient on one of them, in turn, in an order
drawn anew every round; the division by its mean size keeps one from dominating.

Enters: frozen deployed models, uint8 images. Leaves: one perturbation per request, in pixel levels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.crafting.arithmetic import Function, crafted_on, images_at_once, in_parts
from harness.crafting.perturbation import chessboard
from harness.crafting.seen import Seen
from harness.crafting.selection import (
    CHESSBOARD,
    LAST,
    START,
    WAVE,
    Chosen,
    select,
    selection_cost,
)
from harness.crafting.starts import orders, start_signs, wanted
from harness.crafting.waves import TINY, Wave, find_wave
from harness.data.dataset import Split
from harness.unfinished import Keeper


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
    members: tuple[int, ...] = ()
    """Positions of the networks it is crafted on; empty: all there are."""


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
    """Attack images that choose the result; 0: the last iterate is it, as in the paper."""
    patterns: bool = False
    """Whether the result must not lose there to its start's signs and to a chessboard."""
    waves: int = 0
    """Forward passes to find the wave with that it must not lose to either; 0: none."""
    restarts: int = 1
    """Starts of every perturbation, of which the selection keeps the best."""


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
    chosen: str = LAST
    """Which candidate it is: the last iterate, or a pattern by its name."""
    start_scores: tuple[float, ...] = ()
    """Share of the selection's images on which the last iterate of each start succeeds."""
    wave: Wave | None = None
    """The wave that was found, whether it was chosen or not."""


Progress = Callable[[int], None]
"""Images processed since the last call."""


def planned_steps(rule: Rule, n: int) -> int:
    """Steps of one start: the epochs asked for, less its share of what else its result costs.

    So attacks with and without a selection have the same budget.
    """
    steps = rule.epochs * -(-n // rule.batch_size)
    images = min(rule.selection, n)
    patterns = 2 * rule.patterns + bool(rule.waves)
    cost = selection_cost(images=images, starts=rule.restarts, patterns=patterns)
    cost += math.ceil(rule.waves / 2)
    return max(1, steps - math.ceil(cost / rule.restarts / rule.batch_size))


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
        model: pixels float [N, C, H, W] in [0, 255] -> logits; weights are not changed. Or an
            `nn.ModuleList` of several such networks, for perturbations of more than one.
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
    if (rule.restarts > 1 or rule.waves) and not rule.selection:
        raise ValueError("restarts and waves need images to choose among them")
    networks = list(model) if isinstance(model, nn.ModuleList) else [model]
    n, starts = len(split), _starts(jobs, rule)
    images = torch.from_numpy(split.images).to(device)  # uint8, resident
    targets = [start.request.target for start in starts]
    labels = wanted(split.labels, targets).to(device)  # [K, n], K starts of all jobs
    # What is selected is whole levels: more of a budget than those cannot be deployed.
    budgets = [_budget(start.request, rule) for start in starts]
    eps = torch.tensor(budgets, device=device).view(-1, 1, 1, 1)
    direction = torch.tensor([1.0 if target is None else -1.0 for target in targets])
    direction = direction.view(-1, 1, 1, 1).to(device)
    signs = start_signs([start.seed for start in starts], _shape(split)).to(device)
    delta, velocity = signs * (eps / 2), torch.zeros_like(signs)
    seen = Seen(len(starts), device)
    at_step, waves, searching = 0, list[Wave](), dict[str, Any]()
    keeper = Keeper(partial, key)
    saved = keeper.kept()
    if saved is not None:
        waves = [Wave(*values) for values in saved.get("waves", ())]
        searching = saved.get("searching", {})
        at_step, delta = int(saved["step"]), saved["delta"].to(device)
        velocity = saved["velocity"].to(device)
        seen.restore(saved["seen"])
    steps, per_epoch = planned_steps(rule, n), -(-n // rule.batch_size)

    def order_of(epoch: int) -> Tensor:
        seeds = [start.seed for start in starts]
        return orders(seeds, n, epoch=epoch, shuffle=rule.shuffle).to(device)

    order = order_of(at_step // per_epoch)

    def state(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "delta": delta.cpu(),
            "velocity": velocity.cpu(),
            "seen": seen.state(),
            "waves": [astuple(wave) for wave in waves],
            "searching": searching,
        }

    def save(step: int) -> None:
        keeper.keep(lambda: state(step))

    def keep(found: dict[str, Any]) -> None:
        nonlocal searching
        searching = found
        save(at_step)

    with crafted_on(networks, batch_statistics=rule.batch_statistics, device=device) as functions:
        for job in jobs[len(waves) :] if rule.waves else ():
            with keeper.before_the_end(lambda: state(at_step)):
                found_wave = find_wave(
                    [functions[i] for i in _members(job, len(networks))],
                    images,
                    labels[rule.restarts * len(waves)],
                    eps=job.request.eps,
                    targeted=job.request.target is not None,
                    seed=job.seed,
                    passes=rule.waves,
                    progress=lambda forwards: progress(forwards // 2),
                    saved=searching or None,
                    save=keep,
                )
            waves.append(found_wave.wave)
            searching = {}
            save(at_step)
        for t in range(at_step, steps):
            epoch, within = divmod(t, per_epoch)
            if within == 0:
                order = order_of(epoch)
                seen.new_epoch()
            batch = order[:, within * rule.batch_size : (within + 1) * rule.batch_size]  # [K, B]
            y = labels.gather(1, batch)
            gradient, loss = torch.empty_like(delta), torch.empty(len(starts), device=device)
            over = torch.empty_like(loss)
            for i, turn in _turns(starts, len(networks), t).items():
                gradient[turn], loss[turn], over[turn] = _gradients(
                    functions[i], images, batch[turn], y[turn], delta[turn], rule
                )
            update = gradient
            if rule.momentum > 0:
                scale = gradient.abs().mean(dim=(1, 2, 3), keepdim=True) + TINY
                velocity = rule.momentum * velocity + gradient / scale
                update = velocity
            fraction = rule.step * (1 - t / steps if rule.decay else 1.0)
            delta = delta + direction * (fraction * eps) * update.sign()
            delta = torch.minimum(torch.maximum(delta, -eps), eps)
            seen.add(loss, over, gradient, images=batch.shape[1])
            with keeper.before_the_end(lambda t=t: state(t + 1)):  # type: ignore[misc]
                progress(batch.numel())
            if t + 1 < steps:
                save(t + 1)
        found = []
        for k, job in enumerate(jobs):
            first = k * rule.restarts
            mine = delta[first : first + rule.restarts].cpu().numpy()
            chosen, wave = Chosen(mine[0], LAST, ()), waves[k] if waves else None
            if rule.selection:
                start = signs[first].cpu().numpy() if rule.patterns else None
                chosen = select(
                    [functions[i] for i in _members(job, len(networks))],
                    images,
                    labels[first],
                    list(mine),
                    _patterns(_shape(split), start, wave),
                    eps=job.request.eps,
                    targeted=job.request.target is not None,
                    count=rule.selection,
                )
            best = first + chosen.start
            summary = seen.of(best, chosen.values)
            found.append(Crafted(*summary, chosen.name, chosen.scores, wave))
    return found


def _patterns(
    shape: tuple[int, int, int], start: np.ndarray | None, wave: Wave | None
) -> dict[str, np.ndarray]:
    """Candidates beside the iterates, +-1 by name; a chessboard wherever random signs are one."""
    found = {} if start is None else {CHESSBOARD: chessboard(shape, eps=1.0), START: start}
    return found if wave is None else found | {WAVE: wave.signs(shape)}


def _shape(split: Split) -> tuple[int, int, int]:
    channels, height, width = split.images.shape[1:]
    return channels, height, width


def _starts(jobs: Sequence[Job], rule: Rule) -> list[Job]:
    """Every start of every job as a job of its own; the first is the job itself."""
    return [
        job if i == 0 else replace(job, seed=zlib.crc32(f"{job.seed}/{i}".encode()) % 2**31)
        for job in jobs
        for i in range(rule.restarts)
    ]


def _members(job: Job, networks: int) -> tuple[int, ...]:
    return job.members or tuple(range(networks))


def _turns(starts: Sequence[Job], networks: int, t: int) -> dict[int, list[int]]:
    """Network -> the starts whose turn on it step t is.

    In a round every one of its own networks has one step, whatever others are crafted beside it.
    """
    turns: dict[int, list[int]] = {}
    for k, start in enumerate(starts):
        mine = _members(start, networks)
        this_round, at = divmod(t, len(mine))
        order = np.random.default_rng((start.seed, this_round)).permutation(len(mine))
        turns.setdefault(mine[int(order[at])], []).append(k)
    return turns


def _budget(request: Request, rule: Rule) -> float:
    whole = rule.selection and (rule.patterns or rule.waves)
    return float(math.floor(request.eps)) if whole else request.eps


def _gradients(
    logits_of: Function, images: Tensor, batch: Tensor, y: Tensor, delta: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient [K, C, H, W] of each mean clamped loss, that loss [K], samples beyond beta [K])."""
    K, B = batch.shape
    at_once = 1 if rule.batch_statistics else images_at_once(images) // B

    def of_some(k: slice) -> tuple[Tensor, Tensor, Tensor]:
        return _of_chunk(logits_of, images[batch[k]], y[k], delta[k], rule)

    gradients, losses, overs = zip(*in_parts(K, at_once, of_some), strict=True)
    return torch.cat(gradients), torch.cat(losses), torch.cat(overs)


def _of_chunk(
    logits_of: Function, images: Tensor, y: Tensor, delta: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients` of the k perturbations of one call; `images` uint8 [k, B, C, H, W]."""
    leaf = delta.detach().requires_grad_()
    attacked = (images.float() + leaf.unsqueeze(1)).clamp(0, 255).flatten(0, 1)
    per_sample = F.cross_entropy(logits_of(attacked), y.flatten(), reduction="none").view(y.shape)
    loss = per_sample.clamp(max=rule.beta).mean(dim=1)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    over = (per_sample.detach() > rule.beta).float().sum(dim=1)
    return gradient, loss.detach(), over

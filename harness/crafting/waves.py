"""A gradient-free attack: the plane wave that a network bears least.

To single directions of the Fourier basis convolutional networks are far more sensitive than to
noise, and to the same ones for most images (Tsuzuku and Sato, CVPR 2019). So a universal
perturbation can be found among a few hundred patterns, with forward passes alone:

    w(y, x) = sign cos(2 pi (across x / W + down y / H) + phase)     the same in every channel

times the whole budget. Frequencies are whole numbers of periods, two in every octave; the highest
is one pixel up, one pixel down, which in both directions is the chessboard. Each has four waves:
two phases a quarter of a period apart, and either sign.

Which frequency is found by sequential halving (Karnin, Koren, Somekh, ICML 2013): every round has
the same number of passes, asks all that are left about the next images, their four waves in turn,
and keeps the better half. They are compared by the mean of tanh(margin / its typical size):
that has no scale, so a network whose logits are blown up until its softmax has no slope hides
nothing from it. The last round is of the four waves of the one that is left.

Enters: frozen deployed models, uint8 images. Leaves: one wave; pixel levels, 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.crafting.arithmetic import Function, crafted_on, images_at_once, in_parts, margin
from harness.data.splits import Split
from harness.unfinished import Keeper

PHASES = (1 / 3, 1 / 3 + math.pi / 2)
"""Not a fraction of a turn: no cosine of a whole number of pixels is zero, so none has no sign."""
FORMS = tuple((phase, sign) for phase in PHASES for sign in (1, -1))
"""The waves of one frequency."""
MOST_PASSES = 2**15
"""Of one search. More tell apart only waves that do the same."""
FIRST_IMAGES = 2
"""That a frequency is asked about in the first round; with fewer passes, fewer frequencies."""
TINY = 1e-12

Progress = Callable[[int], None]
"""Forward passes since the last call."""
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Wave:
    """A square plane wave over an image."""

    across: int
    """Periods over the width."""
    down: int
    """Periods over the height; negative leans the other way."""
    phase: float
    sign: int

    def signs(self, shape: Shape) -> np.ndarray:
        """+-1, float32 [C, H, W]."""
        channels, height, width = shape
        turns = np.add.outer(
            self.down * np.arange(height) / height, self.across * np.arange(width) / width
        )
        positive = np.cos(2 * np.pi * turns + self.phase) >= 0
        values = np.where(positive, self.sign, -self.sign).astype(np.float32)
        return np.broadcast_to(values, (channels, height, width))


@dataclass(frozen=True)
class FoundWave:
    """The best wave, and what finding it took."""

    wave: Wave
    success: float
    """Share of the last round's images on which it succeeds."""
    forwards: int
    """Images that went through the networks."""


@dataclass(frozen=True)
class FourierSettings:
    """The search as an attack of its own."""

    passes: int
    """Forward passes, at most."""


@dataclass(frozen=True)
class Searched:
    """A perturbation without gradients, and what the search saw."""

    delta_255: np.ndarray
    """float32 [C, H, W] in pixel levels, |delta_255| <= eps."""
    found: FoundWave


def frequencies(shape: Shape) -> list[tuple[int, int]]:
    """(across, down) in whole periods, half a plane: the other half has the same waves."""
    _, height, width = shape
    pairs = {
        # At the highest, leaning either way is the same; along an axis there is no lean.
        (across, down * lean)
        for across in _octaves(width)
        for down in _octaves(height)
        for lean in ((1,) if across in (0, width / 2) or down in (0, height / 2) else (1, -1))
    }
    return sorted(pairs)


def _octaves(pixels: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, ... up to half of the pixels: two in every octave."""
    highest = pixels // 2
    found = {0, highest}
    step = 1
    while step <= highest:
        found |= {step, *([3 * step // 2] if step > 1 and 3 * step // 2 <= highest else [])}
        step *= 2
    return sorted(found)


@cache
def rounds(n_frequencies: int, passes: int, n: int) -> tuple[tuple[int, int], ...]:
    """(frequencies, images each of them is asked about) round by round, the last excepted.

    What the last round has is `passes` less all that; see `find_wave`.
    """
    left = n_frequencies
    while left > 1 and FIRST_IMAGES * left * (_halvings(left) + 1) > passes:
        left -= 1
    a_round = passes // (_halvings(left) + 1)
    found = []
    while left > 1:
        found.append((left, min(n, max(1, a_round // left))))
        left = -(-left // 2)
    return tuple(found)


def _halvings(count: int) -> int:
    return max(0, math.ceil(math.log2(count)))


@torch.no_grad()
def find_wave(
    networks: Sequence[Function],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    targeted: bool,
    seed: int,
    passes: int,
    progress: Progress = lambda _passes: None,
    saved: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda _state: None,
) -> FoundWave:
    """The wave that does most, at a cost of about `passes` forward passes (a handful at least).

    Args:
        networks: pixels float [N, C, H, W] in [0, 255] -> logits; of several, each is asked about
            an equal share of the images.
        images: uint8 [n, C, H, W], the attack images.
        labels: int64 [n], the true classes, or the target class where targeted.
        eps: the budget in pixel levels; of one that is not whole, what can be deployed is used.
        targeted: whether success is the label predicted, not another one.
        seed: of the order of images. Which frequencies are tried, where not all can be, is the same
            for all seeds and budgets: else a curve over budgets would show the luck of a draw.
        passes: forward passes to spend; beyond `MOST_PASSES` none is.
        progress: told of forward passes as they are made.
        saved: what `save` was given last, to go on from there.
        save: told after every round what it takes to go on.
    """
    shape: Shape = (images.shape[1], images.shape[2], images.shape[3])
    n, passes = len(images), min(passes, MOST_PASSES)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    known = frequencies(shape)
    plan = rounds(len(known), passes, n)
    first = plan[0][0] if plan else 1
    left = sorted(int(i) for i in np.random.default_rng(0).permutation(len(known))[:first])
    sums, seen, scale, forwards = np.zeros(len(known)), 0, 0.0, 0
    if saved is not None:
        left, seen, scale = list(saved["left"]), int(saved["seen"]), float(saved["scale"])
        sums, forwards = saved["sums"].numpy(), int(saved["forwards"])
    sense = -1.0 if targeted else 1.0
    asked = _Asked(networks, images, labels, float(math.floor(eps)), sense, progress)

    def margins(arms: list[list[Wave]], k: int) -> Tensor:
        """Of every arm (its waves in turn) the margins on the next k images, [arms, k]."""
        at = np.arange(seen, seen + k)
        signs = np.stack([[w.signs(shape)[:1] for w in waves] for waves in arms]).astype(np.int8)
        return asked.margins(torch.from_numpy(signs), torch.from_numpy(order[at % n]), at)

    for count, k in plan:
        if count > len(left):  # done before
            continue
        found = margins([[Wave(*known[i], *v) for v in FORMS] for i in left], k)
        scale = scale or float(found.abs().median()) + TINY
        sums[left] += torch.tanh(found / scale).sum(dim=1).double().cpu().numpy()
        seen, forwards = seen + k, forwards + k * count
        best = np.argsort(-sums[left], kind="stable")[: -(-count // 2)]
        left = sorted(left[i] for i in best)
        state = {"left": left, "seen": seen, "scale": scale, "forwards": forwards}
        save({**state, "sums": torch.from_numpy(sums.copy())})
    finalists = [Wave(*known[left[0]], *v) for v in FORMS]
    k = min(n, max(1, (passes - forwards) // len(finalists)))
    found = margins([[wave] for wave in finalists], k)
    successes = (found > 0).double().mean(dim=1)
    value = successes + 1e-6 * torch.tanh(found / (scale or 1.0)).mean(dim=1)  # in a tie
    best_of_four = int(value.argmax())
    forwards += k * len(finalists)
    return FoundWave(finalists[best_of_four], float(successes[best_of_four]), forwards)


@dataclass(frozen=True)
class _Asked:
    """Networks, and the images they are asked about."""

    networks: Sequence[Function]
    images: Tensor
    labels: Tensor
    level: float
    sense: float
    progress: Progress

    def margins(self, signs: Tensor, which: Tensor, at: np.ndarray) -> Tensor:
        """[arms, k] margins in the attacker's sense.

        Args:
            signs: int8 [arms, V, 1, H, W], what the images of each arm get in turn.
            which: [k] the images.
            at: [k] their place in the search, which says whose turn it is.
        """
        device = self.images.device
        signs, which = signs.to(device), which.to(device)
        found = torch.empty(len(signs), len(which), device=device)
        # Every network with every wave, in an order that no image's place has to do with.
        pairs = np.random.default_rng(0).permutation(len(self.networks) * len(FORMS))[
            at % (len(self.networks) * len(FORMS))
        ]
        form = torch.from_numpy(pairs % len(FORMS) % signs.shape[1]).to(device)
        for i, network in enumerate(self.networks):
            mine = torch.from_numpy(np.flatnonzero(pairs // len(FORMS) == i)).to(device)
            cells = torch.cartesian_prod(torch.arange(len(signs), device=device), mine)

            def ask(part: slice, network: Function = network, cells: Tensor = cells) -> None:
                arm, image = cells[part].unbind(1)
                levels = self.level * signs[arm, form[image]].float()
                pixels = self.images[which[image]].float() + levels
                logits = network(pixels.clamp_(0, 255))
                found[arm, image] = self.sense * margin(logits, self.labels[which[image]])
                self.progress(len(arm))

            in_parts(len(cells), images_at_once(self.images), ask)
        return found


def craft_fourier(
    models: Sequence[nn.Module],
    split: Split,
    *,
    eps: float,
    target: int | None,
    seed: int,
    settings: FourierSettings,
    key: str,
    partial: Path,
    device: torch.device,
    progress: Progress,
) -> Searched:
    """Search for one perturbation; a `partial` file of the same `key` is continued.

    Args:
        models: pixels float [N, C, H, W] in [0, 255] -> logits; only ever run forward. Of several,
            each is asked about an equal share of the images.
        split: the images it is crafted on, uint8 [N, C, H, W], with labels.
        eps: the budget in pixel levels.
        target: a class, or None for any other than the label.
        seed: of the order of images.
        settings: the search.
        key: identifies the work, for `partial`.
        partial: state of unfinished work, at most every few seconds, after a round.
        device: where to craft; the model is there already.
        progress: told of forward passes.
    """
    labels = torch.from_numpy(split.labels).to(device)
    keeper = Keeper(partial, key)
    state = keeper.kept() or {}

    def save(after_a_round: dict[str, Any]) -> None:
        nonlocal state
        state = after_a_round
        keeper.keep(lambda: state)

    with (
        crafted_on(models, batch_statistics=False, device=device) as functions,
        keeper.before_the_end(lambda: state),
    ):
        found = find_wave(
            functions,
            torch.from_numpy(split.images).to(device),  # uint8, resident
            labels if target is None else torch.full_like(labels, target),
            eps=eps,
            targeted=target is not None,
            seed=seed,
            passes=settings.passes,
            progress=progress,
            saved=state or None,
            save=save,
        )
    shape: Shape = (split.images.shape[1], split.images.shape[2], split.images.shape[3])
    return Searched(found.wave.signs(shape) * float(math.floor(eps)), found)

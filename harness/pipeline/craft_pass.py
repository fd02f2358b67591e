"""One crafting pass: a model and the names of its perturbations -> their files.

Enters: a frozen model, whoever made it, and the images to craft on. Leaves: `cache/<name>.pt`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from harness.config import CraftConfig
from harness.crafting.momentum import MomentumSettings, selection_images
from harness.crafting.perturbation import (
    Perturbation,
    from_levels,
    save_perturbation,
    to_levels,
)
from harness.crafting.sgd import SgdSettings
from harness.crafting.together import Crafted, Job, Request, craft_together, planned_steps
from harness.data.dataset import Split
from harness.pipeline.context import TRAIN_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress
from harness.pipeline.uap_names import attack_of
from harness.workspace import UapName

Settings = SgdSettings | MomentumSettings


def craft_pass(
    context: Context,
    model: nn.Module,
    names: Sequence[UapName],
    *,
    keys: Sequence[str],
    identity: str,
    settings: Settings,
    split: Split,
    partial: Path,
    progress: Progress,
    meta: dict[str, Any] | None = None,
) -> None:
    """Craft the named perturbations of one model together and write their files.

    Args:
        context: the workspace.
        model: pixels float [N, C, H, W] in [0, 255] -> logits; frozen.
        names: one source, one attack.
        keys: digest of what each perturbation depends on.
        identity: digest of the model: its checkpoint file's, where it has one here.
        settings: of the attack.
        split: the images they are crafted on.
        partial: state of unfinished work.
        progress: told how far it is.
        meta: what else each file says of where it came from.
    """
    use_cpu_threads(TRAIN_THREADS)
    paper = context.config.protocol == "paper"
    steps = planned_steps(settings.rule, len(split))
    total, done = settings.epochs * len(split) * len(names), 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(min(done / total, 1.0), f"{len(names)} at once" if len(names) > 1 else "")

    together = hashlib.sha256(" ".join(keys).encode()).hexdigest()
    crafted = craft_together(
        model.to(context.accelerator),
        split,
        [
            Job(
                Request(name.eps, name.target),
                seed=zlib.crc32(f"{name.seed}/{name.stem}".encode()) % 2**31,
            )
            for name in names
        ],
        settings.rule,
        key=f"{together} on {identity}",
        partial=partial,
        device=context.accelerator,
        progress=advance,
    )
    for name, key, found in zip(names, keys, crafted, strict=True):
        # The deployed perturbation is whole levels; rounding now makes every later step exact.
        levels = found.delta_255 if paper else to_levels(found.delta_255, eps=name.eps)
        perturbation = new_perturbation(context, name, key, from_levels(levels))
        everything = {
            **perturbation.meta,
            "attack": attack_of(context, name),
            "checkpoint_sha256": identity,
            "settings": asdict(settings),
            "images": len(split),
            "steps": steps,
            **_what_was_seen(found),
            **(meta or {}),
        }
        save_perturbation(context.workspace.uap(name), replace(perturbation, meta=everything))
    partial.unlink(missing_ok=True)


def _what_was_seen(found: Crafted) -> dict[str, object]:
    return {
        "loss": list(found.loss),
        "saturated_fraction": found.saturated_fraction,
        "zero_gradient_fraction": found.zero_gradient_fraction,
        "chosen": found.chosen,
    }


def new_perturbation(
    context: Context, name: UapName, key: str, delta: npt.NDArray[np.float32]
) -> Perturbation:
    """What was just made, with what the workspace says of it."""
    return Perturbation(
        delta=delta,
        eps=name.eps,
        source=name.source,
        target=name.target,
        dataset=context.data.name,
        protocol=context.config.protocol,
        seed=name.seed,
        meta={"key": key, "attack": name.source},
    )


def _sgd_settings(craft: CraftConfig, _n: int, paper: bool, batch_statistics: bool) -> SgdSettings:
    return SgdSettings(
        epochs=craft.epochs,
        batch_size=craft.batch_size,
        step=craft.step,
        beta=craft.beta,
        shuffle=not paper,
        batch_statistics=batch_statistics,
    )


def _momentum_settings(
    craft: CraftConfig, n: int, paper: bool, batch_statistics: bool
) -> MomentumSettings:
    return MomentumSettings(
        epochs=craft.epochs,
        batch_size=craft.inner_batch,
        step=craft.step,
        beta=craft.beta,
        momentum=craft.momentum,
        shuffle=not paper,
        batch_statistics=batch_statistics,
        selection=selection_images(n),
    )


SETTINGS: dict[str, Callable[[CraftConfig, int, bool, bool], Settings]] = {
    "sgd": _sgd_settings,
    "momentum": _momentum_settings,
}
"""(configuration, attack images, protocol `paper`, batch statistics) -> the attack's settings."""

"""One crafting pass: models and the names of their perturbations -> their files.

Enters: frozen models, whoever made them, and the images to craft on. Leaves: `cache/<name>.pt`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from harness.crafting.arithmetic import set_batch_statistics
from harness.crafting.perturbation import (
    Perturbation,
    from_levels,
    save_perturbation,
    to_levels,
)
from harness.crafting.probe import probe_gradients
from harness.crafting.together import (
    Crafted,
    Job,
    Request,
    craft_together,
    planned_steps,
)
from harness.crafting.waves import FourierSettings, Searched, craft_fourier
from harness.data.dataset import Split
from harness.pipeline.attack_settings import Settings, evaluations
from harness.pipeline.context import TRAIN_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress
from harness.pipeline.uap_names import attack_of
from harness.workspace import UapName


def craft_pass(
    context: Context,
    networks: Sequence[nn.Module],
    names: Sequence[UapName],
    *,
    members: Sequence[tuple[int, ...]],
    keys: Sequence[str],
    identities: Sequence[str],
    settings: Settings,
    split: Split,
    probe: Sequence[bool],
    partial: Path,
    progress: Progress,
    meta: dict[str, Any] | None = None,
) -> None:
    """Craft the named perturbations together and write their files.

    Args:
        context: the workspace.
        networks: pixels float [N, C, H, W] in [0, 255] -> logits; frozen.
        names: of one attack.
        members: of each name, the places of the networks it is crafted on.
        keys: digest of what each perturbation depends on.
        identities: of each, the digest of what it is crafted on: a checkpoint file's, if there is
            one.
        settings: of the attack.
        split: the images they are crafted on.
        probe: of each, whether its network's gradients are measured beside it.
        partial: state of unfinished work.
        progress: told how far it is.
        meta: what else each file says of where it came from.
    """
    use_cpu_threads(TRAIN_THREADS)
    paper = context.config.protocol == "paper"
    for network in networks:
        set_batch_statistics(network, False)
        network.to(context.accelerator)
    total, done = evaluations(settings, len(split)) * len(names), 0.0

    def advance(images: float) -> None:
        nonlocal done
        done += images
        progress(min(done / total, 1.0), f"{len(names)} at once" if len(names) > 1 else "")

    jobs = [
        Job(
            Request(name.eps, name.target),
            seed=zlib.crc32(f"{name.seed}/{name.stem}".encode()) % 2**31,
            members=places,
        )
        for name, places in zip(names, members, strict=True)
    ]
    crafted: Iterable[Crafted | Searched]
    steps: int | None = None
    if isinstance(settings, FourierSettings):
        # One after the other, each saved before the next: a kill costs one of them at most.
        crafted = (
            craft_fourier(
                [networks[i] for i in job.members],
                split,
                eps=job.request.eps,
                target=job.request.target,
                seed=job.seed,
                settings=settings,
                key=f"{key} on {identity}",
                partial=partial,
                device=context.accelerator,
                progress=lambda forwards: advance(forwards / 2),
            )
            for job, key, identity in zip(jobs, keys, identities, strict=True)
        )
    else:
        steps = planned_steps(settings.rule, len(split))
        crafted = craft_together(
            nn.ModuleList(networks),
            split,
            jobs,
            settings.rule,
            key=hashlib.sha256(" ".join([*keys, *identities]).encode()).hexdigest(),
            partial=partial,
            device=context.accelerator,
            progress=advance,
        )
    for i, (name, found) in enumerate(zip(names, crafted, strict=True)):
        # The deployed perturbation is whole levels; rounding now makes every later step exact.
        levels = found.delta_255 if paper else to_levels(found.delta_255, eps=name.eps)
        perturbation = new_perturbation(context, name, keys[i], from_levels(levels))
        everything = {
            **perturbation.meta,
            "attack": attack_of(context, name),
            "checkpoint_sha256": identities[i],
            "settings": asdict(settings),
            "images": len(split),
            **({} if steps is None else {"steps": steps}),
            **_what_was_seen(found),
            **(meta or {}),
        }
        if probe[i] and not isinstance(settings, FourierSettings):
            everything["probe"] = asdict(
                probe_gradients(
                    networks[members[i][0]],
                    split,
                    eps=name.eps,
                    beta=settings.beta,
                    seed=name.seed,
                    device=context.accelerator,
                )
            )
        save_perturbation(context.workspace.uap(name), replace(perturbation, meta=everything))
    partial.unlink(missing_ok=True)


def _what_was_seen(found: Crafted | Searched) -> dict[str, object]:
    if isinstance(found, Searched):
        return asdict(found.found)
    return {
        "loss": list(found.loss),
        "saturated_fraction": found.saturated_fraction,
        "zero_gradient_fraction": found.zero_gradient_fraction,
        "chosen": found.chosen,
        "start_scores": list(found.start_scores),
        **({} if found.wave is None else {"wave": asdict(found.wave)}),
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

"""Stage `craft`: checkpoint -> universal adversarial perturbations, a source's in one pass.

Enters: a variant's checkpoint, or those of the fleet, and the attack split. Leaves:
`cache/<source>_eps<E>[_t<T>].pt`.
Under protocol `clean` the model that is attacked is the deployed form: what is crafted on is what
ships. Under `paper` it is the trained model, as it was for the authors.

There is a task for every file, but the first task of a source crafts all that the source lacks;
the others find theirs made. Sources are crafted side by side, each on one thread; the fleet and
all that leave one variant out of it are one source, since their models are the same.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from harness.crafting.perturbation import (
    Perturbation,
    chessboard,
    from_levels,
    random_sign,
    save_perturbation,
    to_levels,
)
from harness.crafting.probe import probe_gradients
from harness.crafting.spsa import Searched, SpsaSettings, craft_spsa, planned_pairs
from harness.crafting.together import (
    Crafted,
    Job,
    Request,
    craft_together,
    planned_steps,
    set_batch_statistics,
)
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.attack_settings import (
    Settings,
    craft_split,
    probed,
    settings_of,
)
from harness.pipeline.checkpoints import (
    deployed_form,
    task_name,
)
from harness.pipeline.context import TRAIN_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress, Task
from harness.pipeline.uap_files import check_name, checkpoints_sha256, uap_key, valid_uap
from harness.pipeline.uap_names import attack_of
from harness.records import CONTROLS, variant_named
from harness.sources import FLEET, is_ensemble, members
from harness.workspace import UapName

CRAFT_COST = {"full": 2.2, "sfp": 2.2, "pp": 2.2, "apot": 4.5}
"""Forward passes that one image of one step costs: forward and input gradient."""


def craft_tasks(context: Context, names: list[UapName]) -> list[Task]:
    """Craft the named perturbations. Their sources' checkpoints are made by tasks before these.

    Raises:
        UsageError: a source, target, attack, budget or seed that does not exist.
    """
    for name in names:
        check_name(context, name)
    tasks: list[Task] = []
    passes: dict[tuple[str, str, bool], _Pass] = {}
    for name in names:
        if name.source in CONTROLS:
            tasks.append(_control_task(context, name))
            continue
        settings = settings_of(context, name)
        # A pass has one rule: under protocol `paper`, targeted runs may have another.
        source = FLEET if is_ensemble(name.source) else name.source
        group = (source, attack_of(context, name), _statistics(settings))
        if group not in passes:
            passes[group] = _Pass(context, settings)
        passes[group].names.append(name)
    for craft_pass in passes.values():
        tasks += craft_pass.tasks()
    return tasks


def _control_task(context: Context, name: UapName) -> Task:
    return Task(
        stage="craft",
        name=f"craft {name.stem}",
        work=0.0,
        is_done=lambda: valid_uap(context, name),
        run=lambda _progress: _make_control(context, name),
        side_by_side=True,
    )


@dataclass
class _Pass:
    """The perturbations of one source, or of all ensembles, made by whichever task runs first."""

    context: Context
    settings: Settings
    names: list[UapName] = field(default_factory=list)
    _made: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tasks(self) -> list[Task]:
        """One task a perturbation: the first that is missing stands for the work of all."""
        context = self.context
        variants = [variant_named(m) for name in self.names for m in members(name.source)]
        cost = sum(CRAFT_COST[variant.method] for variant in variants) / len(variants)
        work = cost * _passes(self.settings) * len(craft_split(context))
        trained = tuple(dict.fromkeys(task_name(variant.name) for variant in variants))
        missing = [name for name in self.names if not valid_uap(context, name)]
        first = missing[0] if missing else self.names[0]

        def task(name: UapName) -> Task:
            before = () if name is first else (f"craft {first.stem}",)
            share = 0 if name in missing[1:] else max(1, len(missing)) if name is first else 1
            return Task(
                stage="craft",
                name=f"craft {name.stem}",
                work=work * share,
                # What this very pass made was not there before: its task is run, in no time.
                is_done=lambda: name.stem not in self._made and valid_uap(context, name),
                run=self._run,
                side_by_side=True,
                after=(*trained, *before),
            )

        return [task(name) for name in self.names]

    def _run(self, progress: Progress) -> None:
        with self._lock:
            missing = [n for n in self.names if not valid_uap(self.context, n)]
            if missing:
                partial = self.context.workspace.partial(f"craft_{self.names[0].stem}")
                _craft(self.context, missing, self.settings, partial, progress)
                self._made.update(name.stem for name in missing)


def _craft(
    context: Context,
    names: Sequence[UapName],
    settings: Settings,
    partial: Path,
    progress: Progress,
) -> None:
    use_cpu_threads(TRAIN_THREADS)
    workspace, split = context.workspace, craft_split(context)
    keys = [uap_key(context, name) for name in names]
    paper = context.config.protocol == "paper"
    fleet = list(dict.fromkeys(member for name in names for member in members(name.source)))
    trained = [load_checkpoint(workspace.checkpoint(member)).build() for member in fleet]
    # The authors' protocol needs batch norm to be there; ours has it folded.
    networks = [network if paper else deployed_form(network) for network in trained]
    model = nn.ModuleList(networks)
    set_batch_statistics(model, False)
    model.requires_grad_(requires_grad=False).to(context.accelerator)
    checkpoints = {name.source: checkpoints_sha256(context, name.source) for name in names}
    total, done = _passes(settings) * len(split) * len(names), 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(min(done / total, 1.0), f"{len(names)} at once" if len(names) > 1 else "")

    together = hashlib.sha256(" ".join([*keys, *checkpoints.values()]).encode()).hexdigest()
    jobs = [
        Job(
            Request(name.eps, name.target),
            seed=zlib.crc32(f"{name.seed}/{name.stem}".encode()) % 2**31,
            members=tuple(fleet.index(member) for member in members(name.source)),
        )
        for name in names
    ]
    crafted: Sequence[Crafted | Searched]
    if isinstance(settings, SpsaSettings):
        steps = planned_pairs(settings, len(split))
        crafted = [
            craft_spsa(
                networks[job.members[0]],
                split,
                job,
                settings,
                key=f"{key} on {checkpoints[name.source]}",
                partial=partial,
                device=context.accelerator,
                progress=advance,
            )
            for name, job, key in zip(names, jobs, keys, strict=True)
        ]
    else:
        steps = planned_steps(settings.rule, len(split))
        crafted = craft_together(
            model,
            split,
            jobs,
            settings.rule,
            key=together,
            partial=partial,
            device=context.accelerator,
            progress=advance,
        )
    for name, key, found in zip(names, keys, crafted, strict=True):
        # The deployed perturbation is whole levels; rounding now makes every later step exact.
        levels = found.delta_255 if paper else to_levels(found.delta_255, eps=name.eps)
        perturbation = _perturbation(context, name, key, from_levels(levels))
        meta = {
            **perturbation.meta,
            "attack": attack_of(context, name),
            "checkpoint_sha256": checkpoints[name.source],
            "settings": asdict(settings),
            "images": len(split),
            "steps": steps,
            **_what_was_seen(found),
        }
        if probed(context, name) and not isinstance(settings, SpsaSettings):
            meta["probe"] = asdict(
                probe_gradients(
                    networks[fleet.index(name.source)],
                    split,
                    eps=name.eps,
                    beta=settings.beta,
                    seed=name.seed,
                    device=context.accelerator,
                )
            )
        save_perturbation(workspace.uap(name), replace(perturbation, meta=meta))
    partial.unlink(missing_ok=True)


def _passes(settings: Settings) -> int:
    """How often one perturbation sees every attack image."""
    return settings.epochs * (1 if isinstance(settings, SpsaSettings) else settings.restarts)


def _statistics(settings: Settings) -> bool:
    return not isinstance(settings, SpsaSettings) and settings.batch_statistics


def _what_was_seen(found: Crafted | Searched) -> dict[str, object]:
    if isinstance(found, Searched):
        return {"objective": list(found.objective), "forwards": found.forwards}
    return {
        "loss": list(found.loss),
        "saturated_fraction": found.saturated_fraction,
        "zero_gradient_fraction": found.zero_gradient_fraction,
        "chosen": found.chosen,
        "start_scores": list(found.start_scores),
    }


def _make_control(context: Context, name: UapName) -> None:
    shape = context.image_shape
    if name.source == "random":
        seed = zlib.crc32(f"{name.seed}/{name.stem}".encode())
        delta_255 = random_sign(shape, eps=name.eps, seed=seed)
    else:
        delta_255 = chessboard(shape, eps=name.eps)
    key = uap_key(context, name)
    levels = to_levels(delta_255, eps=name.eps)
    save_perturbation(
        context.workspace.uap(name), _perturbation(context, name, key, from_levels(levels))
    )


def _perturbation(
    context: Context, name: UapName, key: str, delta: npt.NDArray[np.float32]
) -> Perturbation:
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

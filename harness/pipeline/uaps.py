"""Stage `craft`: checkpoint -> universal adversarial perturbations, a source's in one pass.

Enters: a variant's checkpoint, or those of the fleet, and the attack split. Leaves:
`cache/<source>_eps<E>[_t<T>].pt`.
Under protocol `clean` the model that is attacked is the deployed form: what is crafted on is what
ships. Under `paper` it is the trained model, as it was for the authors.

There is a task for every file, but the first task of a source crafts all that the source lacks;
the others find theirs made. Sources are crafted side by side, each on one thread; on a GPU one
after the other. The fleet and all that leave one variant out of it are one source, since their
models are the same.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.crafting.perturbation import (
    chessboard,
    from_levels,
    random_sign,
    save_perturbation,
    to_levels,
)
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.attack_settings import (
    Settings,
    craft_split,
    evaluations,
    probed,
    settings_of,
)
from harness.pipeline.checkpoints import (
    deployed_form,
    task_name,
)
from harness.pipeline.context import Context
from harness.pipeline.craft_pass import craft_pass, new_perturbation
from harness.pipeline.tasks import Progress, Shared, Task
from harness.pipeline.uap_files import (
    check_name,
    checkpoints_sha256,
    say_if_damaged,
    uap_key,
    valid_uap,
)
from harness.pipeline.uap_names import attack_of
from harness.records import CONTROLS, variant_named
from harness.sources import FLEET, is_ensemble, members
from harness.workspace import UapName

CRAFT_COST = {"full": 2.2, "sfp": 2.2, "pp": 2.2, "apot": 4.5}
"""Forward passes that one image of one step costs: forward and input gradient."""


def say_what_is_left_of(context: Context, budgets: set[float]) -> None:
    """Of a budget between two whole pixel levels, where perturbations end with those."""
    between = sorted(eps for eps in budgets if eps != int(eps))
    if between and context.config.protocol == "clean":
        said = " and ".join(f"{int(eps)} of eps {eps:g}" for eps in between)
        context.reporter.note(f"perturbations end with whole pixel levels: {said}")


def craft_tasks(context: Context, names: list[UapName]) -> list[Task]:
    """Craft the named perturbations. Their sources' checkpoints are made by tasks before these.

    Raises:
        UsageError: a source, target, attack, budget or seed that does not exist.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        check_name(context, name)
    say_what_is_left_of(context, {name.eps for name in names})
    tasks: list[Task] = []
    groups: dict[tuple[str, str, Settings], _Pass] = {}
    for name in names:
        if name.source in CONTROLS:
            tasks.append(_control_task(context, name))
            continue
        settings = settings_of(context, name)
        # A pass has one rule: targeted perturbations may have another.
        source = FLEET if is_ensemble(name.source) else name.source
        group = (source, attack_of(context, name), settings)
        if group not in groups:
            groups[group] = _Pass(context, settings)
        groups[group].names.append(name)
    for one_pass in groups.values():
        tasks += one_pass.tasks()
    return tasks


def _control_task(context: Context, name: UapName) -> Task:
    return Task(
        stage="craft",
        name=f"craft {name.stem}",
        work=0.0,
        is_done=lambda: valid_uap(context, name),
        run=lambda _progress: _make_control(context, name),
        beside=_beside(context),
        uses=context.uses("accelerator"),
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
        work = cost * evaluations(self.settings, len(craft_split(context)))
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
                beside=_beside(context),
                after=(*trained, *before),
                uses=context.uses("accelerator"),
            )

        return [task(name) for name in self.names]

    def _run(self, progress: Progress) -> None:
        with self._lock:
            missing = [n for n in self.names if not valid_uap(self.context, n)]
            if missing:
                for name in missing:
                    say_if_damaged(self.context, name)
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
    fleet = list(dict.fromkeys(member for name in names for member in members(name.source)))
    files = [context.workspace.checkpoint(member) for member in fleet]
    trained = [load_checkpoint(path).build() for path in files]
    # The authors' protocol needs batch norm to be there; ours has it folded.
    paper = context.config.protocol == "paper"
    networks = [network if paper else deployed_form(network) for network in trained]
    for network in networks:
        network.requires_grad_(requires_grad=False)
    craft_pass(
        context,
        networks,
        names,
        members=[tuple(fleet.index(m) for m in members(name.source)) for name in names],
        keys=[uap_key(context, name) for name in names],
        identities=[checkpoints_sha256(context, name.source) for name in names],
        settings=settings,
        split=craft_split(context),
        probe=[probed(context, name) for name in names],
        partial=partial,
        progress=progress,
    )


def _beside(context: Context) -> Shared | None:
    # One pass fills a GPU; and the arithmetic that it sets there is the process's.
    return "accelerator" if context.accelerator.type == "cpu" else None


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
        context.workspace.uap(name), new_perturbation(context, name, key, from_levels(levels))
    )

"""Stage `craft`: checkpoint -> universal adversarial perturbations, a source's in one pass.

Enters: a variant's checkpoint and the attack split. Leaves: `cache/<source>_eps<E>[_t<T>].pt`.
Under protocol `clean` the model that is attacked is the deployed form: what is crafted on is what
ships. Under `paper` it is the trained model, as it was for the authors.

There is a task for every file, but the first task of a source crafts all that the source lacks;
the others find theirs made. Sources are crafted side by side, each on one thread.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from harness.artefacts import cache_key
from harness.config import ATTACKS, MAX_EPS_255, MIN_EPS_255
from harness.crafting.perturbation import (
    chessboard,
    from_levels,
    load_perturbation,
    random_sign,
    save_perturbation,
    to_levels,
)
from harness.data.dataset import Split
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.checkpoints import (
    checkpoint_key,
    deployed_form,
    task_name,
    valid_checkpoint,
)
from harness.pipeline.context import Context
from harness.pipeline.craft_pass import SETTINGS, Settings, craft_pass, new_perturbation
from harness.pipeline.tasks import Progress, Task
from harness.pipeline.uap_names import attack_of
from harness.records import CONTROLS, UsageError, variant_named
from harness.workspace import UapName

VERSION = 1
MAX_SEED = 2**31
"""As in harness.toml."""
CRAFT_COST = {"full": 2.2, "sfp": 2.2, "pp": 2.2, "apot": 4.5}
"""Forward passes that one image of one step costs: forward and input gradient."""


def craft_tasks(context: Context, names: list[UapName]) -> list[Task]:
    """Craft the named perturbations. Their sources' checkpoints are made by tasks before these.

    Raises:
        UsageError: a source, target, attack, budget or seed that does not exist.
    """
    for name in names:
        _check_name(context, name)
    tasks: list[Task] = []
    passes: dict[tuple[str, str, bool], _Pass] = {}
    for name in names:
        if name.source in CONTROLS:
            tasks.append(_control_task(context, name))
            continue
        settings = settings_of(context, name)
        # A pass has one rule: under protocol `paper`, targeted runs may have another.
        group = (name.source, attack_of(context, name), settings.batch_statistics)
        if group not in passes:
            passes[group] = _Pass(context, settings)
        passes[group].names.append(name)
    for one_pass in passes.values():
        tasks += one_pass.tasks()
    return tasks


def uap_key(context: Context, name: UapName) -> str:
    """Digest of everything the perturbation depends on."""
    shape, config = context.image_shape, context.config
    labels = [context.data.name, config.protocol]
    if name.source in CONTROLS:
        return cache_key("control", VERSION, name=name.stem, shape=shape, labels=labels)
    paper = config.protocol == "paper"
    return cache_key(
        "craft",
        VERSION,
        attack=attack_of(context, name),
        eps=name.eps,
        target=name.target,
        seed=name.seed,
        settings=asdict(settings_of(context, name)),
        labels=labels,
        source=checkpoint_key(context, variant_named(name.source)),
        images=context.data.digests["evaluation" if paper else "attack"],
    )


def valid_uap(context: Context, name: UapName) -> bool:
    """Whether the perturbation on disk is what the configuration asks for.

    Raises:
        UsageError: there is a file, but it is damaged.
    """
    path = context.workspace.uap(name)
    if not path.exists():
        return False
    perturbation = load_perturbation(path)
    if perturbation.meta.get("key") != uap_key(context, name):
        return False
    if name.source in CONTROLS:
        return True
    variant = variant_named(name.source)
    if not valid_checkpoint(context, variant):
        return False
    checkpoint_sha256 = context.sha256(context.workspace.checkpoint(variant.name))
    return perturbation.meta.get("checkpoint_sha256") == checkpoint_sha256


def check_request(context: Context, name: UapName) -> None:
    """Refuse a budget, a seed or a target class that there is not, of whatever source.

    Raises:
        UsageError: naming the perturbation and the limit.
    """
    if not MIN_EPS_255 <= name.eps <= MAX_EPS_255:
        raise UsageError(
            f"{name.stem}: eps {name.eps:g} must be from {MIN_EPS_255:g} to {MAX_EPS_255:g} "
            "(1/255 units)"
        )
    if name.seed >= MAX_SEED:
        raise UsageError(f"{name.stem}: seed {name.seed} must be below 2^31")
    if name.target is not None and name.target >= len(context.data.classes):
        n_classes = len(context.data.classes)
        raise UsageError(f"{name.stem}: target {name.target}, but there are {n_classes} classes")


def _check_name(context: Context, name: UapName) -> None:
    if name.source in CONTROLS and name.target is not None:
        raise UsageError(f"{name.stem}: a control has no target class")
    check_request(context, name)
    if name.source in CONTROLS:
        return
    variant_named(name.source)
    if name.attack == context.config.attack:
        plain = replace(name, attack="").stem
        raise UsageError(f"{name.stem}: {name.attack} is this workspace's attack: name it {plain}")
    if attack_of(context, name) not in ATTACKS:
        known = ", ".join(ATTACKS)
        raise UsageError(f"{name.stem}: unknown attack {name.attack!r}; this version has {known}")


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
    """The perturbations of one source: whichever task runs first crafts all that are missing."""

    context: Context
    settings: Settings
    names: list[UapName] = field(default_factory=list)
    _made: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tasks(self) -> list[Task]:
        """One task a perturbation: the first that is missing stands for the work of all."""
        context, variant = self.context, variant_named(self.names[0].source)
        work = CRAFT_COST[variant.method] * self.settings.epochs * len(_craft_split(context))
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
                after=(task_name(name.source), *before),
            )

        return [task(name) for name in self.names]

    def _run(self, progress: Progress) -> None:
        with self._lock:
            missing = [n for n in self.names if not valid_uap(self.context, n)]
            if missing:
                partial = self.context.workspace.partial(f"craft_{self.names[0].stem}")
                _craft(self.context, missing, self.settings, partial, progress)
                self._made.update(name.stem for name in missing)


def _craft_split(context: Context) -> Split:
    data = context.data
    return data.evaluation if context.config.protocol == "paper" else data.attack


def settings_of(context: Context, name: UapName) -> Settings:
    """How a perturbation is crafted, of the configuration, the protocol and its name."""
    craft = context.config.craft
    paper = context.config.protocol == "paper"
    # The authors left batch norm in train mode for all quantised, SVHN and targeted runs.
    quantised = variant_named(name.source).method == "apot"
    in_train_mode = quantised or context.data.name == "svhn" or name.target is not None
    make = SETTINGS[attack_of(context, name)]
    return make(craft, len(_craft_split(context)), paper, paper and in_train_mode)


def _craft(
    context: Context,
    names: Sequence[UapName],
    settings: Settings,
    partial: Path,
    progress: Progress,
) -> None:
    source = names[0].source
    path = context.workspace.checkpoint(source)
    trained = load_checkpoint(path).build()
    # The authors' protocol needs batch norm to be there; ours has it folded.
    paper = context.config.protocol == "paper"
    model: nn.Module = trained if paper else deployed_form(trained)
    craft_pass(
        context,
        model.requires_grad_(requires_grad=False),
        names,
        keys=[uap_key(context, name) for name in names],
        identity=context.sha256(path),
        settings=settings,
        split=_craft_split(context),
        partial=partial,
        progress=progress,
    )


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

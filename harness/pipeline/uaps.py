"""Stage `craft`: checkpoint -> universal adversarial perturbation.

Enters: a variant's checkpoint and the attack split. Leaves: `cache/<source>_eps<E>[_t<T>].pt`.
Under protocol `clean` the model that is attacked is the deployed form: what is crafted on is what
ships. Under `paper` it is the trained model, as it was for the authors.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import nn

from harness.artefacts import cache_key
from harness.config import MAX_EPS_255, MIN_EPS_255
from harness.crafting.perturbation import (
    Perturbation,
    chessboard,
    from_levels,
    load_perturbation,
    random_sign,
    save_perturbation,
    to_levels,
)
from harness.crafting.sgd import Request, SgdSettings, craft_sgd
from harness.data.dataset import Split
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.checkpoints import checkpoint_key, deployed_form, valid_checkpoint
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress, Task
from harness.records import CONTROLS, UsageError, variant_named
from harness.workspace import UapName

VERSION = 1
MAX_SEED = 2**31
"""As in harness.toml."""
CRAFT_COST = {"full": 2.2, "sfp": 2.2, "pp": 2.2, "apot": 4.5}
"""Forward passes that one image of one step costs: forward and input gradient."""


def white_box_names(context: Context, source: str) -> list[UapName]:
    """The untargeted UAPs of a source, one per budget of the configuration."""
    craft = context.config.craft
    budgets = sorted({*craft.eps, craft.transfer_eps})
    return [_name(context, source, eps) for eps in budgets]


def transfer_name(context: Context, source: str) -> UapName:
    """The UAP of a source that goes into the transfer matrix."""
    return _name(context, source, context.config.craft.transfer_eps)


def targeted_names(context: Context, source: str) -> list[UapName]:
    """The targeted UAPs of a source, one per target class."""
    eps = context.config.craft.transfer_eps
    return [_name(context, source, eps, target=target) for target in context.targets]


def control_names(context: Context) -> list[UapName]:
    """Random sign and chessboard at every budget."""
    return [name for control in CONTROLS for name in white_box_names(context, control)]


def _name(context: Context, source: str, eps: float, target: int | None = None) -> UapName:
    config = context.config
    return UapName(source, eps, target=target, attack=config.attack, seed=config.seed)


def craft_tasks(context: Context, names: list[UapName]) -> list[Task]:
    """Craft the named perturbations. Their sources' checkpoints are made by tasks before these.

    Raises:
        UsageError: a source, target, attack, budget or seed that does not exist.
    """
    loaded = _LoadedModel(context)
    return [_craft_task(context, name, loaded) for name in names]


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
        attack=name.attack,
        eps=name.eps,
        target=name.target,
        seed=name.seed,
        settings=asdict(_settings(context, name)),
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


@dataclass
class _LoadedModel:
    """The deployed form of one source at a time: tasks of a source follow each other."""

    context: Context
    name: str = ""
    model: nn.Module | None = None

    def get(self, source: str) -> nn.Module:
        if self.model is None or self.name != source:
            checkpoint = load_checkpoint(self.context.workspace.checkpoint(source))
            trained = checkpoint.build()
            # The authors' protocol needs batch norm to be there; ours has it folded.
            paper = self.context.config.protocol == "paper"
            model = trained if paper else deployed_form(trained)
            self.model = model.requires_grad_(requires_grad=False).to(self.context.accelerator)
            self.name = source
        return self.model


def _craft_task(context: Context, name: UapName, loaded: _LoadedModel) -> Task:
    control = name.source in CONTROLS
    if not MIN_EPS_255 <= name.eps <= MAX_EPS_255:
        raise UsageError(
            f"{name.stem}: eps {name.eps:g} must be from {MIN_EPS_255:g} to {MAX_EPS_255:g} "
            "(1/255 units)"
        )
    if name.seed >= MAX_SEED:
        raise UsageError(f"{name.stem}: seed {name.seed} must be below 2^31")
    if control and name.target is not None:
        raise UsageError(f"{name.stem}: a control has no target class")
    if not control:
        variant = variant_named(name.source)
        if name.attack != context.config.attack:
            raise UsageError(f"unknown attack {name.attack!r}: this version has sgd")
    if name.target is not None and name.target >= len(context.data.classes):
        n_classes = len(context.data.classes)
        raise UsageError(f"{name.stem}: target {name.target}, but there are {n_classes} classes")
    craft = context.config.craft
    images = _craft_split(context)
    return Task(
        stage="craft",
        name=f"craft {name.stem}",
        work=0.0 if control else CRAFT_COST[variant.method] * craft.epochs * len(images),
        is_done=lambda: valid_uap(context, name),
        run=lambda progress: (
            _make_control(context, name) if control else _craft(context, name, loaded, progress)
        ),
    )


def _craft_split(context: Context) -> Split:
    data = context.data
    return data.evaluation if context.config.protocol == "paper" else data.attack


def _settings(context: Context, name: UapName) -> SgdSettings:
    craft = context.config.craft
    paper = context.config.protocol == "paper"
    # The authors left batch norm in train mode for all quantised, SVHN and targeted runs.
    quantised = variant_named(name.source).method == "apot"
    in_train_mode = quantised or context.data.name == "svhn" or name.target is not None
    return SgdSettings(
        epochs=craft.epochs,
        batch_size=craft.batch_size,
        step=craft.step,
        beta=craft.beta,
        shuffle=not paper,
        batch_statistics=paper and in_train_mode,
    )


def _craft(context: Context, name: UapName, loaded: _LoadedModel, progress: Progress) -> None:
    use_cpu_threads(CPU_THREADS)
    workspace, settings = context.workspace, _settings(context, name)
    split = _craft_split(context)
    key = uap_key(context, name)
    checkpoint_sha256 = context.sha256(workspace.checkpoint(name.source))
    partial = workspace.partial(f"craft_{name.stem}")
    total, done = settings.epochs * len(split), 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(done / total, "")

    crafted = craft_sgd(
        loaded.get(name.source),
        split,
        Request(name.eps, name.target),
        settings,
        seed=zlib.crc32(f"{name.seed}/{name.stem}".encode()) % 2**31,
        key=f"{key} on {checkpoint_sha256}",
        partial=partial,
        device=context.accelerator,
        progress=advance,
    )
    paper = context.config.protocol == "paper"
    # The deployed perturbation is whole levels; rounding now makes every later step exact.
    levels = crafted.delta_255 if paper else to_levels(crafted.delta_255, eps=name.eps)
    perturbation = _perturbation(context, name, key, from_levels(levels))
    perturbation = replace(
        perturbation,
        meta={
            **perturbation.meta,
            "attack": name.attack,
            "checkpoint_sha256": checkpoint_sha256,
            "settings": asdict(settings),
            "images": len(split),
            "steps": settings.epochs * -(-len(split) // settings.batch_size),
            "loss": list(crafted.loss),
            "saturated_fraction": crafted.saturated_fraction,
            "zero_gradient_fraction": crafted.zero_gradient_fraction,
        },
    )
    save_perturbation(workspace.uap(name), perturbation)
    partial.unlink(missing_ok=True)


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

"""Stage `craft` for a model that the user brings: their function and checkpoint -> perturbations.

Enters: a `Recipe` and the data. Leaves: `cache/<name>_eps<E>[_t<T>].pt`, as for a variant. The
model is attacked as it is: nothing is folded, weights are frozen, batch norm is in eval mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from harness.artefacts import cache_key
from harness.crafting.perturbation import load_perturbation
from harness.models.brought import BroughtModel, Recipe, load_brought, theirs
from harness.models.brought_checks import Reading, check_attackable, read_accuracy
from harness.pipeline.attack_settings import (
    MAKERS,
    Settings,
    evaluations,
    for_target,
    probed,
    settings_key,
)
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.craft_pass import craft_pass
from harness.pipeline.tasks import Progress, Task
from harness.pipeline.uap_files import PROBE_VERSION, check_request, say_if_damaged
from harness.pipeline.uap_names import attack_of
from harness.records import UsageError
from harness.workspace import UapName

VERSION = 1
COST = 2.2
"""Forward passes that one image of one step costs: forward and input gradient."""


@dataclass(frozen=True, eq=False)
class Brought:
    """A user's model, loaded and checked against the workspace's images."""

    context: Context
    recipe: Recipe

    @cached_property
    def model(self) -> BroughtModel:
        """The model, on the CPU.

        Raises:
            UsageError: it cannot be made, or does not fit the images.
        """
        use_cpu_threads(CPU_THREADS)
        return load_brought(self.recipe)

    @cached_property
    def identity(self) -> str:
        """Digest of what the model computes; raises as `check_attackable` does."""
        data = self.context.data
        self.model.cpu()
        return check_attackable(
            self.model,
            data.evaluation.images,
            classes=len(data.classes),
            what=f"--factory {self.recipe.factory}",
        )

    @cached_property
    def reading(self) -> Reading:
        """Clean accuracy, and the warning it gives rise to."""
        data, device = self.context.data, self.context.accelerator
        with theirs(f"--factory {self.recipe.factory}: its model on evaluation images"):
            return read_accuracy(
                self.model.to(device),
                self.recipe.convention,
                data.evaluation,
                names=data.classes,
                own_statistics=(
                    tuple(v / 255 for v in data.mean_255),
                    tuple(v / 255 for v in data.std_255),
                ),
                device=device,
            )


def brought_tasks(brought: Brought, names: list[UapName]) -> list[Task]:
    """Craft the named perturbations of the model, those of the same settings in one pass.

    Raises:
        UsageError: the model, a budget, a target or the protocol is not what can be attacked.
    """
    if not names:
        return []
    context = brought.context
    if context.config.protocol == "paper":
        raise UsageError(
            "protocol paper reproduces the authors' runs of their own variants: craft on a model "
            "you bring under protocol = 'clean' (harness.toml)"
        )
    for name in names:
        check_request(context, name)
    _ = brought.identity  # what cannot be attacked is refused before anything is built
    groups: dict[tuple[str, Settings], list[UapName]] = {}
    for name in dict.fromkeys(names):
        group = (attack_of(context, name), _settings(context, name))
        groups.setdefault(group, []).append(name)
    return [_pass(brought, names, settings) for (_, settings), names in groups.items()]


def _pass(brought: Brought, names: list[UapName], settings: Settings) -> Task:
    """Perturbations of one attack and the same settings, crafted together."""
    context = brought.context

    def missing() -> list[UapName]:
        return [name for name in names if not _is_valid(brought, name)]

    def run(progress: Progress) -> None:
        lacking, recipe = missing(), brought.recipe
        for name in lacking:
            say_if_damaged(context, name)
        with theirs(f"--factory {recipe.factory}: crafting on its model"):
            craft_pass(
                context,
                [brought.model],
                lacking,
                members=[(0,)] * len(lacking),
                keys=[_key(context, name, brought.identity) for name in lacking],
                identities=[brought.identity] * len(lacking),
                settings=settings,
                split=context.data.attack,
                probe=[probed(context, name) for name in lacking],
                partial=context.workspace.partial(f"craft_{names[0].stem}"),
                progress=progress,
                meta={
                    "factory": recipe.factory,
                    "convention": recipe.convention.options(),
                    "clean_accuracy": brought.reading.accuracy,
                },
            )

    return Task(
        stage="craft",
        name=f"craft {names[0].stem}",
        work=COST * evaluations(settings, len(context.data.attack)) * max(1, len(missing())),
        is_done=lambda: not missing(),
        run=run,
    )


def _is_valid(brought: Brought, name: UapName) -> bool:
    path = brought.context.workspace.uap(name)
    if not path.exists():
        return False
    try:
        key = load_perturbation(path, own=True).meta.get("key")
    except UsageError:  # damaged: made again
        return False
    return key == _key(brought.context, name, brought.identity)


def crafted_on(context: Context, name: UapName) -> str | None:
    """The identity of the model that a perturbation was crafted on, by this configuration.

    None where there is no such file, or it was crafted otherwise.
    """
    path = context.workspace.uap(name)
    try:
        meta = load_perturbation(path, own=True).meta if path.exists() else {}
    except UsageError:
        return None
    identity = meta.get("checkpoint_sha256")
    valid = isinstance(identity, str) and meta.get("key") == _key(context, name, identity)
    return identity if valid else None


def _key(context: Context, name: UapName, identity: str) -> str:
    """Digest of everything the perturbation depends on."""
    return cache_key(
        "craft_brought",
        VERSION,
        attack=attack_of(context, name),
        eps=name.eps,
        target=name.target,
        seed=name.seed,
        settings=settings_key(_settings(context, name)),
        labels=[context.data.name, context.config.protocol],
        source=[name.source, identity],
        images=context.data.digests["attack"],
        # Written only where there is one: other perturbations stay valid.
        **({"probe": PROBE_VERSION} if probed(context, name) else {}),
    )


def _settings(context: Context, name: UapName) -> Settings:
    make = MAKERS[attack_of(context, name)]
    settings = make(context.config.craft, len(context.data.attack), False, False)
    return for_target(settings, name.target)

"""Commands that build artefacts: `train`, `craft`; what `export` shares with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.brought_options import BroughtOptions, brought_options
from harness.cli.experiment import agreed_workspace, dataset_option
from harness.cli.options import (
    accelerator_option,
    chosen_sources,
    chosen_variants,
    data_dir_option,
    dry_run_option,
    json_option,
    make_context,
    source_options,
    variant_options,
    working_in,
    workspace_option,
)
from harness.cli.plan_table import print_plan
from harness.config_rules import ATTACKS
from harness.records import CONTROLS, UsageError
from harness.sources import is_ensemble, members

if TYPE_CHECKING:
    from harness.pipeline.brought import Brought
    from harness.pipeline.context import Context
    from harness.pipeline.tasks import Task
    from harness.workspace import UapName


@click.command()
@variant_options
@workspace_option
@accelerator_option
@data_dir_option
@dry_run_option
@json_option
def train(
    models: tuple[str, ...],
    all_models: bool,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train and compress variants: cache/VARIANT.pt.

    What a variant starts from (full for pruning and quantisation) is trained first. Killed at any
    moment, the same command continues.

    \b
    Examples:
      harness train --all
      harness train --model full --model q4
    """
    variants = chosen_variants(models, all_models)

    def tasks(context: Context) -> tuple[list[Task], list[Path]]:
        from harness.pipeline.checkpoints import train_tasks

        paths = [context.workspace.checkpoint(name) for name in variants]
        return train_tasks(context, variants), paths

    build_artefacts(root, accelerator, data_dir, dry_run, as_json, tasks)


@click.command()
@source_options
@click.option(
    "--control",
    "controls",
    multiple=True,
    type=click.Choice(CONTROLS),
    help="A perturbation nobody optimised; may be repeated.",
)
@click.option("--eps", type=float, multiple=True, help="Budget in 1/255; may be repeated.")
@click.option(
    "--target", "targets", type=click.IntRange(min=0), multiple=True, help="Target class."
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 100),
    metavar="N",
    help="N crafting seeds, each perturbation a file for every one: the experiment's seed, and "
    "those after it (cache/VARIANT_epsE_sS.pt).  [default: craft.seeds of harness.toml]",
)
@click.option(
    "--attack",
    type=click.Choice(ATTACKS),
    help="How: momentum, the paper's sgd, or fourier, which uses no gradients.  [default: the "
    "workspace's, from harness.toml]",
)
@brought_options
@dataset_option
@workspace_option
@accelerator_option
@data_dir_option
@dry_run_option
@json_option
def craft(
    models: tuple[str, ...],
    all_models: bool,
    controls: tuple[str, ...],
    eps: tuple[float, ...],
    targets: tuple[int, ...],
    seeds: int | None,
    attack: str | None,
    brought: BroughtOptions,
    dataset: str | None,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Craft universal perturbations: cache/VARIANT_epsE.pt, cache/VARIANT_epsE_tT.pt.

    Without --eps and --target: everything the configuration asks for of these variants.

    `--model fleet` is one perturbation crafted on all ten variants at once; `fleet_without_q4`
    one crafted on all but q4, for an attack on q4 by who has the rest of the fleet (leave-one-out
    black box).
    With --factory: on a PyTorch classifier of your own, of any image size, one or three channels,
    as cache/NAME_epsE.pt. It is attacked as it is, in eval mode, and warned of when it reads the
    images otherwise than it was trained to. OMP_NUM_THREADS says how many cores may work.

    \b
    Examples:
      harness craft --model full --eps 10
      harness craft --model q4 --eps 10 --target 3
      harness craft --model full --eps 10 --seeds 5
      harness craft --model fleet --model fleet_without_q4 --eps 10
      harness craft --model q4 --eps 10 --attack fourier
      harness craft --control chessboard --eps 10
      harness craft --factory mypkg.net:make --checkpoint net.pt --dataset photos.npz --eps 8
    """
    brought.check()
    sources = list(controls)
    if brought and (models or all_models):
        raise UsageError("--factory and --model or --all exclude each other: craft on one of them")
    if brought and seeds is not None:
        raise UsageError("--seeds does not go with --factory: change seed in harness.toml instead")
    if models or all_models or not (controls or brought):
        sources += chosen_sources(models, all_models)
    if targets and controls:
        raise UsageError("--target does not go with --control: a control has no target class")
    if attack is not None and controls and not (models or all_models or brought):
        raise UsageError("--attack does not go with --control: a control attacks nothing")
    for value in eps:
        if not 1 <= value <= 255:
            raise UsageError(f"--eps {value:g} must be from 1 to 255 (1/255 units)")

    from harness.pipeline.checkpoints import train_tasks
    from harness.pipeline.uaps import craft_tasks, say_what_is_left_of

    workspace = agreed_workspace(root, None, dataset, None)
    # Whether a model can be attacked is tried on images, also before a dry run.
    planning = dry_run and not brought
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir, planning=planning)
    context = _with_seeds(context, seeds)
    names = _uap_names(context, sources, eps, targets, attack)
    trained = [name for source in sources for name in members(source)]
    tasks = train_tasks(context, trained) + craft_tasks(context, names)
    model = brought.load(context) if brought else None
    if model is not None:
        from harness.pipeline.brought import brought_tasks

        own = _uap_names(context, [model.recipe.name], eps, targets, attack)
        say_what_is_left_of(context, {name.eps for name in own} - {name.eps for name in names})
        names, tasks = names + own, tasks + brought_tasks(model, own)
    paths = [context.workspace.uap(name) for name in names]
    build_in(context, tasks, paths, dry_run=dry_run, as_json=as_json, brought=model)


def _uap_names(
    context: Context,
    sources: list[str],
    eps: tuple[float, ...],
    targets: tuple[int, ...],
    attack: str | None,
) -> list[UapName]:
    from dataclasses import replace

    from harness.pipeline.uap_names import (
        gradient_free_names,
        named,
        targeted_names,
        transfer_names,
        white_box_names,
    )

    names: list[UapName] = []
    for source in sources:
        control = source in CONTROLS
        if eps or targets:
            budgets = eps or (context.config.craft.reference_eps,)
            names += named(context, source, budgets, () if control else targets)
        elif is_ensemble(source):
            names += transfer_names(context, source)
        else:
            names += white_box_names(context, source)
            names += [] if control else targeted_names(context, source)
            if not control and attack is None:
                names += gradient_free_names(context, source)
    if attack not in (None, context.config.attack):  # the workspace's own has it not in its name
        names = [n if n.source in CONTROLS else replace(n, attack=attack) for n in names]
    return names


def _with_seeds(context: Context, seeds: int | None) -> Context:
    """The context with that many crafting seeds, for this command alone.

    Raises:
        UsageError: a seed too large for a file.
    """
    from dataclasses import replace

    if seeds is None:
        return context
    config = context.config
    if config.seed + seeds > 2**31:
        raise UsageError(
            f"--seeds {seeds}: the experiment's seed is {config.seed}, and they end at 2^31 - 1"
        )
    changed = replace(config, craft=replace(config.craft, seeds=seeds))
    return replace(context, workspace=replace(context.workspace, config=changed))


def build_artefacts(
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
    make_tasks: Callable[[Context], tuple[list[Task], list[Path]]],
    *,
    dataset: str | None = None,
) -> None:
    """Run a command's tasks and print the files they leave."""
    workspace = agreed_workspace(root, None, dataset, None)
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir, planning=dry_run)
    build_in(context, *make_tasks(context), dry_run=dry_run, as_json=as_json)


def build_in(
    context: Context,
    tasks: list[Task],
    paths: list[Path],
    *,
    dry_run: bool,
    as_json: bool,
    brought: Brought | None = None,
) -> None:
    """Run tasks and print the files they leave, or only say what they would build."""
    import json

    if dry_run:
        print_plan(context, tasks, as_json=as_json, brought=brought)
        return
    with working_in(context.workspace):
        context.build(tasks)
    shown = [str(path) for path in paths]
    click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(shown))

"""Commands that build artefacts: `train`, `craft`; what `export` shares with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.options import (
    accelerator_option,
    chosen_variants,
    data_dir_option,
    dry_run_option,
    existing_or_new_workspace,
    json_option,
    make_context,
    variant_options,
    working_in,
    workspace_option,
)
from harness.cli.plan_table import print_plan
from harness.config import ATTACKS
from harness.records import CONTROLS, UsageError

if TYPE_CHECKING:
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
@variant_options
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
    "--attack",
    type=click.Choice(ATTACKS),
    help="How: momentum, the paper's sgd, or spsa, which uses no gradients.  [default: the "
    "workspace's, from harness.toml]",
)
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
    attack: str | None,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Craft universal perturbations: cache/VARIANT_epsE.pt, cache/VARIANT_epsE_tT.pt.

    Without --eps and --target: everything the configuration asks for of these variants.

    \b
    Examples:
      harness craft --model full --eps 10
      harness craft --model q4 --eps 10 --target 3
      harness craft --model q4 --eps 10 --attack spsa
      harness craft --control chessboard --eps 10
    """
    sources = list(controls)
    if models or all_models or not controls:
        sources += chosen_variants(models, all_models)
    if targets and controls:
        raise UsageError("--target does not go with --control: a control has no target class")
    if attack is not None and controls and not (models or all_models):
        raise UsageError("--attack does not go with --control: a control attacks nothing")
    for value in eps:
        if not 1 <= value <= 255:
            raise UsageError(f"--eps {value:g} must be from 1 to 255 (1/255 units)")

    def tasks(context: Context) -> tuple[list[Task], list[Path]]:
        from harness.pipeline.checkpoints import train_tasks
        from harness.pipeline.uaps import craft_tasks

        names = _uap_names(context, sources, eps, targets, attack)
        trained = [name for name in sources if name not in CONTROLS]
        paths = [context.workspace.uap(name) for name in names]
        return train_tasks(context, trained) + craft_tasks(context, names), paths

    build_artefacts(root, accelerator, data_dir, dry_run, as_json, tasks)


def _uap_names(
    context: Context,
    sources: list[str],
    eps: tuple[float, ...],
    targets: tuple[int, ...],
    attack: str | None,
) -> list[UapName]:
    from dataclasses import replace

    from harness.pipeline.uap_names import gradient_free_names, targeted_names, white_box_names
    from harness.workspace import UapName

    config = context.config
    names: list[UapName] = []
    for source in sources:
        control = source in CONTROLS
        if not eps and not targets:
            names += white_box_names(context, source)
            if not control:
                names += targeted_names(context, source)
                names += gradient_free_names(context, source) if attack is None else []
            continue
        for budget in eps or (config.craft.transfer_eps,):
            chosen = targets if targets and not control else (None,)
            names += [UapName(source, budget, target=t, seed=config.seed) for t in chosen]
    if attack not in (None, config.attack):  # the workspace's own carries no attack in its name
        names = [n if n.source in CONTROLS else replace(n, attack=attack) for n in names]
    return names


def build_artefacts(
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
    make_tasks: Callable[[Context], tuple[list[Task], list[Path]]],
) -> None:
    """Run a command's tasks and print the files they leave."""
    import json

    workspace = existing_or_new_workspace(root)
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir)
    tasks, paths = make_tasks(context)
    if dry_run:
        print_plan(context, tasks, as_json=as_json)
        return

    with working_in(workspace):
        context.build(tasks)
    shown = [str(path) for path in paths]
    click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(shown))

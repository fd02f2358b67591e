"""Commands about the whole experiment: `init`, `run`, `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.brought_options import BroughtOptions, brought_options
from harness.cli.options import (
    accelerator_option,
    chosen_variants,
    data_dir_option,
    device_option,
    dry_run_option,
    json_option,
    make_context,
    time_limit_option,
    variant_options,
    working_in,
    workspace_option,
)
from harness.cli.plan_table import print_plan
from harness.records import UsageError

if TYPE_CHECKING:
    from harness.config import Config
    from harness.workspace import Workspace

preset_option = click.option(
    "--preset", help="quickstart, reduced (real data on a CPU), paper-fast or paper (a GPU's)."
)
dataset_option = click.option(
    "--dataset", help="digits, cifar10, svhn, FILE.npz, or a folder of class folders."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), help="Of the experiment.")


@click.command()
@preset_option
@dataset_option
@seed_option
@workspace_option
def init(preset: str | None, dataset: str | None, seed: int | None, root: Path) -> None:
    """Write harness.toml: the experiment as data, to read and change before it runs.

    \b
    Examples:
      harness init
      harness init --preset paper --dataset cifar10 --workspace cifar
    """
    from harness.workspace import CONFIG_NAME, create_workspace

    workspace = create_workspace(root, _configuration(root, preset, dataset, seed))
    click.echo(str(workspace.root / CONFIG_NAME))


@click.command()
@preset_option
@dataset_option
@seed_option
@variant_options
@brought_options
@device_option
@workspace_option
@accelerator_option
@data_dir_option
@time_limit_option
@dry_run_option
@json_option
def run(
    preset: str | None,
    dataset: str | None,
    seed: int | None,
    models: tuple[str, ...],
    all_models: bool,
    brought: BroughtOptions,
    device_name: str,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    time_limit_s: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Everything: train, compress, export, craft, attack, time, report.

    In a new folder, writes a harness.toml first (preset quickstart: the embedded digits, minutes on
    two cores). Interrupt it at will: the same command continues. Change harness.toml
    and only what depends on the change is built again. With --model, only those variants are built,
    with what they start from and no fleet; the report shows all that was ever measured here.

    On an emulated device (--device rpi4), everything runs here, and each variant there on clean
    images and under its own perturbation, as many as five minutes allow.

    With --factory, all but the training of a PyTorch classifier of your own: it is exported,
    attacked with perturbations crafted on it, and timed. Run it for each of several, with a --name
    of its own, the uncompressed one first: they meet each other's perturbations, and stand in one
    report. Give them a workspace without the ten variants, which are compared among themselves.

    \b
    Examples:
      harness run
      harness run --model full --model q4
      harness run --workspace svhn --preset paper --dataset svhn
      harness run --dataset photos.npz --workspace photos --dry-run
      harness run --dataset photos.npz --factory mypkg.net:make --checkpoint net.pt
      harness run --workspace svhn --time-limit 9m          again and again, while it ends with 124
    """
    import json

    from devices.registry import device_named
    from harness.pipeline.brought_run import brought_experiment
    from harness.pipeline.experiment import (
        experiment_files,
        experiment_tasks,
        register_current,
    )
    from reports.report import write_report

    brought.check()
    if brought and (models or all_models):
        raise UsageError("--factory and --model or --all exclude each other: run one of them")
    device = device_named(device_name)
    workspace = agreed_workspace(root, preset, dataset, seed)
    context = make_context(
        workspace,
        accelerator=accelerator,
        data_dir=data_dir,
        time_limit_s=time_limit_s,
        # Whether a model can be attacked is tried on images, also before a dry run.
        planning=dry_run and not brought,
    )
    model = brought.load(context) if brought else None
    if model is not None:
        tasks, victims, names = brought_experiment(model, device)
        paths = [workspace.uap(name) for name in names]
    else:
        variants = _variants(workspace, models, all_models)
        tasks = experiment_tasks(context, variants, device)
        victims, paths = experiment_files(context, variants)
    if dry_run:
        print_plan(context, tasks, as_json=as_json, brought=model)
        return
    with working_in(workspace):
        context.build(tasks)
        register_current(context, victims, paths)
        with context.open_store() as store:
            # An emulated device has a sample, beside all that this machine evaluated.
            shown = None if device.emulated else device.name
            report = write_report(store, workspace.report, device=shown)
    if as_json:
        click.echo(json.dumps({"report": str(report.html), "results": str(workspace.results)}))
    else:
        click.echo(str(report.html))


@click.command()
@preset_option
@dataset_option
@seed_option
@variant_options
@device_option
@workspace_option
@accelerator_option
@data_dir_option
@json_option
def plan(
    preset: str | None,
    dataset: str | None,
    seed: int | None,
    models: tuple[str, ...],
    all_models: bool,
    device_name: str,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """What `harness run` would build, what is cached, and what it would cost. Builds nothing.

    The cost is the estimated work times a short measurement of this machine: expect the order
    of magnitude. Downloads nothing either: cifar10 and svhn are planned from their published
    sizes until they are there.

    \b
    Examples:
      harness plan
      harness plan --preset paper --dataset cifar10 --json
    """
    from devices.registry import device_named
    from harness.pipeline.experiment import experiment_tasks

    device = device_named(device_name)
    workspace = agreed_workspace(root, preset, dataset, seed)
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir, planning=True)
    tasks = experiment_tasks(context, _variants(workspace, models, all_models), device)
    print_plan(context, tasks, as_json=as_json)


def _variants(workspace: Workspace, models: tuple[str, ...], all_models: bool) -> list[str]:
    """Those named, else all ten, unless it is a workspace of models of the user's own.

    Raises:
        UsageError: it is.
    """
    if not models and not all_models and (own := workspace.of_ones_own()):
        raise UsageError(
            f"the workspace {workspace.root} is of models of your own ({', '.join(own)}): take one"
            " with --factory (run --dry-run --factory plans it), or --all to train the ten variants"
            " beside them"
        )
    return chosen_variants(models, all_models or not models)


def _configuration(root: Path, preset: str | None, dataset: str | None, seed: int | None) -> Config:
    """A new experiment's configuration: the preset, with what was given.

    A file in the workspace is named as seen from there, so that the folder can be moved.
    """
    from dataclasses import replace

    from harness.presets import preset_named

    names_a_path = dataset is not None and (dataset.endswith(".npz") or "/" in dataset)
    if dataset is not None and (names_a_path or _is_folder(dataset)):
        path, folder = Path(dataset).absolute(), root.absolute()
        inside = path.is_relative_to(folder)
        dataset = f"./{path.relative_to(folder)}" if inside else str(path.resolve())
    config = preset_named(preset or "quickstart", dataset=dataset)
    return config if seed is None else replace(config, seed=seed)


def _is_folder(dataset: str) -> bool:
    """A folder of class folders here, and none of the data sets that have a name."""
    from harness.data.dataset import NAMES

    return dataset.lower() not in NAMES and Path(dataset).is_dir()


def agreed_workspace(
    root: Path, preset: str | None, dataset: str | None, seed: int | None
) -> Workspace:
    """The workspace, a new one not written yet; flags must agree with one that is there.

    Raises:
        UsageError: a flag contradicts harness.toml, or that is lost and what it made is not.
    """
    from harness.workspace import CONFIG_NAME, Workspace, holds_work, open_workspace

    if not (root / CONFIG_NAME).exists():
        if holds_work(root):
            raise UsageError(
                f"the folder {root} holds models or results but no {CONFIG_NAME}, which says what"
                " they are of: put it back (or write one with `harness init`, and what differs from"
                " it is built again), or take another folder with --workspace"
            )
        return Workspace(root, _configuration(root, preset, dataset, seed))
    workspace = open_workspace(root)
    wanted = _configuration(root, preset or workspace.config.preset, dataset, seed)
    given = {"preset": preset, "dataset": dataset, "seed": seed}
    for name, flag in given.items():
        value = getattr(workspace.config, name)
        if flag is not None and getattr(wanted, name) != value:
            raise UsageError(
                f"--{name} {flag} contradicts {root / CONFIG_NAME}, which says {name} = {value!r}: "
                "edit the file, or take another folder with --workspace"
            )
    return workspace

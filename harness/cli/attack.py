"""`harness attack-device`: models run, and are attacked, where they are deployed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.brought_options import BroughtOptions, brought_options
from harness.cli.duration_type import DURATION
from harness.cli.experiment import agreed_workspace, dataset_option
from harness.cli.options import (
    accelerator_option,
    chosen_variants,
    data_dir_option,
    deployable_options,
    device_option,
    dry_run_option,
    json_option,
    make_context,
    working_in,
    workspace_option,
)
from harness.cli.plan_table import print_plan
from harness.records import UsageError

if TYPE_CHECKING:
    from devices.session import Device
    from harness.pipeline.context import Context
    from harness.pipeline.evaluation import Victim
    from harness.pipeline.experiment import LatencyMode
    from harness.records import ResultRow


@click.command("attack-device")
@click.option(
    "--uap",
    "uaps",
    multiple=True,
    metavar="FILE",
    help="A perturbation; may be repeated. Looked up here, then in the workspace; a missing "
    "cache/VARIANT_epsE[_tT].pt (or cache/fleet_epsE.pt) is crafted first.",
)
@click.option(
    "--transfer",
    "transfer_eps",
    multiple=True,
    type=float,
    metavar="EPS",
    help="The transfer matrix at this budget (1/255): the perturbations crafted on every variant, "
    "on the fleet, and the controls. May be repeated.",
)
@device_option
@deployable_options
@click.option(
    "--onnx",
    "onnx_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Your own model: input `image` uint8 [N,C,H,W], output `logits`. May be repeated.",
)
@brought_options
@dataset_option
@click.option(
    "--budget",
    "budget_s",
    type=DURATION,
    help="Evaluate as many images as fit into this time (90s, 10m, 1h), shared equally by the "
    "models, set-up excluded.  [default: the device's own, 5m emulated; else eval.device_images]",
)
@click.option(
    "--until-ci",
    type=click.FloatRange(0.0, 50.0, min_open=True),
    metavar="POINTS",
    help="Stop when the UER's 95 % interval is within this many points to either side; without "
    "--budget however long it takes.",
)
@click.option(
    "--latency",
    type=click.Choice(["none", "quick", "full"]),
    help="Also time the models, batch 1.  [default: quick on a board, else none]",
)
@click.option(
    "--instructions",
    is_flag=True,
    help="Also count the instructions of one inference, on an emulated device: no time.",
)
@workspace_option
@accelerator_option
@data_dir_option
@dry_run_option
@json_option
def attack_device(
    uaps: tuple[str, ...],
    transfer_eps: tuple[float, ...],
    device_name: str,
    models: tuple[str, ...],
    all_models: bool,
    onnx_files: tuple[Path, ...],
    brought: BroughtOptions,
    dataset: str | None,
    budget_s: float | None,
    until_ci: float | None,
    latency: LatencyMode | None,
    instructions: bool,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Apply perturbations to models where they run, and record what they do.

    Attacks every variant that is exported (all ten in a new workspace) unless --model, --onnx or
    --factory says which. Every result is stored; what is stored already is not measured again.

    With a budget or an interval to reach, a sample of the images is evaluated: the same for
    every model, the classes in proportion, clean and attacked images in pairs. Its UER is printed
    as it is, and corrected by what PyTorch does on the whole set. A larger budget goes on where
    the sample ended; so does the same command after an interruption.

    With --factory: a PyTorch classifier of your own, exported first (cache/NAME.onnx), PyTorch
    beside it; without --uap it meets everything the configuration asks for of a model.

    \b
    Examples:
      harness attack-device --device local --uap cache/full_eps10.pt
      harness attack-device --uap mine.pt --model q4 --json
      harness attack-device --uap cache/full_eps10.pt --onnx detector.onnx
      harness attack-device --factory mypkg.net:make --checkpoint net.pt --dataset photos.npz
      harness attack-device --transfer 4 --all
      harness attack-device --device rpi4 --uap cache/full_eps10.pt --budget 10m
      harness attack-device --device rpi4 --uap cache/full_eps10.pt --until-ci 1.0
    """
    from devices.registry import device_named

    if until_ci is not None and math.isnan(until_ci):  # no range holds or refuses it
        raise UsageError("--until-ci nan is no number of points: write one up to 50, such as 1.0")
    brought.check()
    if not uaps and not transfer_eps and not brought:
        raise UsageError(
            "name a perturbation with --uap FILE, or take a matrix with --transfer EPS"
        )
    for value in transfer_eps:
        if not 1 <= value <= 255:
            raise UsageError(f"--transfer {value:g} must be from 1 to 255 (1/255 units)")
    if brought and transfer_eps:
        raise UsageError(
            "--transfer is of the ten variants; models of your own meet each other in harness run "
            "--factory, at the budgets of craft.transfer_eps"
        )
    device = device_named(device_name)
    if models or all_models:
        variants: list[str] | None = chosen_variants(models, all_models, deployable=True)
    else:
        variants = [] if onnx_files or brought else None

    from harness.pipeline.experiment import attack_tasks, register_current

    workspace = agreed_workspace(root, None, dataset, None)
    # Whether a model can be attacked is tried on images, also before a dry run.
    planning = dry_run and not brought
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir, planning=planning)
    model = brought.load(context) if brought else None
    tasks, victims, paths = attack_tasks(
        context,
        variants=_exported(context) if variants is None else variants,
        onnx_files=list(onnx_files),
        brought=model,
        uaps=[*uaps, *_matrix(context, transfer_eps)],
        device=device,
        budget_s=budget_s,
        until_ci=until_ci,
        latency=latency or _default_latency(device),
        instructions=instructions,
    )
    if dry_run:
        # Of several models, the user's is what is not sized by the configuration.
        print_plan(context, tasks, as_json=as_json, brought=model)
        return
    with working_in(workspace):
        context.build(tasks)
        register_current(context, victims, paths)
    _print_rows(context, victims, paths, device, as_json=as_json)


def _matrix(context: Context, budgets: tuple[float, ...]) -> list[str]:
    """The workspace's files of a transfer matrix."""
    from harness.pipeline.uap_names import matrix_names

    names = [name for eps in budgets for name in matrix_names(context, eps)]
    return [str(context.workspace.uap(name).resolve()) for name in names]


def _default_latency(device: Device) -> LatencyMode:
    """A board is there to be timed; this machine is timed by `harness run`."""
    return "none" if device.emulated or device.name == "local" else "quick"


def _exported(context: Context) -> list[str]:
    from harness.records import DEPLOYABLE, PAPER_ORDER

    there = [name for name in DEPLOYABLE if context.workspace.onnx(name).exists()]
    if not there and (own := context.workspace.of_ones_own()):
        files = " ".join(f"--onnx {context.workspace.onnx(name)}" for name in own)
        raise UsageError(
            f"name models of your own with --factory, or their files: {files};"
            " --all trains the ten variants"
        )
    return there or list(PAPER_ORDER)


def _print_rows(
    context: Context,
    victims: list[Victim],
    uap_paths: list[Path],
    device: Device,
    *,
    as_json: bool,
) -> None:
    from harness.cli.results_table import print_results
    from harness.results import result_rows
    from reports.masking_table import rows_of

    models = {context.sha256(victim.onnx) for victim in victims}
    uaps: set[str | None] = {None, *(context.sha256(path) for path in uap_paths)}
    evaluation = context.data.digests["evaluation"]

    def wanted(row: ResultRow) -> bool:
        return (
            row.model_sha256 in models
            and row.uap_sha256 in uaps
            and row.evaluation_sha256 == evaluation
            and (row.device, row.emulated) == (device.name, device.emulated)
            and row.runtime == "onnxruntime"
        )

    with context.open_store() as store:
        rows = [row for row in result_rows(store) if wanted(row)]
        derived = rows_of(store, rows) if as_json else []
    if as_json:
        click.echo(json.dumps(derived, indent=2))
    else:
        print_results(rows)

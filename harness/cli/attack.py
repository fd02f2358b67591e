"""Commands that run models where they are deployed: `attack-device`, `devices`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.options import (
    accelerator_option,
    chosen_variants,
    data_dir_option,
    deployable_options,
    device_option,
    dry_run_option,
    existing_or_new_workspace,
    json_option,
    make_context,
    working_in,
    workspace_option,
)
from harness.cli.plan_table import print_plan

if TYPE_CHECKING:
    from devices.session import Device
    from harness.pipeline.context import Context
    from harness.pipeline.evaluation import Victim
    from harness.records import ResultRow


@click.command("attack-device")
@click.option(
    "--uap",
    "uaps",
    multiple=True,
    required=True,
    metavar="FILE",
    help="A perturbation; may be repeated. Looked up here, then in the workspace; a missing "
    "cache/VARIANT_epsE[_tT].pt is crafted first.",
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
@workspace_option
@accelerator_option
@data_dir_option
@dry_run_option
@json_option
def attack_device(
    uaps: tuple[str, ...],
    device_name: str,
    models: tuple[str, ...],
    all_models: bool,
    onnx_files: tuple[Path, ...],
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Apply perturbations to models where they run, and record what they do.

    Attacks every variant that is exported (all ten in a new workspace) unless --model or --onnx
    says which. Every result is stored; what is stored already is not measured again.

    \b
    Examples:
      harness attack-device --device local --uap cache/full_eps10.pt
      harness attack-device --uap mine.pt --model q4 --json
      harness attack-device --uap cache/full_eps10.pt --onnx detector.onnx
    """
    from devices.registry import device_named

    device = device_named(device_name)
    if models or all_models:
        variants: list[str] | None = chosen_variants(models, all_models, deployable=True)
    else:
        variants = [] if onnx_files else None

    from harness.pipeline.experiment import attack_tasks, register_current

    workspace = existing_or_new_workspace(root)
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir)
    tasks, victims, paths = attack_tasks(
        context,
        variants=_exported(context) if variants is None else variants,
        onnx_files=list(onnx_files),
        uaps=list(uaps),
        device=device,
    )
    if dry_run:
        print_plan(context, tasks, as_json=as_json)
        return
    with working_in(workspace):
        context.build(tasks)
        register_current(context, victims, paths)
    _print_rows(context, victims, paths, device, as_json=as_json)


def _exported(context: Context) -> list[str]:
    from harness.records import DEPLOYABLE, PAPER_ORDER

    there = [name for name in DEPLOYABLE if context.workspace.onnx(name).exists()]
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
    from harness.results import as_json as to_json
    from harness.results import result_rows

    models = {context.sha256(victim.onnx) for victim in victims}
    uaps: set[str | None] = {None, *(context.sha256(path) for path in uap_paths)}
    evaluation = context.data.digests["evaluation"]

    def wanted(row: ResultRow) -> bool:
        return (
            row.model_sha256 in models
            and row.uap_sha256 in uaps
            and row.evaluation_sha256 == evaluation
            and row.device == device.name
            and row.runtime == "onnxruntime"
        )

    with context.open_store() as store:
        rows = [row for row in result_rows(store) if wanted(row)]
    if as_json:
        click.echo(json.dumps([to_json(row) for row in rows], indent=2))
    else:
        print_results(rows)


@click.group()
def devices() -> None:
    """The devices inference can run on.

    \b
    Examples:
      harness devices list
      harness devices probe local
    """


@devices.command("list")
@json_option
def list_devices(as_json: bool) -> None:
    """Name every device."""
    from devices.registry import DEVICES

    names = sorted(DEVICES)
    click.echo(json.dumps(names) if as_json else "\n".join(names))


@devices.command()
@click.argument("name")
@json_option
def probe(name: str, as_json: bool) -> None:
    """Start the runner on a device and print what it says of itself."""
    from dataclasses import asdict

    from devices.registry import device_named

    with device_named(name).open() as session:
        facts = asdict(session.machine)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        click.echo(f"{key}: {value}")

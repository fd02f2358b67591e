"""The `export` command: write ONNX files, prove them, tune them, check anybody's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.brought_options import BroughtOptions, brought_options
from harness.cli.build import build_artefacts, build_in
from harness.cli.experiment import agreed_workspace, dataset_option
from harness.cli.options import (
    accelerator_option,
    chosen_variants,
    data_dir_option,
    deployable_options,
    dry_run_option,
    json_option,
    make_context,
    workspace_option,
)
from harness.records import HarnessError, UsageError

if TYPE_CHECKING:
    from export.lint_finding import Finding
    from harness.pipeline.context import Context
    from harness.pipeline.tasks import Task


@click.command()
@deployable_options
@click.option(
    "--check",
    "checked",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.onnx",
    help="Build nothing: list what any ONNX file costs and where it goes wrong; may be repeated.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Build nothing: prove anew that what is exported is what was trained; with --compat, the "
    "compat file.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Images that --verify uses, each clean and attacked.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="First measure, layer by layer, which form of a quantised layer is faster here.",
)
@click.option(
    "--compat",
    is_flag=True,
    help="Write VARIANT_compat.onnx: unpacked, operators of opset 13 only, for any runtime.",
)
@brought_options
@dataset_option
@workspace_option
@accelerator_option
@data_dir_option
@dry_run_option
@json_option
def export(
    models: tuple[str, ...],
    all_models: bool,
    checked: tuple[Path, ...],
    verify: bool,
    images: int,
    tune: bool,
    compat: bool,
    brought: BroughtOptions,
    dataset: str | None,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export variants to ONNX, checked against PyTorch: cache/VARIANT.onnx and .json.

    Pruned variants are physically slimmed, quantised ones hold integers. A file that disagrees
    with its PyTorch model is not written. Variants not trained yet are trained first.

    With --factory: a PyTorch classifier of your own, of any image size, as cache/NAME.onnx, by
    PyTorch's exporters; the same holds: what is not the same function is not written.

    --check reads ONNX files made here or elsewhere, without running them; it ends with 1 when one
    of them computes wrong results somewhere, or cannot run. --verify takes checkpoint, file and
    manifest, and runs both models on clean and attacked images, with 1 and 2 threads, batch 1 and
    128, graph optimisations on and off; it ends with 1 when anything does not hold. With --compat
    it proves the files that --compat wrote.

    \b
    Examples:
      harness export --all
      harness export --all --tune
      harness export --verify --model q4
      harness export --verify --compat --model q4
      harness export --check theirs.onnx
      harness export --factory mypkg.net:make --checkpoint net.pt --dataset photos.npz
    """
    brought.check()
    if sum((bool(checked), tune, verify or compat)) > 1:
        raise UsageError(
            "--check, --verify, --tune and --compat exclude each other, but for --verify --compat: "
            "give one, or those two"
        )
    source = click.get_current_context().get_parameter_source("images")
    if not verify and source is click.core.ParameterSource.COMMANDLINE:
        raise UsageError("--images belongs to --verify")
    if checked:
        if models or all_models or dry_run or brought or dataset is not None:
            raise UsageError(
                "--check builds nothing: leave out --model, --all, --factory, --dataset and "
                "--dry-run"
            )
        _check(checked, as_json=as_json)
        return
    plain = not (verify or tune or compat)
    if brought:
        if models or all_models or not plain:
            raise UsageError(
                "--factory exports your model and nothing else: leave out --model, --all, --verify,"
                " --tune and --compat"
            )
        _export_brought(
            brought, dataset, root, accelerator, data_dir, dry_run=dry_run, as_json=as_json
        )
        return
    variants = chosen_variants(models, all_models, deployable=plain)
    if verify:
        if dry_run:
            raise UsageError("--verify builds nothing: leave out --dry-run")
        workspace = agreed_workspace(root, None, dataset, None)
        context = make_context(workspace, accelerator=accelerator, data_dir=data_dir)
        _verify(context, variants, images=images, compat=compat, as_json=as_json)
        return

    def tasks(context: Context) -> tuple[list[Task], list[Path]]:
        from harness.pipeline.checkpoints import train_tasks
        from harness.pipeline.exports import export_tasks
        from harness.pipeline.tuning import tune_tasks

        path = context.workspace.compat_onnx if compat else context.workspace.onnx
        build = train_tasks(context, variants)
        if tune:
            build += tune_tasks(context, variants)
        build += export_tasks(context, variants, compat=compat)
        return build, [path(name) for name in variants]

    build_artefacts(root, accelerator, data_dir, dry_run, as_json, tasks, dataset=dataset)


def _export_brought(
    brought: BroughtOptions,
    dataset: str | None,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export a model of the user's own; say what a linter finds in the file."""
    from export.lint import lint_file
    from harness.pipeline.brought_export import brought_export_task

    workspace = agreed_workspace(root, None, dataset, None)
    context = make_context(workspace, accelerator=accelerator, data_dir=data_dir)
    model = brought.load(context)
    path = workspace.onnx(model.recipe.name)
    tasks = [brought_export_task(model)]
    build_in(context, tasks, [path], dry_run=dry_run, as_json=as_json, brought=model)
    if dry_run:
        return
    costly = [finding for finding in lint_file(path) if finding.severity != "info"]
    if costly:
        count = f"{len(costly)} finding{'s' * (len(costly) != 1)}"
        click.echo(f"{path}: {count}, listed by harness export --check {path}", err=True)


def _verify(
    context: Context,
    variants: list[str],
    *,
    images: int,
    compat: bool,
    as_json: bool,
) -> None:
    """Print proofs of exported variants; exit with 1 when one does not hold."""
    from harness.cli.proof_table import print_proofs
    from harness.pipeline.proof import prove_all

    proofs = prove_all(context, variants, images=images, compat=compat)
    print_proofs(proofs, as_json=as_json)
    if any(proof.problems for proof in proofs):
        click.get_current_context().exit(1)


def _check(paths: tuple[Path, ...], *, as_json: bool) -> None:
    """Print the findings of ONNX files; exit with 1 when one is an error or cannot be read."""
    import json
    from dataclasses import asdict

    from export.lint import lint_file
    from harness.cli.findings_list import findings_lines

    found: list[tuple[str, tuple[Finding, ...]]] = []
    unread: list[HarnessError] = []
    for path in paths:
        try:
            found.append((str(path), lint_file(path)))
        except HarnessError as error:  # the others are checked all the same
            unread.append(error)
    if as_json:
        rows = [{"file": name, **asdict(f)} for name, findings in found for f in findings]
        click.echo(json.dumps(rows, indent=2))
    else:
        for name, findings in found:
            click.echo("\n".join(findings_lines(name, findings)))
    if unread:
        for earlier in unread[:-1]:
            click.echo(f"error: {earlier}", err=True)
        raise unread[-1]
    if any(finding.severity == "error" for _, findings in found for finding in findings):
        click.get_current_context().exit(1)

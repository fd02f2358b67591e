"""Options that several commands share, and the context they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from harness.cli.duration_type import DURATION
from harness.records import (
    DEPLOYABLE,
    PAPER_ORDER,
    UsageError,
    deployable_named,
    variant_named,
)
from harness.sources import FLEET, LEAVE_ONE_OUT, is_ensemble, members

if TYPE_CHECKING:
    from harness.pipeline.context import Context
    from harness.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])

workspace_option = click.option(
    "--workspace",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="this folder",
    help="The folder of the experiment: harness.toml, cache, results, report.",
)
accelerator_option = click.option(
    "--accelerator",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where PyTorch trains and crafts.",
)
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where cifar10 and svhn are, or are downloaded to.",
)
time_limit_option = click.option(
    "--time-limit",
    "time_limit_s",
    type=DURATION,
    help="Stop after so long (90s, 9m, 1h), with exit code 124 where work is left: the same "
    "command goes on.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be built, stop.")
device_option = click.option(
    "--device", "device_name", default="local", show_default=True, help="Where inference runs."
)


def variant_options(command: Command) -> Command:
    """`--model VARIANT` (repeatable) or `--all`, of what is trained."""
    return _model_options(command, ", ".join(PAPER_ORDER))


def source_options(command: Command) -> Command:
    """`--model VARIANT` (repeatable) or `--all`, of what perturbations are crafted on."""
    fleet = f"{FLEET} (all of them at once), {LEAVE_ONE_OUT}_VARIANT (all but that one)"
    return _model_options(command, f"{', '.join(PAPER_ORDER)}, {fleet}")


def deployable_options(command: Command) -> Command:
    """`--model VARIANT` (repeatable) or `--all`, of what is exported and attacked."""
    extra = ", ".join(name for name in DEPLOYABLE if name not in PAPER_ORDER)
    return _model_options(command, f"{', '.join(PAPER_ORDER)}, or the optional {extra}")


def _model_options(command: Command, names: str) -> Command:
    command = click.option(
        "--model",
        "models",
        multiple=True,
        metavar="VARIANT",
        help=f"One of {names}; may be repeated.",
    )(command)
    return click.option("--all", "all_models", is_flag=True, help="All ten variants.")(command)


def chosen_variants(
    models: tuple[str, ...], all_models: bool, *, deployable: bool = False
) -> list[str]:
    """The variants the options name, in the paper's order; `--all` is the paper's ten.

    Args:
        models: the names given.
        all_models: whether `--all` was.
        deployable: also take what is not trained, but derived from a variant at export.

    Raises:
        UsageError: neither or both options, or a variant that does not exist or does not belong
            here.
    """
    if models and all_models:
        raise UsageError("--model VARIANT and --all exclude each other: give one of them")
    if not models and not all_models:
        raise UsageError("name variants with --model VARIANT, or take --all of them")
    for name in models:
        if is_ensemble(name):
            raise UsageError(
                f"{name} is no model, but what perturbations are crafted on: "
                f"harness craft --model {name}"
            )
        deployable_named(name) if deployable else variant_named(name)
    return list(PAPER_ORDER) if all_models else [name for name in DEPLOYABLE if name in models]


def chosen_sources(models: tuple[str, ...], all_models: bool) -> list[str]:
    """The variants the options name, in the paper's order, then the ensembles of them.

    Raises:
        UsageError: as `chosen_variants`.
    """
    ensembles = [name for name in dict.fromkeys(models) if is_ensemble(name)]
    for name in ensembles:
        members(name)
    variants = tuple(name for name in models if name not in ensembles)
    if ensembles and all_models:
        raise UsageError("--model VARIANT and --all exclude each other: give one of them")
    return (chosen_variants(variants, all_models) if variants or not ensembles else []) + ensembles


def stderr_console() -> Console:
    """The console for people; honours NO_COLOR."""
    return Console(stderr=True)


@contextmanager
def working_in(workspace: Workspace) -> Iterator[None]:
    """Hold the workspace for writing: written first when it is new, rid of what a kill left.

    Raises:
        HarnessError: another harness is working there, or the folder cannot be written.
    """
    from harness.workspace import CONFIG_NAME, create_workspace

    config = workspace.config
    if not (workspace.root / CONFIG_NAME).exists():
        create_workspace(workspace.root, config)
        note = f"wrote {workspace.root / CONFIG_NAME} (preset {config.preset}, {config.dataset})"
        click.echo(f"new workspace: {note}", err=True)
    with workspace.locked():
        # Killed between a temporary file and its rename: only the holder of the lock writes here.
        for folder in (workspace.cache, workspace.cache / ".partial", workspace.report):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        yield


def make_context(
    workspace: Workspace,
    *,
    accelerator: str,
    data_dir: Path | None,
    time_limit_s: float | None = None,
    planning: bool = False,
) -> Context:
    """The context of a command that computes, or only says what it would."""
    from harness.cli.progress import ConsoleReporter
    from harness.pipeline.context import Context, choose_accelerator
    from harness.pipeline.tasks import Deadline

    return Context(
        workspace=workspace,
        accelerator=choose_accelerator(accelerator),
        data_dir=data_dir,
        planning=planning,
        reporter=ConsoleReporter(stderr_console()),
        deadline=Deadline.after(time_limit_s),
    )

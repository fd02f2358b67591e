"""What would be built, what is there already, and what it would cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from harness.cli.progress import duration
from harness.cli.stdout import StdoutConsole

if TYPE_CHECKING:
    from harness.pipeline.brought import Brought
    from harness.pipeline.context import Context
    from harness.pipeline.tasks import Task


def print_plan(
    context: Context, tasks: Sequence[Task], *, as_json: bool, brought: Brought | None = None
) -> None:
    """Print every task with its state; builds nothing. `brought`: whose model the work is about."""
    from harness.pipeline.estimate import elapsed_seconds, measured_rates
    from harness.pipeline.tasks import to_build

    rates = measured_rates(context, brought.model if brought else None)
    building = {task.name for task in to_build(tasks)}
    states = [(task, task.name not in building) for task in tasks]
    if as_json:
        rows = [
            {
                "stage": task.stage,
                "task": task.name,
                "cached": done,
                "estimated_seconds": None if done else round(rates.seconds(task), 1),
            }
            for task, done in states
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("stage", "to build", "cached", "estimated time")
    for stage in dict.fromkeys(task.stage for task in tasks):
        of_stage = [(task, done) for task, done in states if task.stage == stage]
        missing = [task for task, done in of_stage if not done]
        seconds = elapsed_seconds(missing, rates, speedups=context.speedups)
        table.add_row(
            stage,
            escape(_names(missing)),
            str(len(of_stage) - len(missing)),
            duration(seconds) if missing else "-",
        )
    table.add_section()
    everything = [task for task, done in states if not done]
    # Less than its parts where stages run beside each other.
    total = elapsed_seconds(everything, rates, speedups=context.speedups)
    device = context.accelerator.type
    table.add_row("all", "", "", f"about {duration(total)} on this {device}")
    StdoutConsole().print(table)
    changed = _measured_as_another_file(context, everything)
    if changed:
        click.echo(
            f"Measured before, as another file: {', '.join(changed)}. What is evaluated is the file"
            " that would be deployed now; the earlier numbers are kept."
        )


def _measured_as_another_file(context: Context, missing: Sequence[Task]) -> list[str]:
    """The variants to evaluate whose export changed since they were."""
    from harness.results import superseded
    from harness.store import open_store

    workspace = context.workspace
    if not workspace.results.exists():
        return []
    words = [task.name.split(" ") for task in missing if task.stage == "evaluate"]
    names = {rest[0] for first, *rest in words if first == "attack"}
    files = {name: workspace.onnx(name) for name in sorted(names)}
    deployed = {n: context.sha256(path) for n, path in files.items() if path.exists()}
    with open_store(workspace.results, create=False) as store:
        known = store.run_counts()
        return [
            name for name in superseded(store, deployed=deployed) if deployed[name] not in known
        ]


def _names(tasks: Sequence[Task]) -> str:
    if len(tasks) > 10:
        return f"{len(tasks)}: {tasks[0].name} ... {tasks[-1].name.split(' ', 1)[1]}"
    return ", ".join(task.name.split(" ", 1)[1] for task in tasks) or "nothing"

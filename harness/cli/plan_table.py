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
    from harness.pipeline.context import Context
    from harness.pipeline.tasks import Task


def print_plan(context: Context, tasks: Sequence[Task], *, as_json: bool) -> None:
    """Print every task with its state; builds nothing."""
    from harness.pipeline.context import jobs_for
    from harness.pipeline.estimate import elapsed_work, seconds_per_forward

    per_forward = seconds_per_forward(context)
    jobs = jobs_for(context.accelerator)
    states = [(task, task.is_done()) for task in tasks]
    if as_json:
        rows = [
            {
                "stage": task.stage,
                "task": task.name,
                "cached": done,
                "estimated_seconds": None if done else round(task.work * per_forward, 1),
            }
            for task, done in states
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("stage", "to build", "cached", "estimated time")
    total = 0.0
    for stage in dict.fromkeys(task.stage for task in tasks):
        of_stage = [(task, done) for task, done in states if task.stage == stage]
        missing = [task for task, done in of_stage if not done]
        seconds = elapsed_work(missing, jobs=jobs) * per_forward
        total += seconds
        table.add_row(
            stage,
            escape(_names(missing)),
            str(len(of_stage) - len(missing)),
            duration(seconds) if missing else "-",
        )
    table.add_section()
    device = context.accelerator.type
    table.add_row("all", "", "", f"about {duration(total)} on this {device}")
    StdoutConsole().print(table)


def _names(tasks: Sequence[Task]) -> str:
    if len(tasks) > 10:
        return f"{len(tasks)}: {tasks[0].name} ... {tasks[-1].name.split(' ', 1)[1]}"
    return ", ".join(task.name.split(" ", 1)[1] for task in tasks) or "nothing"

"""Tasks, like make's: each builds one artefact, and is skipped while that is still valid.

Enters: a list of tasks in an order that respects their dependencies. Leaves: their artefacts.
The artefacts on disk are the only state: kill the process anywhere and run the same list again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

Progress = Callable[[float, str], None]
"""(fraction done, note)."""


@dataclass(frozen=True)
class Task:
    """One artefact to build."""

    stage: str
    """train, export, craft, evaluate or latency."""
    name: str
    """What the user sees: "train sfp"."""
    work: float
    """Estimated cost in forward passes of one image; only ratios matter."""
    is_done: Callable[[], bool]
    run: Callable[[Progress], None]
    """Builds it, telling how far it is."""


class Reporter(Protocol):
    """Who is told how far the work is. All of it goes to standard error."""

    def begin(self, tasks: Sequence[Task]) -> None:
        """These tasks are to be run, in this order."""

    def start(self, task: Task) -> None:
        """A task starts."""

    def advance(self, task: Task, fraction: float, note: str) -> None:
        """A task is this far, 0 to 1."""

    def finish(self, task: Task, seconds: float) -> None:
        """A task is done; `seconds` 0 when its artefact was there already."""

    def end(self) -> None:
        """All tasks are done, or one failed."""

    def note(self, text: str) -> None:
        """One line the user should see."""


class Silent:
    """A reporter that says nothing."""

    def begin(self, tasks: Sequence[Task]) -> None: ...

    def start(self, task: Task) -> None: ...

    def advance(self, task: Task, fraction: float, note: str) -> None: ...

    def finish(self, task: Task, seconds: float) -> None: ...

    def end(self) -> None: ...

    def note(self, text: str) -> None: ...


def run_tasks(tasks: Sequence[Task], reporter: Reporter) -> int:
    """Run what is not done yet, in order. Returns how many tasks were run.

    A task's validity is checked right before it would run: by then its inputs are there.
    """
    ran = 0
    reporter.begin(tasks)
    try:
        for task in tasks:
            if task.is_done():
                reporter.finish(task, 0.0)
                continue
            reporter.start(task)
            began = time.monotonic()
            task.run(partial(reporter.advance, task))
            ran += 1
            reporter.finish(task, max(time.monotonic() - began, 1e-3))
    finally:
        reporter.end()
    return ran

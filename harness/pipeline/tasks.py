"""Tasks, like make's: each builds one artefact, and is skipped while that is still valid.

Enters: what building an artefact takes, and what it costs. Leaves: a `Task`, for
`harness.pipeline.running`; those who are told how far it is; the moment when it is to stop.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Progress = Callable[[float, str], None]
"""(fraction done, note)."""
Shared = Literal["accelerator", "cores"]
"""What tasks beside each other share: where PyTorch runs, or the processor's cores."""
EVERYTHING: frozenset[Shared] = frozenset(("accelerator", "cores"))
FORWARDS_PER_SECOND = 1000.0
"""Weighs seconds against forward passes as long as no rate is known, and in bars."""


@dataclass(frozen=True)
class Task:
    """One artefact to build."""

    stage: str
    """train, export, craft, evaluate or latency."""
    name: str
    """What the user sees: "train sfp"."""
    work: float
    """Estimated cost where PyTorch runs, in forward passes of one image."""
    is_done: Callable[[], bool]
    run: Callable[[Progress], None]
    """Builds it, telling how far it is."""
    beside: Shared | None = None
    """It may run beside its neighbours in the list that share the same; None: one at a time, beside
    nothing that takes what it takes."""
    after: tuple[str, ...] = ()
    """Names of tasks that may still be running whose artefacts it needs."""
    uses: frozenset[Shared] = EVERYTHING
    """What it takes of the machine; groups of tasks that take nothing in common run together."""
    core_work: float = 0.0
    """What it costs besides, in PyTorch's forward passes of one image on one core."""
    known_s: float = 0.0
    """Seconds after its work that something else than the machine decides: a time budget, a latency
    protocol. When they begin, the task says that it is as far as `work_share`."""

    @property
    def forwards(self) -> float:
        """Its work, wherever it is done."""
        return self.work + self.core_work

    @property
    def weight(self) -> float:
        """All of it, as forward passes."""
        return self.forwards + self.known_s * FORWARDS_PER_SECOND

    @property
    def work_share(self) -> float:
        """The fraction of the task that is work; the rest is known seconds."""
        return self.forwards / self.weight if self.weight else 1.0


def to_build(tasks: Sequence[Task]) -> list[Task]:
    """What is not done, and what is of something that is not: it may turn out the same, seldom.

    Args:
        tasks: in an order that respects their dependencies.
    """
    found, names = [], set[str]()
    for task in tasks:
        if names & set(task.after) or not task.is_done():
            found.append(task)
            names.add(task.name)
    return found


class Reporter(Protocol):
    """Who is told how far the work is. All of it goes to standard error."""

    def begin(self, tasks: Sequence[Task]) -> None:
        """These tasks are to be run, in this order."""

    def start(self, task: Task) -> None:
        """A task starts; others may be running."""

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


@dataclass(frozen=True)
class Deadline:
    """A moment of `time.monotonic()`."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """So many seconds from now; never, for None."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.at


TELLING = threading.Lock()
"""Tasks run side by side, and one of them at a time talks to the user."""


def note(reporter: Reporter, text: str) -> None:
    """A line for the user out of a running task."""
    with TELLING:
        reporter.note(text)

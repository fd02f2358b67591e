"""Tasks, like make's: each builds one artefact, and is skipped while that is still valid.

Enters: a list of tasks in an order that respects their dependencies. Leaves: their artefacts.
The artefacts on disk are the only state: kill the process anywhere and run the same list again.

A time limit ends it like a kill, but with a word: what runs stops at its next sign of progress, so
what it did after its last save, a few seconds, is done again.

Tasks that follow each other and may run side by side do so, in threads of this process: what
they spend their time on (PyTorch) releases the interpreter, and they die with it.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal, Protocol

from harness.records import TimeLimitReached

Progress = Callable[[float, str], None]
"""(fraction done, note)."""
Shared = Literal["accelerator", "cores"]
"""What tasks beside each other share: where PyTorch runs, or the processor's cores."""
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
    """It may run beside its neighbours in the list that share the same; None: alone."""
    after: tuple[str, ...] = ()
    """Names of tasks beside it whose artefacts it needs."""
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


_TELLING = threading.Lock()
"""Tasks run side by side, and one of them at a time talks to the user."""


def note(reporter: Reporter, text: str) -> None:
    """A line for the user out of a running task."""
    with _TELLING:
        reporter.note(text)


def run_tasks(
    tasks: Sequence[Task],
    reporter: Reporter,
    *,
    jobs: Mapping[Shared, int] | None = None,
    deadline: Deadline | None = None,
) -> int:
    """Run what is not done yet. Returns how many tasks were run.

    A task's validity is checked right before it would run: by then its inputs are there.

    Args:
        tasks: in an order that respects their dependencies.
        reporter: told from one thread at a time.
        jobs: how many tasks that share something may run side by side; one unless said.
        deadline: when to stop; no task starts, and none goes on, after it.

    Raises:
        TimeLimitReached: the deadline is over and there is work left.
    """
    ran = 0
    deadline = deadline or Deadline()
    far: dict[str, float] = {}
    # What is valid now takes no time; what is made anew on the way may turn out so, too.
    reporter.begin([task for task in tasks if not task.is_done()])
    try:
        for shared, group in itertools.groupby(tasks, key=lambda task: task.beside):
            crew = 1 if shared is None or jobs is None else jobs.get(shared, 1)
            ran += _Crew(reporter, crew, deadline, far).run(list(group))
    except TimeLimitReached:
        left = sum(not task.is_done() for task in tasks)
        running = ", ".join(f"{name} at {100 * part:.0f} %" for name, part in far.items())
        raise TimeLimitReached(
            f"time limit reached with {left} of {len(tasks)} tasks left"
            f"{f' ({running})' if running else ''}: the same command goes on"
        ) from None
    finally:
        reporter.end()
    return ran


class _Stopped(Exception):
    """Another task failed, or the user interrupted: raised inside a task to end it."""


class _Crew:
    """Runs one group of tasks, the longest chain of dependent ones first."""

    def __init__(
        self, reporter: Reporter, jobs: int, deadline: Deadline, far: dict[str, float]
    ) -> None:
        """`far` is kept: name of each task that is running -> fraction of it that is done."""
        self._far = far
        self._reporter = reporter
        self._jobs = jobs
        self._deadline = deadline
        self._stopping = threading.Event()

    def run(self, tasks: list[Task]) -> int:
        if self._jobs == 1:
            return sum(self._run_one(task) for task in tasks)
        names = {task.name for task in tasks}
        waiting = sorted(tasks, key=lambda task: -_chain_work(task, tasks))
        running: dict[Future[bool], Task] = {}
        ran, done = 0, set[str]()
        with ThreadPoolExecutor(self._jobs, thread_name_prefix="task") as pool:
            try:
                while waiting or running:
                    ready = [t for t in waiting if names.intersection(t.after) <= done]
                    for task in ready[: self._jobs - len(running)]:
                        waiting.remove(task)
                        running[pool.submit(self._run_one, task)] = task
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        ran += future.result()
                        done.add(running.pop(future).name)
            except BaseException:
                # The pool waits for its threads: each ends at its next sign of progress.
                self._stopping.set()
                raise
        return ran

    def _run_one(self, task: Task) -> bool:
        if task.is_done():
            self._tell(self._reporter.finish, task, 0.0)
            return False
        self._check_time()
        self._tell(self._reporter.start, task)
        self._far[task.name] = 0.0
        began = time.monotonic()
        task.run(lambda fraction, note: self._advance(task, fraction, note))
        del self._far[task.name]
        self._tell(self._reporter.finish, task, max(time.monotonic() - began, 1e-3))
        return True

    def _advance(self, task: Task, fraction: float, note: str) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._far[task.name] = fraction
        self._check_time()
        self._tell(self._reporter.advance, task, fraction, note)

    def _check_time(self) -> None:
        if self._deadline.is_over:
            raise TimeLimitReached

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        with _TELLING:
            what(*arguments)


def _chain_work(task: Task, tasks: list[Task]) -> float:
    """Work of the longest chain of tasks that starts with this one."""
    following = (t for t in tasks if task.name in t.after)
    return task.weight + max((_chain_work(t, tasks) for t in following), default=0.0)

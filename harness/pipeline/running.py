"""Running tasks: what is valid already is skipped, what may run side by side does.

Enters: a list of tasks in an order that respects their dependencies. Leaves: their artefacts.
The artefacts on disk are the only state: kill the process anywhere and run the same list again.

A time limit ends it like a kill, but with a word: what runs stops at its next sign of progress, so
what it did after its last save, a few seconds at most, is done again.

Tasks that follow each other and may run side by side do so, in threads of this process: what
they spend their time on (PyTorch) releases the interpreter, and they die with it. So do groups of
them that use nothing in common: where PyTorch has a GPU, the cores export what it has trained.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from harness.pipeline.tasks import EVERYTHING, TELLING, Deadline, Reporter, Shared, Task, to_build
from harness.records import TimeLimitReached


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
    deadline = deadline or Deadline()
    reporter.begin(to_build(tasks))
    run = _Run(reporter, jobs or {}, deadline)
    try:
        return sum(run.phase(phase) for phase in phases(tasks))
    except TimeLimitReached:
        left = sum(not task.is_done() for task in tasks)
        running = ", ".join(f"{name} at {100 * part:.0f} %" for name, part in run.far.items())
        raise TimeLimitReached(
            f"time limit reached with {left} of {len(tasks)} tasks left"
            f"{f' ({running})' if running else ''}: the same command goes on"
        ) from None
    finally:
        reporter.end()


def phases(tasks: Sequence[Task]) -> list[list[list[list[Task]]]]:
    """Phases, one after the other, of lanes beside each other, of groups in turn, of tasks.

    The tasks of a group share something and may run side by side. Groups that follow each other
    are in one phase, in lanes of their own, where they use nothing in common.
    """
    found: list[dict[frozenset[Shared], list[list[Task]]]] = []
    for (_, uses), group in itertools.groupby(tasks, key=lambda task: (task.beside, task.uses)):
        fits = found and all(uses == lane or not uses & lane for lane in found[-1])
        if not fits or uses == EVERYTHING:
            found.append({})
        found[-1].setdefault(uses, []).append(list(group))
    return [list(lanes.values()) for lanes in found]


class _Stopped(Exception):
    """Another task failed, or the user interrupted: raised inside a task to end it."""


def _errors(futures: Sequence[Future[Any]]) -> list[BaseException]:
    return [error for error in (future.exception() for future in futures) if error is not None]


def _rank(error: BaseException) -> int:
    """Which of several errors the user sees: who was stopped, or out of time, did nothing wrong."""
    return 2 if isinstance(error, _Stopped) else 1 if isinstance(error, TimeLimitReached) else 0


@dataclass
class _Run:
    """One call of `run_tasks`."""

    reporter: Reporter
    jobs: Mapping[Shared, int]
    deadline: Deadline
    far: dict[str, float] = field(default_factory=dict)
    """Name of each task that is running -> fraction of it that is done."""
    _done: set[str] = field(default_factory=set)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    """Told when a task ends, or everything is to."""

    def phase(self, lanes: list[list[list[Task]]]) -> int:
        """Run all lanes beside each other. Returns how many tasks were run."""
        names = [{task.name for group in lane for task in group} for lane in lanes]
        if len(lanes) == 1:
            return self._lane(lanes[0], set())
        elsewhere = [set().union(*names) - own for own in names]
        futures: list[Future[int]] = []
        with ThreadPoolExecutor(len(lanes), thread_name_prefix="lane") as pool:
            try:
                for lane, others in zip(lanes, elsewhere, strict=True):
                    futures.append(pool.submit(self._lane, lane, others))
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop()  # whoever is left, because another failed or the user interrupted
                wait(futures)
                self._stopping.clear()
        if errors := _errors(futures):
            raise min(errors, key=_rank)
        return sum(future.result() for future in futures)

    def _lane(self, groups: list[list[Task]], elsewhere: set[str]) -> int:
        """`elsewhere`: names of what the lanes beside it run."""
        return sum(self._group(group, elsewhere) for group in groups)

    def _group(self, tasks: list[Task], elsewhere: set[str]) -> int:
        shared = tasks[0].beside
        jobs = 1 if shared is None else self.jobs.get(shared, 1)
        if jobs == 1:
            return sum(self._in_turn(task, elsewhere) for task in tasks)
        return self._crew(tasks, jobs, elsewhere | {task.name for task in tasks})

    def _in_turn(self, task: Task, elsewhere: set[str]) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping.is_set() or self._has_all(task, elsewhere)
            )
        return self._run_one(task)

    def _crew(self, tasks: list[Task], jobs: int, names: set[str]) -> int:
        """Several at a time, the longest chain of dependent ones first."""
        waiting = sorted(tasks, key=lambda task: -_chain_work(task, tasks))
        running: list[Future[bool]] = []
        ran = 0

        def ready() -> list[Task]:
            return [t for t in waiting if self._has_all(t, names)][: jobs - len(running)]

        def changed() -> bool:
            return self._stopping.is_set() or any(f.done() for f in running) or bool(ready())

        try:
            with ThreadPoolExecutor(jobs, thread_name_prefix="task") as pool:
                try:
                    while waiting or running:
                        for task in ready():
                            waiting.remove(task)
                            running.append(pool.submit(self._run_one, task))
                            running[-1].add_done_callback(lambda _: self._tell_lanes())
                        with self._changed:
                            self._changed.wait_for(changed)
                        for future in [f for f in running if f.done()]:
                            running.remove(future)
                            ran += future.result()
                        if self._stopping.is_set():
                            raise _Stopped
                except BaseException:
                    # The pool waits for its threads: each ends at its next sign of progress.
                    self._stop()
                    raise
        except (_Stopped, TimeLimitReached) as ended:
            # What failed while others were stopped is what the user should see.
            raise min([ended, *_errors(running)], key=_rank) from None
        return ran

    def _has_all(self, task: Task, names: set[str]) -> bool:
        return names.intersection(task.after) <= self._done

    def _run_one(self, task: Task) -> bool:
        if self._stopping.is_set():
            raise _Stopped
        ran, seconds = not task.is_done(), 0.0
        if ran:
            self._check_time()
            self._tell(self.reporter.start, task)
            self.far[task.name] = 0.0
            began = time.monotonic()
            task.run(lambda fraction, note: self._advance(task, fraction, note))
            del self.far[task.name]
            seconds = max(time.monotonic() - began, 1e-3)
        self._tell(self.reporter.finish, task, seconds)
        with self._changed:
            self._done.add(task.name)
            self._changed.notify_all()
        return ran

    def _advance(self, task: Task, fraction: float, note: str) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self.far[task.name] = fraction
        self._check_time()
        self._tell(self.reporter.advance, task, fraction, note)

    def _check_time(self) -> None:
        if self.deadline.is_over:
            raise TimeLimitReached

    def _stop(self) -> None:
        self._stopping.set()
        self._tell_lanes()

    def _tell_lanes(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        with TELLING:
            what(*arguments)


def _chain_work(task: Task, tasks: list[Task]) -> float:
    """Work of the longest chain of tasks that starts with this one."""
    following = (t for t in tasks if task.name in t.after)
    return task.weight + max((_chain_work(t, tasks) for t in following), default=0.0)

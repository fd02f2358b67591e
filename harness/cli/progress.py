"""How far the work is, on standard error: bars on a terminal, plain lines elsewhere.

Enters: what tasks report. Leaves: text for people; nothing a program should parse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness.pipeline.tasks import FORWARDS_PER_SECOND, Task

MIN_SHARE_FOR_ESTIMATE = 0.005
"""Before this much of the work is done, the time left would be a guess from one slow start."""
PLAIN_INTERVAL_SECONDS = 15.0
"""At most, between two lines, where there is no terminal."""


class ConsoleReporter:
    """Tells a person what is going on, how long it took, and how long it will take.

    The time left is the work left over the rate so far, and what takes its seconds on any machine;
    work is estimated in forward passes of one image, so it is rough at first and settles as tasks
    finish.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: list[Task] = []
        self._done: list[Task] = []
        self._fractions: dict[str, float] = {}
        """How far the running tasks are, by name."""
        self._began = self._last_line = 0.0
        self._progress: Progress | None = None
        self._overall = TaskID(0)
        self._bars: dict[str, TaskID] = {}
        self._cached = 0

    def begin(self, tasks: Sequence[Task]) -> None:
        """Show the bars, or start counting lines."""
        self._tasks = list(tasks)
        self._done = []
        self._fractions, self._bars = {}, {}
        self._began = self._last_line = time.monotonic()
        self._cached = 0
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._overall = self._progress.add_task("all", total=1.0, note="")
            self._progress.start()

    def start(self, task: Task) -> None:
        """A task starts."""
        self._fractions[task.name] = 0.0
        if self._progress is not None:
            self._bars[task.name] = self._progress.add_task(escape(task.name), total=1.0, note="")

    def advance(self, task: Task, fraction: float, note: str) -> None:
        """A task is this far."""
        self._fractions[task.name] = fraction
        if self._progress is not None:
            bar = self._bars[task.name]
            self._progress.update(bar, completed=fraction, note=escape(note))
            self._show_overall()
        elif self._silent_for_long():
            left = self._time_left()
            self.note(f"  {task.name}: {fraction:.0%}{', ' if note else ''}{note}; {left}")

    def finish(self, task: Task, seconds: float) -> None:
        """A task is done."""
        if seconds == 0.0:
            self._cached += 1
            self._tasks = [t for t in self._tasks if t is not task]
            return
        del self._fractions[task.name]
        self._done.append(task)
        if self._progress is not None:
            self._progress.remove_task(self._bars.pop(task.name))
            self._show_overall()
        # Crafting makes many small files; all their lines would bury the rest.
        if task.stage != "craft" or (self._progress is None and self._silent_for_long()):
            left = self._time_left()
            self.note(f"{task.name}: {seconds:.1f} s{'; ' + left if left else ''}")

    def end(self) -> None:
        """Take the bars away; say what was found ready."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._cached:
            self.note(f"{self._cached} already built and still valid: not built again")

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._last_line = time.monotonic()

    def _silent_for_long(self) -> bool:
        return time.monotonic() - self._last_line > PLAIN_INTERVAL_SECONDS

    def _show_overall(self) -> None:
        if self._progress is not None:
            total = sum(task.size for task in self._tasks)
            share = sum(task.size * done for task, done in self._so_far()) / total if total else 1.0
            self._progress.update(self._overall, completed=share, note=self._time_left())

    def _so_far(self) -> list[tuple[Task, float]]:
        """Tasks that are done or running, and the fraction of each that is done."""
        running = [(t, self._fractions[t.name]) for t in self._tasks if t.name in self._fractions]
        return [(task, 1.0) for task in self._done] + running

    def _time_left(self) -> str:
        spent, so_far = time.monotonic() - self._began, self._so_far()
        total = sum(task.size for task in self._tasks)
        if sum(task.size * done for task, done in so_far) < MIN_SHARE_FOR_ESTIMATE * total:
            return ""
        timed = sum(task.seconds * done for task, done in so_far)
        work = sum((task.work + task.core_work) * done for task, done in so_far)
        timed_left = sum(task.seconds for task in self._tasks) - timed
        work_left = sum(task.work + task.core_work for task in self._tasks) - work
        # Until some work was done, nobody knows its rate.
        rate = work / (spent - timed) if work > 0 and spent > timed else FORWARDS_PER_SECOND
        left = timed_left + work_left / rate
        return f"about {duration(left)} left" if spent >= 1.0 and left > 0 else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

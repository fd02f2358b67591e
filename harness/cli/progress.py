"""How far the work is, on standard error: bars on a terminal, plain lines elsewhere.

Enters: what tasks report. Leaves: text for people; nothing a program should parse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness.pipeline.tasks import Task

MIN_SHARE_FOR_ESTIMATE = 0.005
"""Before this much of the work is done, the time left would be a guess from one slow start."""
PLAIN_INTERVAL_SECONDS = 15.0
"""At most, between two lines, where there is no terminal."""


class ConsoleReporter:
    """Tells a person what is going on, how long it took, and how long it will take.

    The time left is the work left over the rate so far; work is estimated in forward passes of
    one image, so it is rough at first and settles as tasks finish.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: list[Task] = []
        self._done_work = self._spent_seconds = 0.0
        self._started = self._last_line = 0.0
        self._progress: Progress | None = None
        self._overall = self._current = TaskID(0)
        self._cached = 0

    def begin(self, tasks: Sequence[Task]) -> None:
        """Show the bars, or start counting lines."""
        self._tasks = list(tasks)
        self._done_work = self._spent_seconds = 0.0
        self._last_line = time.monotonic()
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
            self._current = self._progress.add_task("", total=1.0, note="", visible=False)
            self._progress.start()

    def start(self, task: Task) -> None:
        """A task starts."""
        self._started = time.monotonic()
        if self._progress is not None:
            self._progress.reset(
                self._current, description=escape(task.name), total=1.0, note="", visible=True
            )

    def advance(self, task: Task, fraction: float, note: str) -> None:
        """A task is this far."""
        left = self._time_left(task, fraction)
        if self._progress is not None:
            self._progress.update(self._current, completed=fraction, note=escape(note))
            self._progress.update(self._overall, completed=self._share(task, fraction), note=left)
        elif self._silent_for_long():
            self.note(f"  {task.name}: {fraction:.0%}{', ' if note else ''}{note}; {left}")

    def finish(self, task: Task, seconds: float) -> None:
        """A task is done."""
        self._done_work += task.work
        if seconds == 0.0:
            self._cached += 1
            self._tasks = [t for t in self._tasks if t is not task]
            self._done_work -= task.work
            return
        self._spent_seconds += seconds
        left = self._time_left(None, 0.0)
        if self._progress is not None:
            self._progress.update(self._overall, completed=self._share(None, 0.0), note=left)
        # Crafting makes many small files; all their lines would bury the rest.
        if task.stage != "craft" or (self._progress is None and self._silent_for_long()):
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

    def _share(self, task: Task | None, fraction: float) -> float:
        total = sum(t.work for t in self._tasks)
        done = self._done_work + (task.work * fraction if task else 0.0)
        return done / total if total else 1.0

    def _time_left(self, task: Task | None, fraction: float) -> str:
        done = self._done_work + (task.work * fraction if task else 0.0)
        spent = self._spent_seconds + (time.monotonic() - self._started if task else 0.0)
        left = sum(t.work for t in self._tasks) - done
        if done < MIN_SHARE_FOR_ESTIMATE * (done + left) or spent < 1.0 or left <= 0:
            return ""
        return f"about {duration(left * spent / done)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

"""How far the work is, on standard error: bars on a terminal, plain lines elsewhere.

Enters: what tasks report. Leaves: text for people; nothing a program should parse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness.cli.time_left import TimeLeft
from harness.pipeline.tasks import Task

PLAIN_INTERVAL_SECONDS = 15.0
"""At most, between two lines, where there is no terminal."""


class ConsoleReporter:
    """Tells a person what is going on, how long it took, and how long it will take.

    The time left is rough at first and settles as tasks finish: see `TimeLeft`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._left = TimeLeft([], now_s=0.0)
        self._last_line = 0.0
        self._progress: Progress | None = None
        self._overall = TaskID(0)
        self._bars: dict[str, TaskID] = {}
        self._cached = 0

    def begin(self, tasks: Sequence[Task]) -> None:
        """Show the bars, or start counting lines."""
        self._bars = {}
        self._last_line = time.monotonic()
        self._left = TimeLeft(tasks, now_s=self._last_line)
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
        if self._progress is not None:
            self._bars[task.name] = self._progress.add_task(escape(task.name), total=1.0, note="")

    def advance(self, task: Task, fraction: float, note: str) -> None:
        """A task is this far."""
        self._left.advance(task, fraction, now_s=time.monotonic())
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
            self._left.skip(task)
            return
        self._left.finish(task, now_s=time.monotonic())
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
            share, left = self._left.share, self._time_left()
            self._progress.update(self._overall, completed=share, note=left)

    def _time_left(self) -> str:
        seconds = self._left.seconds(now_s=time.monotonic())
        return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

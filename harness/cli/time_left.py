"""How long tasks still take, from how far they are and when they said so.

Enters: tasks, and their progress as it is told. Leaves: seconds, a share of all the work. Work in
forward passes goes at the rate seen so far. Seconds that are known (a time budget) go by the clock,
and are corrected by what they are seen to take: a budget can be more than there is to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.pipeline.tasks import Task

MIN_SHARE_FOR_ESTIMATE = 0.005
"""Before this much of the work is done, the time left would be a guess from one slow start."""
BEGINNING_S = 1.0
"""What is told within it of known seconds that begin had passed before: nothing is that quick."""
ROUNDING = 1e-9


class TimeLeft:
    """The time that is left of some tasks; every moment is one of `time.monotonic()`."""

    def __init__(self, tasks: Sequence[Task], *, now_s: float) -> None:
        self._tasks = list(tasks)
        self._began_s = now_s
        self._fractions: dict[str, float] = {}
        """How far the tasks that started are, by name."""
        self._clocks: dict[str, _Clock] = {}
        """Of those whose known seconds began, in that order."""

    def skip(self, task: Task) -> None:
        """Its artefact was there already."""
        self._tasks = [t for t in self._tasks if t is not task]

    def advance(self, task: Task, fraction: float, *, now_s: float) -> None:
        """The task is this far."""
        self._fractions[task.name] = fraction
        begins = task.work_share
        if not task.known_s or fraction < begins - ROUNDING:
            return
        passed = (fraction - begins) / (1 - begins)
        if task.name in self._clocks:
            self._clocks[task.name].tell(passed, now_s=now_s)
        else:
            self._clocks[task.name] = _Clock(task, begun_s=now_s, passed=passed)

    def finish(self, task: Task, *, now_s: float) -> None:
        """The task is done."""
        self._fractions[task.name] = 1.0
        if task.name in self._clocks:
            self._clocks[task.name].ended_s = now_s

    @property
    def share(self) -> float:
        """How much of everything is done, 0 to 1."""
        total = sum(task.weight for task in self._tasks)
        done = sum(task.weight * self._fractions.get(task.name, 0.0) for task in self._tasks)
        return done / total if total else 1.0

    def seconds(self, *, now_s: float) -> float | None:
        """The time left; None while nobody can tell, and when all is done."""
        if now_s - self._began_s < 1.0:
            return None
        work = sum(task.forwards for task in self._tasks)
        done = sum(
            min(self._fractions.get(t.name, 0.0) * t.weight, t.forwards) for t in self._tasks
        )
        left = sum(self._known_left(task) for task in self._tasks if task.known_s)
        if work > done:
            if done < MIN_SHARE_FOR_ESTIMATE * work:
                return None
            on_clocks = sum(clock.taken(now_s=now_s) for clock in self._clocks.values())
            left += (work - done) * (now_s - self._began_s - on_clocks) / done
        return left or None

    def _known_left(self, task: Task) -> float:
        if self._fractions.get(task.name) == 1.0:
            return 0.0
        if task.name in self._clocks:
            return self._clocks[task.name].left
        # What waits will be as the last of its kind was, setting up included.
        seen = (clock.ratio for clock in reversed(self._clocks.values()) if clock.of(task.stage))
        return task.known_s * next((ratio for ratio in seen if ratio is not None), 1.0)


@dataclass
class _Clock:
    """A task's known seconds, as they pass."""

    task: Task
    begun_s: float
    passed: float
    """The part of them that had passed before, when the task began where another command ended."""
    first: tuple[float, float] | None = None
    """(moment, part passed) of the first word since. What was before it is setting up."""
    last: tuple[float, float] | None = None
    ended_s: float | None = None

    def of(self, stage: str) -> bool:
        return self.task.stage == stage

    def tell(self, passed: float, *, now_s: float) -> None:
        if self.first is None and now_s - self.begun_s < BEGINNING_S:
            self.passed = passed
            return
        self.last = (now_s, passed)
        self.first = self.first or self.last

    def taken(self, *, now_s: float) -> float:
        return (now_s if self.ended_s is None else self.ended_s) - self.begun_s

    @property
    def left(self) -> float:
        """At the rate seen, or where there is none yet as it is known."""
        passed = self.passed if self.last is None else self.last[1]
        rate = self._rate
        return (1 - passed) * (self.task.known_s if rate is None else rate)

    @property
    def ratio(self) -> float | None:
        """What they take, beside what was known; None while nobody can tell."""
        known_s = self.task.known_s * (1 - self.passed)
        if known_s <= 0:
            return None
        if self.ended_s is not None:
            return (self.ended_s - self.begun_s) / known_s
        if self._rate is None or self.last is None:
            return None
        return (self.last[0] - self.begun_s + self.left) / known_s

    @property
    def _rate(self) -> float | None:
        """Seconds that all of it takes."""
        if self.first is None or self.last is None or self.last[1] <= self.first[1]:
            return None
        return (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])

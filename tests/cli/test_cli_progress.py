"""How far the work is, where there is no terminal: lines, not too many and not too few."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace

import pytest
from rich.console import Console

from harness.cli.progress import PLAIN_INTERVAL_SECONDS, ConsoleReporter, duration
from harness.pipeline.tasks import Progress, Task, run_tasks


@dataclass
class Clock:
    """Time passes when a task says so."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("harness.cli.progress.time", clock)
    monkeypatch.setattr("harness.pipeline.tasks.time", clock)
    return clock


def lasting(clock: Clock, stage: str, name: str, *, seconds: float, steps: int = 1) -> Task:
    def work(progress: Progress) -> None:
        for step in range(1, steps + 1):
            clock.now += seconds / steps
            progress(step / steps, f"step {step}")

    return Task(stage, f"{stage} {name}", work=seconds, is_done=lambda: False, run=work)


def said(tasks: list[Task]) -> list[str]:
    text = io.StringIO()
    run_tasks(tasks, ConsoleReporter(Console(file=text, force_terminal=False)))
    return text.getvalue().splitlines()


def test_a_hundred_small_files_are_neither_silent_nor_a_flood(clock: Clock) -> None:
    tasks = [lasting(clock, "craft", f"full_eps{e}", seconds=3.0) for e in range(100)]
    lines = said(tasks)
    spent = 100 * 3.0
    assert spent / (PLAIN_INTERVAL_SECONDS + 2 * 3.0) <= len(lines) <= spent / 15
    assert all(line.startswith(("craft ", "  craft ")) for line in lines)
    assert all(re.search(r"about .* left$", line) for line in lines)
    # 18 s in, 282 s are left at this rate: in whole minutes.
    assert "about 5 min left" in lines[0]


def test_one_long_task_says_how_far_it_is(clock: Clock) -> None:
    lines = said([lasting(clock, "train", "full", seconds=100.0, steps=100)])
    assert len(lines) == 100 // 16 + 1
    assert lines[0] == "  train full: 16%, step 16; about 84 s left"
    assert lines[-1] == "train full: 100.0 s"


def test_what_takes_its_seconds_anywhere_is_not_left_by_the_rate_of_other_work(
    clock: Clock,
) -> None:
    """Work runs at 10,000 forward passes a second; a device has five minutes, whatever that is."""
    work = replace(lasting(clock, "train", "full", seconds=20.0, steps=10), work=200_000.0)
    budget = replace(
        lasting(clock, "evaluate", "on rpi4", seconds=300.0, steps=100), work=0.0, seconds=300.0
    )
    lines = said([work, budget])
    assert lines[0] == "  train full: 80%, step 8; about 5 min left"  # 4 s and 300 s
    assert lines[1] == "train full: 20.0 s; about 5 min left"
    for line in lines[2:-1]:
        found = re.search(r"(\d+)%.* about (\d+) (s|min) left$", line)
        assert found, line
        seconds = int(found[2]) * (60 if found[3] == "min" else 1)
        assert seconds == pytest.approx(300 - 3 * int(found[1]), abs=31)


def test_what_is_cached_is_one_line(clock: Clock) -> None:
    done = Task("train", "train full", 1.0, lambda: True, lambda progress: None)
    assert said([done] * 7) == ["7 already built and still valid: not built again"]


def test_the_bars_go_away_when_a_task_fails(clock: Clock) -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError("no")

    text = io.StringIO()
    reporter = ConsoleReporter(Console(file=text, force_terminal=True, no_color=True))
    with pytest.raises(RuntimeError, match="no"):
        run_tasks([Task("train", "train [full]", 1.0, lambda: False, fail)], reporter)
    assert text.getvalue().endswith(("\x1b[?25h", "\x1b[2K"))  # cursor back, line cleared


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (420, "7 min"), (12_000, "3 h 20 min")],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text

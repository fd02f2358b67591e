"""How far the work is, where there is no terminal: lines, not too many and not too few."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from devices.local import LocalDevice
from devices.session import DeviceSession
from harness.cli.progress import PLAIN_INTERVAL_SECONDS, ConsoleReporter, duration
from harness.pipeline.context import Context
from harness.pipeline.evaluation import evaluate_task
from harness.pipeline.experiment import variant_victim
from harness.pipeline.running import run_tasks
from harness.pipeline.tasks import Progress, Task
from harness.sampling import Budget
from harness.workspace import open_workspace


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
    monkeypatch.setattr("harness.pipeline.running.time", clock)
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


@dataclass(frozen=True)
class Budgeted:
    """Models that are attacked under a time budget, one after the other."""

    models: int
    torch_s: float
    """PyTorch's part of each; 600 images clean and attacked."""
    setup_s: float
    budget_s: float
    takes_s: float
    """What the device takes for all images, where that is less than the budget."""
    stored: float = 0.0
    """The part of the first that was done when an earlier command was interrupted."""

    def task(self, clock: Clock, index: int) -> Task:
        stored = self.stored if index == 0 else 0.0

        def work(progress: Progress) -> None:
            for half in (0.5, 1.0):
                clock.now += 0.0 if stored else self.torch_s / 2
                progress(half * task.work_share, "")

            def tell(part: float) -> None:
                progress(task.work_share + part * (1 - task.work_share), "")

            tell(stored)
            clock.now += self.setup_s
            total = min(self.budget_s, self.takes_s)
            passed = stored * total
            while passed < total:
                step = min(2.0, total - passed)
                clock.now, passed = clock.now + step, passed + step
                tell(passed / total)

        task = Task(
            *("evaluate", f"attack {index} on rpi4", 1200.0),
            is_done=lambda: False,
            run=work,
            known_s=self.budget_s,
        )
        return task


@pytest.fixture
def estimates(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(moment, seconds left) of everything that a person is told."""
    told: list[tuple[float, float]] = []

    def duration_told(seconds: float) -> str:
        told.append((clock.now, seconds))
        return duration(seconds)

    monkeypatch.setattr("harness.cli.progress.duration", duration_told)
    return told


def check_estimates(told: list[tuple[float, float]], *, began: float, ended: float) -> None:
    """After ten seconds, all of them within 30 % of what it then took, give or take 2 s."""
    late = [(now, left) for now, left in told if now >= began + 10]
    assert len(late) >= (ended - began) / 40
    for now, left in late:
        assert left == pytest.approx(ended - now, rel=0.3, abs=2.0), (now - began, told)


@pytest.mark.parametrize(
    "case",
    [
        Budgeted(models=1, torch_s=0.5, setup_s=4.0, budget_s=600.0, takes_s=4000.0),
        Budgeted(models=10, torch_s=0.5, setup_s=4.0, budget_s=60.0, takes_s=4000.0),
        Budgeted(models=10, torch_s=0.5, setup_s=4.0, budget_s=30.0, takes_s=31.0),
        # PyTorch alone takes long.
        Budgeted(models=3, torch_s=120.0, setup_s=1.0, budget_s=200.0, takes_s=4000.0),
        # Every image fits into a small part of the budget.
        Budgeted(models=10, torch_s=0.5, setup_s=1.0, budget_s=360.0, takes_s=24.0),
        # It goes on where it was interrupted, or with a larger budget where the sample ended.
        Budgeted(models=4, torch_s=0.5, setup_s=4.0, budget_s=100.0, takes_s=999.0, stored=0.5),
        Budgeted(models=1, torch_s=0.5, setup_s=4.0, budget_s=600.0, takes_s=999.0, stored=0.5),
    ],
)
def test_with_a_budget_the_time_left_follows_it(
    case: Budgeted, clock: Clock, estimates: list[tuple[float, float]]
) -> None:
    began = clock.now
    lines = said([case.task(clock, index) for index in range(case.models)])
    assert lines
    check_estimates(estimates, began=began, ended=clock.now)


def test_a_budget_does_not_spoil_the_estimate_of_other_work(
    clock: Clock, estimates: list[tuple[float, float]]
) -> None:
    """The device comes last, and forward passes are ten times slower than budgets assume."""
    train = lasting(clock, "train", "full", seconds=300.0, steps=100)
    train = replace(train, work=30_000.0)
    case = Budgeted(models=5, torch_s=12.0, setup_s=4.0, budget_s=60.0, takes_s=4000.0)
    began = clock.now
    said([train, *(case.task(clock, index) for index in range(case.models))])
    check_estimates(estimates, began=began, ended=clock.now)


class SlowSession:
    """This machine's, on a clock that half a second passes on for every image."""

    def __init__(self, session: DeviceSession, clock: Clock) -> None:
        self._session, self._clock = session, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def predict(self, delta: Any, *, start: int, stop: int, batch_size: int) -> Any:
        self._clock.now += 0.5 * (stop - start)
        return self._session.predict(delta, start=start, stop=stop, batch_size=batch_size)


@dataclass(frozen=True)
class SlowBoard:
    """A board that takes a hundred seconds for what is evaluated under one of two conditions."""

    clock: Clock
    name: str = "rpi4"
    emulated: bool = True
    default_budget_s: float | None = 300.0

    @contextmanager
    def open(self) -> Iterator[Any]:
        self.clock.now += 3.0
        with LocalDevice().open() as session:
            yield SlowSession(session, self.clock)


@pytest.mark.parametrize("budget_s", [80.0, 2000.0])
def test_an_evaluation_says_when_its_budget_begins(
    budget_s: float,
    clock: Clock,
    estimates: list[tuple[float, float]],
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real task, from the store to the line; 100 images, 50 s each clean and attacked."""
    monkeypatch.setattr("harness.pipeline.on_device.time", clock)
    context = Context(open_workspace(workspace), torch.device("cpu"))
    uap = context.workspace.cache / "full_eps10.pt"
    board = SlowBoard(clock)
    tasks = [
        evaluate_task(context, variant_victim(context, name), [uap], board, Budget(budget_s / 2))
        for name in ("full", "q4")
    ]
    assert [task.known_s for task in tasks] == [budget_s / 2] * 2
    began = clock.now
    lines = said(tasks)
    assert clock.now - began == pytest.approx(min(budget_s, 200.0) + 2 * 3.0, abs=6.0)
    assert any(line.endswith("left") for line in lines)
    check_estimates(estimates, began=began, ended=clock.now)
    assert all(task.is_done() for task in tasks)


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

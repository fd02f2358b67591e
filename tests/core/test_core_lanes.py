"""Groups of tasks that use nothing in common run beside each other: a GPU, and the cores by it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.pipeline.estimate import Rates, elapsed_seconds
from harness.pipeline.running import phases, run_tasks
from harness.pipeline.tasks import Deadline, Progress, Shared, Silent, Task
from harness.records import TimeLimitReached

WAIT_SECONDS = 20.0
GPU: frozenset[Shared] = frozenset(("accelerator",))
CORES: frozenset[Shared] = frozenset(("cores",))
JOBS: dict[Shared, int] = {"accelerator": 2, "cores": 3}


def nothing(_progress: Progress) -> None:
    pass


def trained(
    name: str, run: Callable[[Progress], None] = nothing, after: tuple[str, ...] = ()
) -> Task:
    return Task("train", name, 2.0, lambda: False, run, beside="accelerator", after=after, uses=GPU)


def exported(
    name: str, run: Callable[[Progress], None] = nothing, after: tuple[str, ...] = ()
) -> Task:
    return Task("export", name, 0.0, lambda: False, run, "cores", after, core_work=3.0, uses=CORES)


def crafted(
    name: str, run: Callable[[Progress], None] = nothing, after: tuple[str, ...] = ()
) -> Task:
    return Task("craft", name, 4.0, lambda: False, run, after=after, uses=GPU)


def evaluated(name: str, run: Callable[[Progress], None] = nothing) -> Task:
    return Task("evaluate", name, 1.0, lambda: False, run, beside="cores")


def names(tasks: list[Task]) -> list[list[list[list[str]]]]:
    return [
        [[[task.name for task in group] for group in lane] for lane in lanes]
        for lanes in phases(tasks)
    ]


def test_what_uses_something_in_common_comes_in_turn() -> None:
    tasks = [trained("t"), exported("e"), crafted("c1"), crafted("c2"), evaluated("v")]
    assert names(tasks) == [[[["t"], ["c1", "c2"]], [["e"]]], [[["v"]]]]
    # Without a GPU everything uses the cores.
    plain = [Task("train", name, 1.0, lambda: False, nothing, "cores") for name in "ab"]
    assert names([*plain, Task("latency", "l", 1.0, lambda: False, nothing)]) == [
        [[["a", "b"]]],
        [[["l"]]],
    ]


def test_an_export_runs_while_the_next_model_is_trained() -> None:
    """Each waits for the other to have begun: one after the other they would never end."""
    exporting, training = threading.Event(), threading.Event()

    def export(_progress: Progress) -> None:
        exporting.set()
        assert training.wait(WAIT_SECONDS)

    def train(_progress: Progress) -> None:
        training.set()
        assert exporting.wait(WAIT_SECONDS)

    tasks = [
        trained("train full"),
        trained("train q4", train, ("train full",)),
        exported("export full", export, ("train full",)),
        exported("export q4", after=("train q4",)),
    ]
    assert run_tasks(tasks, Silent(), jobs=JOBS) == 4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_everything_runs_once_and_after_what_it_needs(data: st.DataObject) -> None:
    models = data.draw(st.integers(1, 6))
    jobs: dict[Shared, int] = {
        "accelerator": data.draw(st.integers(1, 3)),
        "cores": data.draw(st.integers(1, 4)),
    }
    done: list[str] = []

    def needing(*needed: str, name: str) -> Callable[[Progress], None]:
        def run(_progress: Progress) -> None:
            assert set(needed) <= set(done)
            done.append(name)

        return run

    tasks = []
    for i in range(models):
        parent = f"t{data.draw(st.integers(0, i - 1))}" if i and data.draw(st.booleans()) else None
        after = (parent,) if parent else ()
        tasks.append(trained(f"t{i}", needing(*after, name=f"t{i}"), after))
    tasks += [exported(f"e{i}", needing(f"t{i}", name=f"e{i}"), (f"t{i}",)) for i in range(models)]
    everything = [f"t{i}" for i in range(models)]
    tasks += [
        crafted(f"c{i}", needing(*everything, name=f"c{i}"), (f"t{i}",)) for i in range(models)
    ]
    before = [*everything, *(f"{kind}{i}" for kind in "ec" for i in range(models))]
    tasks += [evaluated(f"v{i}", needing(*before, name=f"v{i}")) for i in range(models)]
    assert run_tasks(tasks, Silent(), jobs=jobs) == len(tasks)
    assert sorted(done) == sorted(task.name for task in tasks)


@pytest.mark.parametrize("where", ["cores", "accelerator"])
@pytest.mark.parametrize("error", [RuntimeError("refused"), KeyboardInterrupt()])
def test_a_failure_in_one_lane_ends_the_other(where: str, error: BaseException) -> None:
    running, stopped, unreached = threading.Event(), threading.Event(), threading.Event()

    def fail(_progress: Progress) -> None:
        assert running.wait(WAIT_SECONDS)
        raise error

    def long(progress: Progress) -> None:
        running.set()
        try:
            while True:
                progress(0.5, "")
        except BaseException:
            stopped.set()
            raise

    def never(_progress: Progress) -> None:
        unreached.set()

    first, other = (fail, long) if where == "accelerator" else (long, fail)
    tasks = [trained("t", first), exported("e", other), exported("f", never, after=("t",))]
    tasks += [evaluated("v", never)]
    with pytest.raises(type(error)):
        run_tasks(tasks, Silent(), jobs=JOBS)
    assert stopped.is_set()
    assert not unreached.is_set()


@dataclass(frozen=True)
class WhenSaid(Deadline):
    """Over once an event is set."""

    said: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        return self.said.is_set()


def test_time_that_is_over_ends_both_and_leaves_the_rest() -> None:
    deadline, both = WhenSaid(), threading.Barrier(2)

    def endless(progress: Progress) -> None:
        progress(0.25, "")
        both.wait(WAIT_SECONDS)
        deadline.said.set()
        while True:
            progress(0.25, "")

    tasks = [trained("t", endless), exported("e", endless), evaluated("v")]
    with pytest.raises(TimeLimitReached, match="3 of 3 tasks left") as raised:
        run_tasks(tasks, Silent(), jobs=JOBS, deadline=deadline)
    assert "t at 25 %" in str(raised.value)
    assert "e at 25 %" in str(raised.value)


@pytest.mark.parametrize("where", ["cores", "accelerator"])
def test_a_failure_goes_before_the_time_that_was_over(where: str) -> None:
    deadline, both = WhenSaid(), threading.Barrier(2)

    def out_of_time(progress: Progress) -> None:
        both.wait(WAIT_SECONDS)
        deadline.said.set()
        progress(0.5, "")

    def fail(_progress: Progress) -> None:
        both.wait(WAIT_SECONDS)
        assert deadline.said.wait(WAIT_SECONDS)
        raise RuntimeError("refused")

    first, other = (fail, out_of_time) if where == "accelerator" else (out_of_time, fail)
    with pytest.raises(RuntimeError, match="refused"):
        run_tasks(
            [trained("t", first), exported("e", other)], Silent(), jobs=JOBS, deadline=deadline
        )


def test_an_interrupt_ends_both_lanes() -> None:
    both, stopped = threading.Barrier(2), []
    waiting = threading.main_thread().ident
    assert waiting is not None

    def endless(progress: Progress) -> None:
        if both.wait(WAIT_SECONDS) == 0:
            signal.pthread_kill(waiting, signal.SIGINT)
        try:
            while True:
                progress(0.5, "")
        except BaseException:
            stopped.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        run_tasks([trained("t", endless), exported("e", endless)], Silent(), jobs=JOBS)
    assert len(stopped) == 2


def test_the_longest_lane_decides_how_long_a_phase_takes() -> None:
    rates = Rates(accelerator=1.0, core=2.0)
    speedups: dict[Shared, int] = {"accelerator": 1, "cores": 2}
    tasks = [trained("t"), exported("e"), exported("f"), crafted("c"), evaluated("v")]
    # On the GPU 2 + 4, on the cores 2 x 6 / 2, then both.
    assert elapsed_seconds(tasks, rates, speedups=speedups) == 6 + 1
    tasks.insert(2, exported("g"))
    assert elapsed_seconds(tasks, rates, speedups=speedups) == 9 + 1


def test_the_last_export_begins_when_the_last_model_is_trained() -> None:
    rates = Rates(accelerator=50.0, core=1.0)
    tasks = [trained("t"), trained("u")]
    tasks += [exported(f"{name} as a file", after=(name,)) for name in "tu"]
    speedups: dict[Shared, int] = {"accelerator": 1, "cores": 2}
    assert elapsed_seconds(tasks, rates, speedups=speedups) == 200 + 3

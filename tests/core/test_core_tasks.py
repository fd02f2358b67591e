"""Tasks side by side: dependencies, order, failures, and interruption."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.pipeline.estimate import Rates, elapsed_seconds
from harness.pipeline.running import run_tasks
from harness.pipeline.tasks import Deadline, Progress, Shared, Silent, Task, to_build
from harness.records import TimeLimitReached

WAIT_SECONDS = 20.0


def task(
    name: str,
    run: Callable[[Progress], None],
    *,
    work: float = 1.0,
    after: tuple[str, ...] = (),
    beside: Shared | None = "accelerator",
) -> Task:
    return Task("train", name, work, lambda: False, run, beside=beside, after=after)


def share(jobs: int) -> dict[Shared, int]:
    return {"accelerator": jobs}


def test_what_is_of_something_that_is_built_is_built_too() -> None:
    done = {"train", "other", "export", "attack", "report"}
    chain = [("train", ()), ("other", ()), ("export", ("train",)), ("attack", ("export", "other"))]

    def tasks(missing: str) -> list[Task]:
        return [
            Task("train", name, 1.0, lambda name=name: name in done - {missing}, print, after=after)
            for name, after in chain
        ]

    assert [t.name for t in to_build(tasks(""))] == []
    assert [t.name for t in to_build(tasks("train"))] == ["train", "export", "attack"]
    assert [t.name for t in to_build(tasks("other"))] == ["other", "attack"]


def test_two_tasks_really_run_at_once() -> None:
    both = threading.Barrier(2)
    tasks = [task(name, lambda _: (both.wait(WAIT_SECONDS), None)[1]) for name in "ab"]
    assert run_tasks(tasks, Silent(), jobs=share(2)) == 2


def test_a_task_that_must_be_alone_is() -> None:
    running: list[str] = []

    def enter(name: str) -> Callable[[Progress], None]:
        def run(_progress: Progress) -> None:
            running.append(name)
            assert running == [name]
            threading.Event().wait(0.02)
            running.remove(name)

        return run

    tasks = [task(name, enter(name), beside=None) for name in "abc"]
    assert run_tasks(tasks, Silent(), jobs=share(3)) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=3), min_size=1, max_size=12), st.data())
def test_a_task_starts_after_all_it_needs(needs: list[list[int]], data: st.DataObject) -> None:
    """Any acyclic dependencies, any number of jobs: every task runs once, after its inputs."""
    jobs = data.draw(st.integers(1, 4))
    finished: list[int] = []
    tasks = []
    for index, wanted in enumerate(needs):
        inputs = {i % index for i in wanted} if index else set()

        def run(_progress: Progress, index: int = index, inputs: set[int] = inputs) -> None:
            assert inputs <= set(finished)
            finished.append(index)

        tasks.append(task(str(index), run, after=tuple(map(str, sorted(inputs)))))
    assert run_tasks(tasks, Silent(), jobs=share(jobs)) == len(needs)
    assert sorted(finished) == list(range(len(needs)))


def test_the_longest_chain_goes_first() -> None:
    """Two cores: full, then its three descendants, beside everything that depends on nothing."""
    started: list[str] = []
    tasks = [
        task("full", lambda _: started.append("full"), work=5),
        task("sfp", lambda _: started.append("sfp"), work=6),
        task("pp2", lambda _: started.append("pp2"), after=("full",)),
        task("q4", lambda _: started.append("q4"), work=4, after=("full",)),
        task("q3", lambda _: started.append("q3"), work=4, after=("q4",)),
    ]
    run_tasks(tasks, Silent(), jobs=share(2))
    assert set(started[:2]) == {"full", "sfp"}
    assert started.index("q4") < started.index("pp2")


def test_what_is_cached_is_not_run() -> None:
    def never(_progress: Progress) -> None:
        raise AssertionError

    cached = [
        Task("train", name, 1.0, lambda: True, never, beside="accelerator", after=needs)
        for name, needs in (("full", ()), ("pp2", ("full",)))
    ]
    assert run_tasks(cached, Silent(), jobs=share(2)) == 0


@pytest.mark.parametrize("error", [RuntimeError("diverged"), KeyboardInterrupt()])
def test_a_failure_ends_the_others_and_is_what_the_user_sees(error: BaseException) -> None:
    stopped, unreached = threading.Event(), threading.Event()
    long_started = threading.Event()

    def fail(_progress: Progress) -> None:
        assert long_started.wait(WAIT_SECONDS)
        raise error

    def long(progress: Progress) -> None:
        long_started.set()
        try:
            while True:
                progress(0.5, "")
        except BaseException:
            stopped.set()
            raise

    tasks = [task("fail", fail), task("long", long), task("next", lambda _: unreached.set())]
    with pytest.raises(type(error)):
        run_tasks(tasks, Silent(), jobs=share(2))
    assert stopped.is_set()
    assert not unreached.is_set()


class Ticks(Deadline):
    """Over when it has been looked at so often: a clock that no load makes slower."""

    def __init__(self, ticks: int) -> None:
        super().__init__()
        object.__setattr__(self, "left", itertools.count(ticks, -1))

    @property
    def is_over(self) -> bool:
        return next(self.left) <= 0  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("jobs", [1, 2])
def test_in_slices_of_time_the_work_gets_done(jobs: int) -> None:
    built: set[str] = set()
    starts: list[str] = []

    def tenths(name: str) -> Callable[[Progress], None]:
        def run(progress: Progress) -> None:
            starts.append(name)
            for tenth in range(10):
                progress(tenth / 10, "")
            built.add(name)

        return run

    tasks = [
        Task("train", name, 1.0, lambda n=name: n in built, tenths(name), beside="accelerator")  # type: ignore[misc]
        for name in "abcd"
    ]
    for _ in range(4):  # time for one task and a half, or for two at once and a bit
        before = set(built)
        with pytest.raises(TimeLimitReached) as stopped:
            run_tasks(tasks, Silent(), jobs=share(jobs), deadline=Ticks(25))
        assert stopped.value.exit_code == 124
        assert f"{4 - len(built)} of 4 tasks left" in str(stopped.value)
        assert built > before
        if len(built) >= 2:
            break
    run_tasks(tasks, Silent(), jobs=share(jobs), deadline=Ticks(1000))
    assert built == set("abcd")
    assert len(starts) > len(built), "no slice ended within a task"


def test_a_time_limit_that_is_over_builds_nothing_but_finished_work_is_no_failure() -> None:
    done = Task("train", "a", 1.0, lambda: True, lambda _: pytest.fail("run"))
    over = Deadline.after(0)
    assert run_tasks([done], Silent(), deadline=over) == 0
    with pytest.raises(TimeLimitReached, match="1 of 2 tasks left"):
        run_tasks([done, task("b", lambda _: pytest.fail("run"))], Silent(), deadline=over)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_time_limit_says_how_far_what_was_running_is(jobs: int) -> None:
    def run(progress: Progress) -> None:
        for percent in range(100):
            progress(percent / 100, "")

    tasks = [task("done", lambda _: None, beside=None), task("train full", run)]
    with pytest.raises(TimeLimitReached, match=r" tasks left \(train full at 45 %\): the same"):
        run_tasks(tasks, Silent(), jobs=share(jobs), deadline=Ticks(47))


def idle(_progress: Progress) -> None: ...


def test_estimates_know_what_runs_side_by_side() -> None:
    def elapsed(tasks: list[Task], *, jobs: int) -> float:
        return elapsed_seconds(tasks, Rates(1.0, 1.0), speedups=share(jobs))

    first = task("full", idle, work=4.0)
    others = [task(name, idle, work=2.0) for name in "abcd"]
    alone = task("export", idle, work=1.0, beside=None)
    assert elapsed([first, *others, alone], jobs=1) == 4 + 8 + 1
    assert elapsed([first, *others, alone], jobs=2) == 12 / 2 + 1
    assert elapsed([first, *others, alone], jobs=4) == 4 + 1  # the longest decides
    waiting = [task(name, idle, work=2.0, after=("full",)) for name in "abcd"]
    assert elapsed([first, *waiting], jobs=4) == 4 + 2
    # What it waits for is there already: it waits for nothing.
    assert elapsed(waiting, jobs=4) == 2
    assert elapsed([], jobs=2) == 0


def test_one_gpu_and_many_cores_are_counted_apart() -> None:
    """Models are trained one by one on a GPU, and evaluated side by side on the cores beside it."""
    jobs: dict[Shared, int] = {"accelerator": 1, "cores": 4}
    trained = [task(f"train {i}", idle, work=3.0) for i in range(4)]
    evaluated = [
        replace(task(f"attack {i}", idle, work=0.5, beside="cores"), core_work=4.0)
        for i in range(8)
    ]
    rates = Rates(accelerator=1.0, core=0.5)
    assert elapsed_seconds([*trained, *evaluated], rates, speedups=jobs) == 12 + 8 * 2.5 / 4
    # A GPU that all of them wait for decides.
    slow = Rates(accelerator=4.0, core=0.5)
    assert elapsed_seconds(evaluated, slow, speedups=jobs) == 8 * 0.5 * 4
    at_once, most, lock = 0, {"train": 0, "attack": 0}, threading.Lock()

    def counted(name: str) -> Callable[[Progress], None]:
        def run(_progress: Progress) -> None:
            nonlocal at_once
            with lock:
                at_once += 1
                most[name] = max(most[name], at_once)
            threading.Event().wait(0.05)
            with lock:
                at_once -= 1

        return run

    tasks = [task(f"train {i}", counted("train")) for i in range(3)]
    tasks += [task(f"attack {i}", counted("attack"), beside="cores") for i in range(8)]
    assert run_tasks(tasks, Silent(), jobs=jobs) == 11
    assert most == {"train": 1, "attack": 4}


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e4))
def test_each_kind_of_cost_has_its_own_rate(work: float, core_work: float, seconds: float) -> None:
    one = Task("x", "x", work, lambda: False, idle, core_work=core_work, known_s=seconds)
    assert Rates(0.25, 0.5).seconds(one) == work / 4 + core_work / 2 + seconds

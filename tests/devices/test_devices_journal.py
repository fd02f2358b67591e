"""What a runner with a home remembers, who may use it, and what it does when left alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices import runner
from devices.local import RUNNER
from devices.perturbation import perturb
from devices.process import ProcessTransport
from devices.session import DeviceSession, open_session
from harness.records import DeviceUnreachable, HarnessError

Journal = list[dict[str, Any]]


def at_home(home: Path, *options: str) -> ProcessTransport:
    return ProcessTransport([sys.executable, "-I", str(RUNNER), "--home", str(home), *options])


def lock(holder: str, token: str = "") -> list[str]:
    return ["--lock", json.dumps({"holder": holder, "token": token or holder})]


def journals(home: Path) -> list[Journal]:
    """The chunks of every journal, without their keys."""
    paths = sorted((home / "journal").glob("*.jsonl"))
    return [[json.loads(line) for line in p.read_text().splitlines()[1:]] for p in paths]


def evaluated(journal: Journal) -> list[int]:
    """Every image that was run, as often as it was."""
    return [c["start"] + i for c in journal for i in range(len(c["predictions"]))]


def session_at(home: Path, model, images, *options: str) -> Any:
    class Opened:
        def __enter__(self) -> DeviceSession:
            self.context = open_session(at_home(home, *options))
            session = self.context.__enter__()
            session.load(model.path, threads=1)
            session.set_images(images)
            return session

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)

    return Opened()


def test_what_was_predicted_is_never_run_again(model, images, delta_255, tmp_path: Path) -> None:
    for _ in range(2):
        with session_at(tmp_path, model, images) as session:
            clean = session.predict(None, batch_size=5)
            attacked = session.predict(delta_255, batch_size=5)
            np.testing.assert_array_equal(clean, model.classes(images))
            np.testing.assert_array_equal(attacked, model.classes(perturb(images, delta_255)))
    assert len(journals(tmp_path)) == 2
    for journal in journals(tmp_path):
        assert sorted(evaluated(journal)) == list(range(len(images)))


def test_answers_come_from_the_journal(model, images, tmp_path: Path) -> None:
    """Proven with a journal that says what no model would: it is believed, where the key fits."""
    with session_at(tmp_path, model, images) as session:
        session.predict(None, batch_size=5, stop=10)
    (path,) = (tmp_path / "journal").glob("*.jsonl")
    head = path.read_text().splitlines()[0]
    path.write_text(head + '\n{"start": 0, "predictions": [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]}\n')
    with session_at(tmp_path, model, images) as session:
        assert session.predict(None, batch_size=5, stop=10).tolist() == [4] * 10
        rest = session.predict(None, batch_size=5, start=8)
        assert rest[:2].tolist() == [4, 4]
        np.testing.assert_array_equal(rest[2:], model.classes(images)[10:])
        # Another batch size, other images: other keys.
        np.testing.assert_array_equal(session.predict(None, batch_size=4), model.classes(images))
        session.set_images(images[:6])
        np.testing.assert_array_equal(
            session.predict(None, batch_size=5), model.classes(images[:6])
        )


@pytest.mark.parametrize(
    "tear",
    [
        lambda text: text[:-3],
        lambda text: text + '{"start": 3, "pred',
        lambda text: text + "\0" * 100,
        lambda text: text + "nonsense\n",
        lambda text: text + '{"start": "x", "predictions": 3}\n',
        lambda text: text[:10],
        lambda _text: "",
        lambda text: text.replace('"threads": 1', '"threads": 2'),
    ],
)
def test_a_torn_journal_is_mended(model, images, tmp_path: Path, tear: Callable) -> None:
    with session_at(tmp_path, model, images) as session:
        session.predict(None, batch_size=5, stop=10)
    (path,) = (tmp_path / "journal").glob("*.jsonl")
    path.write_text(tear(path.read_text()))
    for _ in range(2):
        with session_at(tmp_path, model, images) as session:
            predictions = session.predict(None, batch_size=5)
            np.testing.assert_array_equal(predictions, model.classes(images))
    (journal,) = journals(tmp_path)
    assert sorted(evaluated(journal)) == list(range(len(images)))


def test_a_runner_killed_at_any_moment_loses_and_repeats_nothing(
    model, images, tmp_path: Path
) -> None:
    """The session takes it up again, five times; every image is in the journal once."""
    killed: list[int] = []
    transport = at_home(tmp_path)
    with open_session(transport, reconnect_s=60) as session:
        session.load(model.path, threads=1)
        session.set_images(images)

        def kill(_done: int) -> None:
            if session.pid not in killed and len(killed) < 5:
                os.kill(session.pid, signal.SIGKILL)
                killed.append(session.pid)

        predictions = session.predict(None, batch_size=2, on_progress=kill)
        np.testing.assert_array_equal(predictions, model.classes(images))
    assert len(killed) >= 2
    (journal,) = journals(tmp_path)
    assert sorted(evaluated(journal)) == list(range(len(images)))


def test_a_request_that_kills_its_runner_ends_some_time(model, images, tmp_path: Path) -> None:
    program = tmp_path / "runner.py"
    text = RUNNER.read_text()
    assert "session.run([" in text
    program.write_text(text.replace("session.run([", "os.abort() or session.run(["))
    told: list[str] = []
    transport = ProcessTransport([sys.executable, "-I", str(program)])

    def predict() -> None:
        with open_session(transport, reconnect_s=60, notice=told.append) as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            session.predict(None)

    with pytest.raises(DeviceUnreachable, match=r"lost 6 times at the same request.*SIGABRT"):
        predict()
    assert len([line for line in told if "connecting again" in line]) == 5


def test_a_full_disk_is_one_clear_line_and_leaves_no_torn_chunk(
    model, images, tmp_path: Path
) -> None:
    """A write fails half-way, as on a full disk; then there is room again."""
    with session_at(tmp_path, model, images) as session:
        session.predict(None, batch_size=5, stop=10)
    (path,) = (tmp_path / "journal").glob("*.jsonl")
    whole = path.read_bytes()
    limit = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) + 10}, resource.RLIM_INFINITY))\n"
        "import errno, os\n"
        "write = os.pwrite\n"
        "def full(*a):\n"
        "    try:\n"
        "        return write(*a)\n"
        "    except OSError as error:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device') from error\n"
        "os.pwrite = full\n"
        f"sys.argv = ['runner.py', '--home', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(RUNNER)!r}, run_name='__main__')\n"
    )

    def predict() -> None:
        with open_session(ProcessTransport([sys.executable, "-I", "-c", limit])) as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            session.predict(None, batch_size=5)

    with pytest.raises(HarnessError, match=r"^the disk of the device is full$"):
        predict()
    assert path.read_bytes() == whole
    with session_at(tmp_path, model, images) as session:
        np.testing.assert_array_equal(session.predict(None, batch_size=5), model.classes(images))


def test_two_runners_without_a_lock_do_not_damage_a_journal(model, images, tmp_path: Path) -> None:
    with session_at(tmp_path, model, images) as first:
        first.predict(None, batch_size=5, stop=10)
        with session_at(tmp_path, model, images) as second:
            np.testing.assert_array_equal(second.predict(None, batch_size=5), model.classes(images))
        np.testing.assert_array_equal(first.predict(None, batch_size=5), model.classes(images))
    (journal,) = journals(tmp_path)
    assert sorted(evaluated(journal)) == list(range(len(images)))


# --- one at a time -------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path, monkeypatch) -> Iterator[subprocess.Popen[bytes]]:
    """A runner of alice's that has the board."""
    process = started(tmp_path, *lock("alice@desk (process 1)", "t1"))
    yield process
    process.kill()
    process.communicate()


def started(home: Path, *options: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-I", str(RUNNER), "--home", str(home), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b'{"id": 1, "op": "quiet"}\n')
    process.stdin.flush()
    process.stdout.readline()
    return process


def refused(home: Path, *options: str) -> str:
    with pytest.raises(DeviceUnreachable) as caught, open_session(at_home(home, *options)):
        pass
    return str(caught.value)


def shortened(home: Path, **values: float) -> list[str]:
    """The command of a runner with other waits."""
    program = home.parent / "runner.py"
    text = RUNNER.read_text()
    for name, value in values.items():
        assert f"\n{name} = " in text
        text = text.replace(f"\n{name} = ", f"\n{name} = {value}\n_{name} = ")
    program.write_text(text)
    return [sys.executable, "-I", str(program), "--home", str(home)]


def test_a_second_harness_is_told_who_has_the_board(held, tmp_path: Path) -> None:
    command = [*shortened(tmp_path / "x", LOCK_WAIT_S=0.2)[:-1], str(tmp_path)]
    with (
        pytest.raises(DeviceUnreachable) as caught,
        open_session(ProcessTransport([*command, *lock("bob@lab (process 2)")])),
    ):
        pass
    this_year = time.strftime("%Y-")
    assert f"in use by alice@desk (process 1) since {this_year}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert held.poll() is None


def test_a_dead_holder_holds_nothing(held, tmp_path: Path) -> None:
    held.kill()
    with open_session(at_home(tmp_path, *lock("bob"))) as session:
        assert session.pid != held.pid


def test_a_new_connection_of_the_same_session_takes_over(held, tmp_path: Path) -> None:
    with open_session(at_home(tmp_path, *lock("alice@desk (process 1)", "t1"))):
        assert held.wait(timeout=30) == -signal.SIGKILL


def test_a_holder_that_hangs_expires(held, tmp_path: Path) -> None:
    """It beats no more, as if its workstation had been gone for an hour."""
    held.send_signal(signal.SIGSTOP)
    an_hour_ago_ns = time.monotonic_ns() - 3600 * 10**9
    os.utime(tmp_path / "lock", ns=(0, an_hour_ago_ns))
    with open_session(at_home(tmp_path, *lock("bob"))):
        assert held.wait(timeout=30) == -signal.SIGKILL


def test_the_lock_names_no_process_that_is_not_its_holder(held, tmp_path: Path) -> None:
    """A lock file that points elsewhere must not get a bystander killed."""
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        facts = json.loads((tmp_path / "lock").read_text())
        for pid in (bystander.pid, -1, "x", None):
            (tmp_path / "lock").write_text(json.dumps({**facts, "pid": pid}))
            os.utime(tmp_path / "lock", ns=(0, 0))
            command = [*shortened(tmp_path / "x", LOCK_WAIT_S=0.2)[:-1], str(tmp_path)]
            with (
                pytest.raises(DeviceUnreachable, match="in use by alice"),
                open_session(ProcessTransport([*command, *lock("bob")])),
            ):
                pass
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_it_beats_while_it_is_asked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = shortened(home, BEAT_PERIOD_S=0.05, IDLE_S=0.3)
    with open_session(ProcessTransport([*command, *lock("alice")])):

        def beats_after(moment_ns: int) -> bool:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                if (home / "lock").stat().st_mtime_ns > moment_ns:
                    return True
                time.sleep(0.05)
            return False

        assert beats_after(time.monotonic_ns())
        silent = (home / "lock").stat().st_mtime_ns
        while (now := (home / "lock").stat().st_mtime_ns) != silent or time.monotonic_ns() < (
            now + 10**9
        ):
            silent = now
            time.sleep(0.05)  # it falls silent when nobody asks


def test_it_ends_with_its_workstation_even_at_work(model, images, tmp_path: Path) -> None:
    """Its input hangs up in the middle of a minute's measurement."""
    np.save(tmp_path / "images.npy", images)
    process = started(tmp_path / "home", *lock("alice"))
    requests = [
        {"op": "load", "path": str(model.path), "sha256": digest(model.path), "threads": 1}
        | {"max_bytes": 1 << 20},
        {"op": "images", "path": str(tmp_path / "images.npy")}
        | {"sha256": digest(tmp_path / "images.npy")},
        {"op": "latency", "warmup_runs": 1, "warmup_seconds": 0, "min_runs": 3}
        | {"min_seconds": 3600},
    ]
    for number, request in enumerate(requests):
        process.stdin.write(json.dumps({"id": number, **request}).encode() + b"\n")
        process.stdin.flush()
        if request["op"] != "latency":
            assert json.loads(process.stdout.readline())["ok"]
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    process.stderr.close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_half_done_or_unused_is_swept(tmp_path: Path) -> None:
    ages = {
        "files/a.1.part": 2 * runner.PARTIAL_S,
        "files/b.1.part": 0,
        "files/c": 2 * runner.PARTIAL_S,
        "files/d": 2 * runner.UNUSED_S,
        "journal/e.jsonl": 2 * runner.UNUSED_S,
        "journal/f.jsonl": 2 * runner.PARTIAL_S,
    }
    for name, age_s in ages.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        os.utime(path, (time.time() - age_s,) * 2)
    with open_session(at_home(tmp_path, *lock("alice"))):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    assert left == {"files/b.1.part", "files/c", "journal/f.jsonl"}


# --- latency -------------------------------------------------------------------------------------

QUICK = {"warmup_runs": 1, "warmup_seconds": 0, "min_runs": 6, "min_seconds": 0}


def test_clean_and_attacked_images_take_turns(make_model, tmp_path: Path, images) -> None:
    """Shown by the images themselves, which a session that only writes them down sees."""
    delta = np.full((3, 8, 8), 7, np.int16)
    state = runner.State()
    seen: list[np.ndarray] = []

    class Recorder:
        def run(self, _names: list[str], feed: dict[str, np.ndarray]) -> None:
            seen.append(feed["image"])

    state.session, state.images, state.image_shape = Recorder(), images[:3], (3, 8, 8)
    np.save(tmp_path / "delta.npy", delta)
    path = tmp_path / "delta.npy"
    request = {**QUICK, "warmup_runs": 0, "delta": str(path), "delta_sha256": digest(path)}
    reply = runner.latency(state, request)
    assert len(reply["samples_ns"]) == 6
    timed = seen[-6:]
    for turn, image in enumerate(timed):
        clean = images[turn // 2 : turn // 2 + 1]
        np.testing.assert_array_equal(image, perturb(clean, delta) if turn % 2 else clean)


def test_a_session_measures_with_a_perturbation(session, model, images, delta_255) -> None:
    session.load(model.path, threads=1)
    session.set_images(images)
    process = session.measure(**QUICK, delta_255=delta_255)
    assert len(process.samples_ns) == 6


@pytest.mark.parametrize(
    ("name", "key"), [("energy_uj", "energy_uj"), ("power1_input", "power_uw")]
)
def test_a_sensor_is_read_around_the_measurement(
    model, images, tmp_path: Path, name: str, key: str
) -> None:
    from devices.requests import Sensors

    sensor = tmp_path / name
    sensor.write_text("123456\n")
    transport = ProcessTransport([sys.executable, "-I", str(RUNNER)])
    with open_session(transport, sensors=Sensors(energy=str(sensor))) as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        process = session.measure(**QUICK)
    assert len(process.telemetry) >= 2
    for reading in process.telemetry:
        assert (reading["energy_source"], reading[key]) == (str(sensor), 123456)


def test_a_sensor_that_is_none_is_refused(model, images, tmp_path: Path) -> None:
    from devices.requests import Sensors

    sensor = tmp_path / "energy_uj"
    sensor.write_text("warm\n")
    transport = ProcessTransport([sys.executable, "-I", str(RUNNER)])
    with open_session(transport, sensors=Sensors(energy=str(sensor))) as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        with pytest.raises(HarnessError, match="is no energy sensor"):
            session.measure(**QUICK)


def test_it_waits_until_the_board_is_cool(monkeypatch) -> None:
    temperatures = iter([71.0, 66.0, 59.5])
    slept: list[float] = []
    monkeypatch.setattr(runner, "read_telemetry", lambda: {"temperature_c": next(temperatures)})
    monkeypatch.setattr(runner.time, "sleep", slept.append)
    runner.cool_down(60.0)
    assert len(slept) == 2
    monkeypatch.setattr(runner, "read_telemetry", lambda: {"temperature_c": 80.0})
    monkeypatch.setattr(runner, "COOLING_LIMIT_S", 0.0)
    with pytest.raises(runner.Refused, match=r"80 C.*below 60 C"):
        runner.cool_down(60.0)
    monkeypatch.setattr(runner, "read_telemetry", lambda: {"temperature_c": None})
    runner.cool_down(60.0)


def test_a_file_in_the_place_of_the_journal_is_one_clear_line(tmp_path, model, images) -> None:
    (tmp_path / "journal").write_text("in the way")
    with (
        session_at(tmp_path, model, images) as session,
        pytest.raises(HarnessError, match=r"/journal must be a folder.*a file is in the way: move"),
    ):
        session.predict(None)

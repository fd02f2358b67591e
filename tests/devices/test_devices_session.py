from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from devices.local import RUNNER, LocalDevice
from devices.perturbation import perturb
from devices.process import ProcessTransport
from devices.registry import device_named
from devices.session import DeviceSession, open_session
from harness.records import DeviceUnreachable, HarnessError, MeasurementInvalid, UsageError


def is_gone(pid: int) -> bool:
    """Neither running nor a zombie: a zombie would still take the signal."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_names() -> None:
    device = device_named("local")
    assert (device.name, device.emulated) == ("local", False)
    with pytest.raises(UsageError, match=r"unknown device 'rpi9': choose from .*local"):
        device_named("rpi9")


def test_machine_says_where_it_ran(session: DeviceSession) -> None:
    import onnxruntime

    machine = session.machine
    assert machine.runtime_version == onnxruntime.__version__
    assert machine.python == sys.version.split()[0]
    assert machine.extra["numpy"] == np.__version__
    assert "pid" not in machine.extra  # the same machine is equal in every process


def test_predictions_equal_the_oracle(session, model, images, delta_255) -> None:
    loaded = session.load(model.path, threads=1)
    assert (loaded.classes, loaded.image_shape) == (5, (3, 8, 8))
    assert loaded.load_ns > 0
    session.set_images(images)
    clean = session.predict(None)
    assert clean.dtype == np.int64
    np.testing.assert_array_equal(clean, model.classes(images))
    attacked = session.predict(delta_255)
    np.testing.assert_array_equal(attacked, model.classes(perturb(images, delta_255)))
    assert (clean != attacked).any()
    assert len(set(clean)) > 1
    np.testing.assert_array_equal(session.predict(None), clean)  # the attack left nothing behind


@pytest.mark.parametrize("batch_size", [1, 2, 36, 37, 1000])
def test_batches_do_not_change_predictions(session, model, images, delta_255, batch_size) -> None:
    session.load(model.path, threads=1)
    session.set_images(images)
    done: list[int] = []
    got = session.predict(delta_255, batch_size=batch_size, on_progress=done.append)
    np.testing.assert_array_equal(got, model.classes(perturb(images, delta_255)))
    assert done == sorted(set(done))
    assert done[-1] == len(images)
    assert all(stop % batch_size == 0 for stop in done[:-1])


def test_a_model_of_batch_one_is_run_one_by_one(session, make_model, images) -> None:
    model = make_model("one", input_shape=[1, 3, 8, 8], output_shape=[1, 5])
    session.load(model.path, threads=1)
    session.set_images(images)
    np.testing.assert_array_equal(session.predict(None), model.classes(images))


def test_models_and_images_can_be_exchanged(session, make_model, images) -> None:
    first, second = make_model("first"), make_model("second", seed=5)
    session.set_images(images)
    for model in (first, second):
        session.load(model.path, threads=2)
        np.testing.assert_array_equal(session.predict(None), model.classes(images))
    session.set_images(images[:3])
    np.testing.assert_array_equal(session.predict(None), second.classes(images[:3]))


def test_inputs_are_checked_before_the_device_sees_them(session, model, images, delta_255) -> None:
    with pytest.raises(UsageError, match="first"):
        session.predict(None)
    with pytest.raises(UsageError, match="threads"):
        session.load(model.path, threads=0)
    with pytest.raises(UsageError, match="uint8"):
        session.set_images(images.astype(np.float32))
    session.load(model.path, threads=1)
    session.set_images(images)
    with pytest.raises(UsageError, match="batch size"):
        session.predict(None, batch_size=0)
    with pytest.raises(UsageError, match="integers"):
        session.predict(delta_255 / 255)
    with pytest.raises(UsageError, match=r"\(3, 8, 7\).*\(3, 8, 8\)"):
        session.predict(delta_255[:, :, 1:])
    session.set_images(images[:, :, 1:])
    with pytest.raises(UsageError, match=r"\(3, 8, 8\).*\(3, 7, 8\)"):
        session.predict(None)


def test_external_data_never_reaches_the_device(session, external_model: Path) -> None:
    with pytest.raises(UsageError, match="external data"):
        session.load(external_model, threads=1)


def test_what_onnxruntime_cannot_load_is_one_line(session, model, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(model.path)
    proto.graph.node[3].op_type = "Nonsense"
    path = tmp_path / "odd.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UsageError, match=r"odd\.onnx: onnxruntime .*Nonsense") as caught:
        session.load(path, threads=1)
    assert "\n" not in str(caught.value)
    session.load(model.path, threads=1)  # the session survives a refusal


def test_a_model_that_changes_on_the_way_is_refused(model, tmp_path: Path) -> None:
    class Corrupting(ProcessTransport):
        def put(self, local: Path, *, sha256: str) -> str:
            other = tmp_path / "other.onnx"
            other.write_bytes(local.read_bytes()[:-1] + b"?")
            return str(other)

    def load() -> None:
        with open_session(Corrupting([sys.executable, "-I", str(RUNNER)])) as session:
            session.load(model.path, threads=1)

    with pytest.raises(HarnessError, match="sha256"):
        load()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(session, make_model, images, value) -> None:
    bias = np.array([0, 0, value, 0, 0], np.float32)
    session.load(make_model("nan", bias=bias).path, threads=1)
    session.set_images(images)
    with pytest.raises(MeasurementInvalid, match="logits of image 0 are not finite"):
        session.predict(None)


# --- how it ends -------------------------------------------------------------------------------


def test_the_runner_ends_with_the_context() -> None:
    with LocalDevice().open() as session:
        pid = session.pid
        assert not is_gone(pid)
    assert is_gone(pid)


def pid_after(
    use: Callable[[DeviceSession], object], error: type[BaseException], match: str | None = None
) -> int:
    """Use a session in a way that must raise `error`; the pid its runner had."""
    pids: list[int] = []

    def run() -> None:
        with LocalDevice(reply_timeout_s=1).open() as session:
            pids.append(session.pid)
            use(session)

    with pytest.raises(error, match=match):
        run()
    return pids[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_runner_too(error: type[BaseException]) -> None:
    def use(_session: DeviceSession) -> None:
        raise error

    assert is_gone(pid_after(use, error))


def test_a_runner_killed_while_predicting_is_one_clear_error(model, images) -> None:
    def use(session: DeviceSession) -> None:
        session.load(model.path, threads=1)
        session.set_images(images)
        kill = partial(os.kill, session.pid, signal.SIGKILL)
        session.predict(None, batch_size=2, on_progress=lambda _done: kill())

    message = r"^the runner ended unexpectedly \(killed by SIGKILL\)$"
    assert is_gone(pid_after(use, DeviceUnreachable, message))


def test_ctrl_c_while_waiting_ends_the_runner(images) -> None:
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))

    def use(session: DeviceSession) -> None:
        os.kill(session.pid, signal.SIGSTOP)  # it will never answer
        timer.start()
        session.set_images(images)

    assert is_gone(pid_after(use, KeyboardInterrupt))
    timer.join()


def test_a_silent_runner_is_given_up(images) -> None:
    def use(session: DeviceSession) -> None:
        os.kill(session.pid, signal.SIGSTOP)
        session.set_images(images)

    assert is_gone(pid_after(use, DeviceUnreachable, r"not answered for 1 s"))


def run_command(*command: str) -> None:
    with open_session(ProcessTransport(command)):
        pass


def run_program(program: str) -> None:
    run_command(sys.executable, "-c", program)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import nothing_of_this_name", r"\(exit code 1\): ModuleNotFoundError: No module named"),
        ("import os; os.abort()", r"killed by SIGABRT"),
        ("print('hello')", r"not its protocol: 'hello"),
        ("print('[]')", r"not its protocol"),
        ("import os; os.close(1); os.close(2); input()", "ended unexpectedly|closed its output"),
        (
            "import sys; sys.stderr.write('x' * 1000000 + '\\n\\nlast words\\n\\n'); sys.exit(3)",
            r"\(exit code 3\): last words$",
        ),
    ],
)
def test_what_is_not_a_runner_is_one_clear_error(program: str, message: str) -> None:
    with pytest.raises(DeviceUnreachable, match=message) as caught:
        run_program(program)
    assert "\n" not in str(caught.value)


def test_another_protocol_version_is_refused() -> None:
    program = 'print(\'{"id": 1, "ok": true, "protocol": 99}\'); input()'
    with pytest.raises(HarnessError, match="protocol 99"):
        run_program(program)


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(DeviceUnreachable, match="cannot start no-such-program"):
        run_command("no-such-program")


def test_the_environment_cannot_change_the_runner(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with LocalDevice().open() as session:
        assert session.machine.extra["numpy"] == np.__version__


def test_devices_need_neither_torch_nor_the_rest_of_the_harness() -> None:
    program = (
        "import sys, pkgutil, importlib, devices\n"
        "for m in pkgutil.iter_modules(devices.__path__):\n"
        "    importlib.import_module('devices.' + m.name)\n"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " ('torch', 'torchvision', 'scipy', 'onnx', 'onnxruntime', 'harness')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert sorted(eval(done.stdout)) == ["harness", "harness.records"]

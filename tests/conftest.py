"""Loaded before any test module, so before torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ssh_boards import OpenSsh, User

    from devices.emulated import EmulatedDevice

# Threads that spin while they wait make small models tens of times slower on busy cores; tests
# share theirs with the processes they start. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Started in the background of a script, a process inherits that Ctrl-C is ignored, and so would
# every process the tests start and interrupt. Python's own handler is what users have.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def emulated_rpi4(tmp_path_factory: pytest.TempPathFactory) -> EmulatedDevice:
    """The emulated Raspberry Pi 4, in the cache of whoever runs the tests; its first use loads.

    Tests that take it are marked `arm`, and skip where it cannot be set up.
    """
    from devices.emulated import EmulatedDevice, emulated_python
    from devices.profiles import built_in
    from harness.records import DeviceUnreachable

    profile = built_in()["rpi4"]
    said: list[str] = []
    try:
        emulated_python(profile, on_progress=said.append)
    except DeviceUnreachable as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("rpi4")  # nothing is answered from a journal of yesterday's
    return EmulatedDevice(profile, on_progress=said.append, home=home)


@pytest.fixture
def ssh_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """Somebody with a home folder and a key of their own, whose ssh knows the host `board`."""
    from ssh_boards import User

    return User(tmp_path / "user", monkeypatch)


@pytest.fixture
def openssh(ssh_user: User, tmp_path: Path) -> Iterator[OpenSsh]:
    """A real OpenSSH server behind it: a board that is set up, with this machine's Python."""
    from ssh_boards import OpenSsh, host_python

    server = OpenSsh(tmp_path / "board", ssh_user, host_python())
    server.set_up()
    server.start()
    yield server
    server.stop()

"""Devices reached over SSH: the runner on a real board, kept going through lost connections.

Enters: a profile with a host. Leaves: a `Transport` and a `Device`. A board that is not set up is
set up first (`devices.bootstrap`).
"""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import json
import os
import platform
import queue
import secrets
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from devices.board import Board, board_of
from devices.bootstrap import Environment, bootstrap_board, read_environment
from devices.connection import Limits
from devices.conversation import RECONNECT_S, REPLY_TIMEOUT_S
from devices.local import RUNNER
from devices.plain import plain
from devices.profiles import ARCHITECTURE, Profile
from devices.requests import Sensors
from devices.session import DeviceSession, open_session
from devices.transport import Refusal
from harness.records import DeviceUnreachable, HarnessError

if TYPE_CHECKING:
    import asyncssh

GRACE_S = 5.0
"""How long a runner whose input has ended may take to end."""
MAX_LINE_BYTES = 64 << 20
"""A minute of latency samples is a few; a board that sends more in one line is not a runner."""
STDERR_LINES = 20
STDERR_LINE_CHARS = 1000


class SshTransport:
    """A `devices.transport.Transport` to a runner on a board."""

    def __init__(self, board: Board, *, name: str, progress: Callable[[str], None]) -> None:
        self._board = board
        self._name = name
        self._progress = progress
        self._process: asyncssh.SSHClientProcess[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._lost = ""
        self._environment: Environment | None = None
        # One for all connections of this session, so that the next one ends what is left of the
        # one before.
        self._lock = {
            "holder": f"{_user()}@{platform.node()} (process {os.getpid()})",
            "token": secrets.token_hex(16),
        }

    def start(self) -> None:
        """Connect, set the board up if it is not, and start the runner."""
        board = self._board
        board.connect()
        self._lines = queue.SimpleQueue()
        self._stderr.clear()
        self._lost = ""
        if self._environment is None:
            self._environment = read_environment(board)
        if self._environment is None:
            self._environment = bootstrap_board(board, progress=self._progress)
        content = RUNNER.read_bytes()
        runner = board.put(RUNNER, sha256=hashlib.sha256(content).hexdigest())
        command = [
            *self._environment.python(board.root),
            *(runner, "--home", board.root, "--lock", json.dumps(self._lock)),
        ]
        self._process = board.link.do(
            self._start(command), board.link.limits.command_s, "to start the runner"
        )

    def send(self, line: str) -> None:
        """Write one request line."""
        self._board.link.do(
            self._send(line.encode() + b"\n"), self._board.link.limits.command_s, "to listen"
        )

    def receive(self, *, timeout_s: float) -> str:
        """The next line of the runner's standard output."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise DeviceUnreachable(
                f"{self._board.destination}: the runner has not answered for {timeout_s:g} s"
                f"{self._last_words()}"
            ) from None
        if line is None:
            self._lines.put(None)  # whoever asks next gets the same answer
            raise self._ended()
        return line.decode(errors="replace")

    def put(self, local: Path, *, sha256: str) -> str:
        """Store the file on the board, once."""
        return self._board.put(local, sha256=sha256)

    def discard(self, sha256: str) -> bool:
        """Remove the file from the board."""
        self._board.discard(sha256)
        return True

    def close(self, *, kill: bool = False) -> None:
        """End the runner and the connection. A runner whose connection is gone ends itself."""
        process, self._process = self._process, None
        try:
            if process is not None and not kill:
                with suppress(HarnessError):  # closing it ends the runner, too
                    self._board.link.do(self._finish(process), GRACE_S, "to end the runner")
        finally:
            self._board.close()

    async def _start(self, command: list[str]) -> asyncssh.SSHClientProcess[bytes]:
        process: asyncssh.SSHClientProcess[
            bytes
        ] = await self._board.link.connection.create_process(
            shlex.join(command), encoding=None, request_pty=False
        )
        self._tasks = [
            asyncio.create_task(self._read_stdout(process, self._lines)),
            asyncio.create_task(self._read_stderr(process)),
        ]
        return process

    async def _send(self, line: bytes) -> None:
        if self._process is None:
            raise DeviceUnreachable(f"{self._board.destination}: the runner was not started")
        try:
            self._process.stdin.write(line)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionError):
            # The reader learns why it ended; `receive` says so.
            await asyncio.wait(self._tasks, timeout=GRACE_S)
            raise self._ended() from None

    async def _finish(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        process.stdin.write_eof()
        await process.wait_closed()

    async def _read_stdout(
        self,
        process: asyncssh.SSHClientProcess[bytes],
        lines: queue.SimpleQueue[bytes | None],
    ) -> None:
        rest = b""
        try:
            while chunk := await process.stdout.read(1 << 16):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    lines.put(line)
                if len(rest) > MAX_LINE_BYTES:
                    self._lost = f"it sent a line of more than {MAX_LINE_BYTES} bytes"
                    process.close()
                    break
            await process.wait_closed()
        except Exception as error:  # whatever it is, the connection is over
            self._lost = plain(error) or type(error).__name__
        finally:
            lines.put(None)

    async def _read_stderr(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        with suppress(Exception):  # the other reader says why it ended
            while chunk := await process.stderr.read(1 << 16):
                for line in chunk.decode(errors="replace").splitlines():
                    self._stderr.append(line[:STDERR_LINE_CHARS])

    def _ended(self) -> DeviceUnreachable:
        process, where = self._process, self._board.destination
        if process is not None and not self._lost:
            signal, status = process.exit_signal, process.exit_status
            if signal:
                how = f"killed by SIG{signal[0]}"
            elif status is not None:
                how = f"exit code {status}"
            else:
                how = "the connection was lost"
            said = f"{where}: the runner ended unexpectedly ({how}){self._last_words()}"
            if status is None or not 0 < status < 128:  # cut off, or killed
                return DeviceUnreachable(said)
            # It cannot run: what was set up is gone, or was never whole.
            return Refusal(
                f"{said}; set the board up again: harness devices bootstrap {self._name}"
            )
        return DeviceUnreachable(
            f"{where}: the connection to the runner was lost"
            f"{f' ({self._lost})' if self._lost else ''}{self._last_words()}"
        )

    def _last_words(self) -> str:
        said = next((line.strip() for line in reversed(self._stderr) if line.strip()), "")
        return f": {plain(said)}" if said else ""


class SshDevice:
    """A board of the user's, by its profile."""

    emulated = False

    def __init__(
        self,
        profile: Profile,
        *,
        reconnect_s: float = RECONNECT_S,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        limits: Limits | None = None,
        notice: Callable[[str], None] | None = None,
        stands_for: Profile | None = None,
    ) -> None:
        self._profile = profile
        self._stands_for = stands_for
        self._reconnect_s = reconnect_s
        self._reply_timeout_s = reply_timeout_s
        self._limits = limits
        self._notice = notice or self._tell
        self._was_there = False

    @property
    def name(self) -> str:
        """As in `--device NAME`."""
        return self._profile.name

    @property
    def default_budget_s(self) -> float | None:
        """The profile's time budget."""
        return self._profile.budget_s

    @contextmanager
    def open(self) -> Iterator[DeviceSession]:
        """Connect and start a fresh runner; it ends with the context."""
        transport = SshTransport(
            board_of(self._profile, limits=self._limits), name=self.name, progress=self._notice
        )
        with open_session(
            transport,
            reply_timeout_s=self._reply_timeout_s,
            reconnect_s=self._reconnect_s,
            sensors=Sensors(energy=self._profile.energy_sensor, cooling_c=self._profile.cooling_c),
            notice=self._notice,
            was_there=self._was_there,
        ) as session:
            if not self._was_there:
                self._compare(session.machine.arch)
            self._was_there = True
            yield session

    def _compare(self, arch: str) -> None:
        """One line where the machine cannot be the board that its profile stands for."""
        if self._stands_for is not None and arch != ARCHITECTURE:
            self._notice(
                f"it answers as {plain(arch)}, not {ARCHITECTURE}: its rows say so, but these are"
                f" not the predictions of: {self._stands_for.title}"
            )

    def _tell(self, line: str) -> None:
        sys.stderr.write(f"{self.name}: {line}\n")
        sys.stderr.flush()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())

"""A runner in a child process of this machine, talked to through pipes.

Enters: the command that starts it. Leaves: a `Transport`. Serves the local device, and whatever
else runs the runner by a command on this file system, such as an emulator.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from harness.records import DeviceUnreachable

GRACE_S = 5.0
"""How long a runner whose input has ended may take to end."""
STDERR_LINES = 20
STDERR_LINE_BYTES = 1000
PASSED_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT")
"""What a Python needs to start. Not OMP_*, ORT_* or PYTHON*: they would change what is measured."""


class ProcessTransport:
    """A `devices.transport.Transport` over the standard streams of a child process."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stderr: deque[bytes] = deque(maxlen=STDERR_LINES)

    def start(self) -> None:
        """Start the child in a session of its own: Ctrl-C is for this process to handle."""
        self._readers, self._lines = [], queue.SimpleQueue()  # nothing of the child before
        self._stderr.clear()
        environment = {k: os.environ[k] for k in PASSED_ENVIRONMENT if k in os.environ}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the command is ours; no shell
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise DeviceUnreachable(f"cannot start {self._command[0]}: {error.strerror}") from None
        # Threads, so that a full stderr pipe never blocks the runner and waiting has a limit.
        for read, stream in (
            (self._read_stdout, self._process.stdout),
            (self._read_stderr, self._process.stderr),
        ):
            thread = threading.Thread(target=read, args=(stream,), daemon=True)
            thread.start()
            self._readers.append(thread)

    def send(self, line: str) -> None:
        """Write one request line."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: closed after an earlier failure
            raise self._ended() from None

    def receive(self, *, timeout_s: float) -> str:
        """The next line of the child's standard output."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise DeviceUnreachable(
                f"the runner has not answered for {timeout_s:g} s{self._last_words()}"
            ) from None
        if line is None:
            self._lines.put(None)  # whoever asks next gets the same answer
            raise self._ended()
        return line.decode(errors="replace")

    def put(self, local: Path, *, sha256: str) -> str:  # noqa: ARG002 - nothing is copied here
        """The file where it is: the child shares this file system."""
        return str(local)

    def discard(self, sha256: str) -> bool:  # noqa: ARG002 - nothing was copied
        """Nothing to remove: the file is the workstation's own."""
        return False

    def close(self, *, kill: bool = False) -> None:
        """End the child and leave no zombie, thread or open pipe behind."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        try:
            if kill:
                process.kill()
            with suppress(OSError):
                process.stdin.close()  # the end of its input asks it to end
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
        finally:  # also when Ctrl-C comes while waiting
            process.kill()
            process.wait()
            for thread in self._readers:
                thread.join()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()

    def _ended(self) -> DeviceUnreachable:
        """The error that says how the child ended, with its last words."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            return DeviceUnreachable(f"the runner closed its output{self._last_words()}")
        for thread in self._readers:
            thread.join(timeout=GRACE_S)
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        return DeviceUnreachable(
            f"the runner ended unexpectedly ({how}){self._unasked()}{self._last_words()}"
        )

    def _unasked(self) -> str:
        """What it said before it was asked anything: something else than the runner ran."""
        with suppress(queue.Empty):
            line = self._lines.get_nowait()
            if line is None:
                self._lines.put(None)
                return ""
            said = line.decode(errors="replace")
            return f" after it sent what is not its protocol: {said[:200]!r}"
        return ""

    def _last_words(self) -> str:
        words = [line.decode(errors="replace").strip() for line in self._stderr]
        said = next((line for line in reversed(words) if line), "")
        return f": {said}" if said else ""

    def _read_stdout(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def _read_stderr(self, stream: IO[bytes]) -> None:
        while line := stream.readline(STDERR_LINE_BYTES):
            self._stderr.append(line)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""One SSH connection to a board, used from ordinary code that waits.

Enters: a destination of the user's ssh. Leaves: commands run there, and for everything that goes
wrong one clear line. Everything waits with a limit.

The board is not trusted: its host key must be known, nothing is forwarded to it, what it prints
is read up to a limit, and no text of its making becomes a command.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from devices import ssh_errors
from devices.plain import plain
from harness.records import DeviceUnreachable, HarnessError, UsageError

if TYPE_CHECKING:
    import asyncssh

T = TypeVar("T")

MAX_OUTPUT_BYTES = 1 << 20
"""What a command may print; a board that prints more is not answering us."""


@dataclass(frozen=True)
class Limits:
    """How long each thing may take, in seconds."""

    connect_s: float = 15.0
    login_s: float = 30.0
    command_s: float = 60.0
    stall_s: float = 30.0
    """A transfer that moves nothing for so long is given up."""
    keepalive_s: float = 5.0
    """How often the board must give a sign of life; the third one it owes ends the connection."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int | None
    """None when a signal ended it."""
    signal: str | None
    """As SSH names it: "ILL", "KILL"."""
    stdout: str
    stderr: str

    @property
    def killed_by(self) -> str | None:
        """The signal, also where a shell in between turned it into 128 + n."""
        if self.signal is not None:
            return f"SIG{self.signal}"
        names = {132: "SIGILL", 134: "SIGABRT", 135: "SIGBUS", 137: "SIGKILL", 139: "SIGSEGV"}
        return names.get(self.status or 0)

    @property
    def last_words(self) -> str:
        """The last line on standard error, or on standard output."""
        lines = [line.strip() for line in (self.stdout + "\n" + self.stderr).splitlines()]
        return plain(next((line[:300] for line in reversed(lines) if line), "it said nothing"))


def asyncssh_module() -> ModuleType:
    """asyncssh, or one clear line where it is not installed."""
    try:
        import asyncssh
    except ImportError as error:
        raise HarnessError(
            f"devices over SSH need the package asyncssh ({error}): pip install asyncssh"
        ) from None
    return asyncssh


class Connection:
    """A connection to one board: commands, and a file transfer to use (`devices.board`)."""

    def __init__(self, destination: str, *, port: int | None, limits: Limits | None = None) -> None:
        self.destination = destination
        self.limits = limits or Limits()
        self._port = port
        self._port_to_name = ssh_errors.other_port(port)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._connection: asyncssh.SSHClientConnection | None = None
        self._sftp: asyncssh.SFTPClient | None = None

    def connect(self) -> None:
        """Connect, log in, and open the file transfer.

        Raises:
            Refusal: the board's host key is unknown or another one than before.
            DeviceUnreachable: no such host, no answer, no login.
            HarnessError: asyncssh is missing.
        """
        asyncssh_module()
        self.close()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        limits = self.limits
        try:
            self.do(self._connect(), limits.connect_s + limits.login_s, "to log in")
            self.do(self._open_files(), limits.command_s, "to open its files")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection at once; nothing of it stays. Calling it again does nothing."""
        loop, self._loop = self._loop, None
        thread, self._thread = self._thread, None
        connection, self._connection, self._sftp = self._connection, None, None
        if loop is None or thread is None:
            return

        async def end() -> None:
            if connection is not None:
                connection.abort()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        try:
            asyncio.run_coroutine_threadsafe(end(), loop).result(timeout=self.limits.connect_s)
        except (TimeoutError, asyncio.CancelledError):
            pass
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    @property
    def connection(self) -> asyncssh.SSHClientConnection:
        """The open connection.

        Raises:
            DeviceUnreachable: there is none.
        """
        if self._connection is None:
            raise DeviceUnreachable(f"{self.destination}: not connected")
        return self._connection

    @property
    def sftp(self) -> asyncssh.SFTPClient:
        """The file transfer of the open connection."""
        if self._sftp is None:
            raise DeviceUnreachable(f"{self.destination}: not connected")
        return self._sftp

    def do(self, work: Coroutine[Any, Any, T], limit_s: float | None, what: str) -> T:
        """The result of `work`, done on the connection's own thread within `limit_s`.

        Raises:
            HarnessError: one line that says what went wrong; `DeviceUnreachable` if the
                connection did.
        """
        if self._loop is None:
            work.close()
            raise DeviceUnreachable(f"{self.destination}: not connected")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, limit_s), self._loop)
        try:
            return future.result()
        except HarnessError:
            raise
        except TimeoutError:
            limit = f"more than {limit_s:g} s" if limit_s else "too long"
            raise DeviceUnreachable(f"{self.destination} took {limit} {what}") from None
        except asyncio.CancelledError:
            raise DeviceUnreachable(f"{self.destination}: the connection was closed") from None
        except Exception as error:
            raise ssh_errors.explained(error, self.destination, port=self._port_to_name) from None
        finally:
            future.cancel()  # Ctrl-C while waiting: nobody is left to want it

    async def _connect(self) -> None:
        asyncssh = asyncssh_module()
        user, _, host = self.destination.rpartition("@")
        chosen: dict[str, Any] = {"username": user} if user else {}
        if self._port is not None:
            chosen["port"] = self._port
        # What the user's ssh configuration makes of it: the real host, port and key files.
        try:
            options = await asyncssh.SSHClientConnectionOptions.construct(
                host=host, config=(), **chosen
            )
        except FileNotFoundError as error:  # OpenSSH goes on without it, asyncssh does not
            raise UsageError(
                f"{error.filename} is missing: ~/.ssh/config names it as a key (IdentityFile) or"
                f" certificate for {host}: make it, or take that line out"
            ) from None
        self._port_to_name = ssh_errors.other_port(options.port)
        known_hosts = ssh_errors.known_hosts(options.known_hosts)
        try:
            self._connection = await asyncssh.connect(
                host,
                **chosen,
                # Ours, read from the user's files: asyncssh takes `UserKnownHostsFile none` for
                # "trust anybody".
                known_hosts=known_hosts,
                agent_forwarding=False,
                x11_forwarding=False,
                connect_timeout=self.limits.connect_s,
                login_timeout=self.limits.login_s,
                keepalive_interval=self.limits.keepalive_s,
                keepalive_count_max=3,
            )
        except TimeoutError:
            raise DeviceUnreachable(
                f"{self.destination} has not answered for {self.limits.connect_s:g} s: is it on,"
                " and in this network?"
            ) from None
        except (asyncssh.DisconnectError, ConnectionResetError) as error:
            refused = await ssh_errors.host_key_refused(
                error, destination=self.destination, host=host, options=options, known=known_hosts
            )
            if refused is None:
                raise
            raise refused from None

    async def _open_files(self) -> None:
        try:
            self._sftp = await self.connection.start_sftp_client()
        except Exception as error:
            raise DeviceUnreachable(
                f"{self.destination} has no file transfer (SFTP): enable `Subsystem sftp` in its"
                f" sshd_config ({' '.join(str(error).split())})"
            ) from None

    def run(
        self, command: list[str], *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> Finished:
        """Run a command to its end.

        Raises:
            DeviceUnreachable: it did not end in time, or the connection did.
        """
        limit_s = self.limits.command_s if timeout_s is None else timeout_s
        return self.do(self._run(command, stdin), limit_s, f"to run {command[0]}")

    async def _run(self, command: list[str], stdin: bytes) -> Finished:
        process = await self.connection.create_process(
            shlex.join(command), encoding=None, request_pty=False
        )
        async with process:

            async def read(stream: Any) -> bytes:
                content = b""
                while chunk := await stream.read(1 << 16):
                    content = (content + chunk)[:MAX_OUTPUT_BYTES]
                return content

            async def write() -> None:
                try:
                    process.stdin.write(stdin)
                    await process.stdin.drain()
                    process.stdin.write_eof()
                except (BrokenPipeError, ConnectionError):
                    pass  # it ended without reading: its exit says why

            stdout, stderr, _ = await asyncio.gather(
                read(process.stdout), read(process.stderr), write()
            )
            await process.wait_closed()
            signal = process.exit_signal
        return Finished(
            status=None if signal else process.exit_status,
            signal=signal[0] if signal else None,
            stdout=stdout.decode(errors="replace"),
            stderr=stderr.decode(errors="replace"),
        )

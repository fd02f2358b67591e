"""A board over SSH, made of real parts: OpenSSH's server, or asyncssh's to break on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from devices.connection import Limits
from devices.profiles import Profile
from devices.ssh import SshDevice

asyncssh = pytest.importorskip("asyncssh", reason="asyncssh is not installed")

LIMITS = Limits(connect_s=10, login_s=20, command_s=60, stall_s=2, keepalive_s=1)
"""Short where something is meant to hang."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class User:
    """Somebody with a home folder and a key, whose ssh knows the host `board`."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ssh = home / ".ssh"
        self.ssh.mkdir(parents=True)
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self.key.write_private_key(self.ssh / "id_test")
        (self.ssh / "id_test").chmod(0o600)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def configure(self, port: int, *, user: str | None = None) -> None:
        (self.ssh / "config").write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {port}\n"
            f"  User {user or os.environ.get('USER') or 'root'}\n"
            f"  IdentityFile {self.ssh / 'id_test'}\n"
        )

    def trust(self, port: int, host_key: Any) -> None:
        public = host_key.export_public_key().decode()
        (self.ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")


class OpenSsh:
    """A real sshd on loopback. What logs in finds `python3` as the board has it, and no more."""

    def __init__(self, folder: Path, user: User, python: list[str]) -> None:
        folder.mkdir()
        self.home, self.user = folder / "home", user
        self.port = free_port()
        self.host_key = asyncssh.generate_private_key("ssh-ed25519")
        self.programs = folder / "bin"
        for made in (self.home, self.programs):
            made.mkdir()
        self.program("python3", f'exec {shlex.join(python)} "$@"')
        enter = self.program(
            "enter",
            # A board's environment, not that of the machine the tests run on.
            f"cd {self.home}\nexec env -i HOME={self.home} PATH={self.programs}:/usr/bin:/bin"
            ' LANG=C sh -c "$SSH_ORIGINAL_COMMAND"',
        )
        self.host_key.write_private_key(folder / "host_key")
        (folder / "host_key").chmod(0o600)
        (folder / "authorized_keys").write_bytes(user.key.export_public_key())
        sftp = next(
            (
                p
                for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server")
                if Path(p).exists()
            ),
            "internal-sftp",
        )
        self.config = folder / "sshd_config"
        self.config.write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder / 'host_key'}\n"
            f"AuthorizedKeysFile {folder / 'authorized_keys'}\nPidFile {folder / 'pid'}\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\n"
            f"PermitRootLogin yes\nSubsystem sftp {sftp}\nForceCommand {enter}\nLogLevel ERROR\n"
        )
        user.configure(self.port)
        user.trust(self.port, self.host_key)
        self.process: subprocess.Popen[bytes] | None = None

    def program(self, name: str, script: str) -> Path:
        """Put a program on the board's PATH."""
        return write_program(self.programs / name, script)

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sshd(), "-D", "-e", "-f", str(self.config)], stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"sshd does not run: {self.process.communicate()[1]!r}")

    def stop(self) -> None:
        """Pull the plug: the server and everything it started, at once."""
        if self.process is None:
            return
        self.cut()
        self.process.kill()
        self.cut()
        self.process.communicate()
        self.process = None

    def cut(self) -> None:
        """Kill every connection and what runs in it; the server goes on listening."""
        assert self.process is not None
        for pid in reversed(descendants(self.process.pid)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    @property
    def root(self) -> Path:
        return self.home / ".cache/uap-edge-harness"

    def set_up(self) -> None:
        """As `bootstrap` leaves a board whose own python3 has onnxruntime."""
        facts = {"kind": "system", "folder": None, "onnxruntime": "any", "numpy": "any"}
        self.root.mkdir(parents=True)
        (self.root / "environment.json").write_text(json.dumps(facts))

    def left_over(self) -> list[Path]:
        """What is only half there."""
        return sorted(self.root.rglob("*.part")) if self.root.exists() else []


def sshd() -> str:
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip("no sshd: scripts/install-test-tools.sh installs it")
    if os.getuid() == 0:
        try:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd run by root refuses to start without
        except OSError as error:
            pytest.skip(f"no sshd: cannot make /run/sshd: {error}")
    return found


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, parents first."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (children := parents.get(todo.pop(0), []))
        found += children
    return found


def write_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def host_python() -> list[str]:
    """This machine's own Python, with numpy and onnxruntime: the quick board."""
    return [sys.executable]


def device(profile: Profile | None = None, **options: Any) -> SshDevice:
    """The device behind the host `board` of the user's ssh configuration."""
    options.setdefault("limits", LIMITS)
    options.setdefault("notice", lambda _line: None)
    return SshDevice(profile or board_profile(), **options)


def board_profile(**changes: Any) -> Profile:
    return Profile(**{"name": "board", "title": "a test board", "host": "board", **changes})


async def run_there(
    process: Any, home: Path, *, send: Callable[[bytes], bool] | None = None
) -> None:
    """Run the command a client asked an asyncssh server for.

    Args:
        process: of the server.
        home: where it runs.
        send: passes on what it prints, and says whether to go on; None passes all on.
    """
    programs = home.with_name(f"{home.name}.bin")
    if not programs.exists():  # its python3 is the one the tests run on, wherever that is
        programs.mkdir()
        write_program(programs / "python3", f'exec {shlex.join(host_python())} "$@"')
    child = await asyncio.create_subprocess_exec(
        *("sh", "-c", process.command or "true"),
        cwd=home,
        env={"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    passing = asyncio.ensure_future(_pass_on(process.stdin, child.stdin))
    try:
        while chunk := await child.stdout.read(1 << 16 if send is None else 10):
            process.stdout.write(chunk)
            if send is not None and not send(chunk):
                break
        else:
            process.exit(await child.wait())
    finally:
        passing.cancel()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child._transport.close()  # asyncio closes it only when collected, too late for the loop
        await child.wait()


async def _pass_on(source: Any, to: Any) -> None:
    with suppress(Exception):
        while chunk := await source.read(1 << 16):
            to.write(chunk)
            await to.drain()
    to.close()


# --- asyncssh's server, to break on purpose ------------------------------------------------------


@contextmanager
def asyncssh_server(
    user: User, home: Path, *, sftp: Any = None, process: Callable[..., Any] | None = None
) -> Iterator[int]:
    """A server that does what its parts are told; the port it listens on.

    Args:
        user: who may log in; trusts it.
        home: what the board's files are.
        sftp: a class of SFTPServer; None for asyncssh's own.
        process: handles a command instead of running it.
    """
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    keys = asyncssh.import_authorized_keys(user.key.export_public_key().decode())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def run(process: Any) -> None:
        await run_there(process, home)

    async def listen() -> Any:
        return await asyncssh.listen(
            *("127.0.0.1", 0),
            server_host_keys=[host_key],
            authorized_client_keys=keys,
            sftp_factory=sftp or asyncssh.SFTPServer,
            process_factory=process or run,
            encoding=None,
        )

    async def end(server: Any) -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    port = server.sockets[0].getsockname()[1]
    user.configure(port)
    user.trust(port, host_key)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(end(server), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

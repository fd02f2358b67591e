"""What went wrong with SSH, in one line that says what to do.

Enters: exceptions of asyncssh and of the system, the user's known_hosts. Leaves: the harness's own
errors.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.plain import plain
from devices.transport import Refusal
from harness.records import DeviceUnreachable, HarnessError, UsageError

if TYPE_CHECKING:
    import asyncssh

DEFAULT_FILES = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
SSH_PORT = 22


def known_hosts(files: Sequence[Any] | None) -> bytes:
    """The content of the known_hosts files: those configured, else the usual ones.

    "None" (`UserKnownHostsFile none`) means that nothing is known; it never means that anybody
    is trusted.
    """
    names = DEFAULT_FILES if files is not None and not files else files or ()
    content = []
    for name in names:
        try:
            content.append(Path(str(name)).expanduser().read_bytes())
        except OSError:
            continue  # ssh takes an absent file for an empty one, too
    return b"\n".join(content) + b"\n"


async def host_key_refused(
    error: Exception,
    *,
    destination: str,
    host: str,
    options: asyncssh.SSHClientConnectionOptions,
    known: bytes,
) -> HarnessError | None:
    """What to say of a failed handshake if the board's key is why it failed; else None.

    A board that has no key of the kind we know just hangs up: it is asked which key it has.
    """
    import asyncssh

    on_port = other_port(options.port)
    name = options.host_key_alias or options.host
    trusted = asyncssh.match_known_hosts(known, name, "", on_port)[0]
    refused = isinstance(error, asyncssh.HostKeyNotVerifiable)
    if not refused and trusted and not isinstance(error, asyncssh.PermissionDenied):
        try:
            shown = await asyncssh.get_server_host_key(host, options.port)
        except (OSError, asyncssh.Error):
            return None
        refused = shown is not None and shown not in trusted
    if not refused:
        return None
    where = f"[{name}]:{on_port}" if on_port else name
    command = _command("ssh", destination, on_port)
    if trusted:
        return Refusal(
            f"{destination} shows another host key than known_hosts has: somebody may be in"
            f" between; if the board was installed anew, run: ssh-keygen -R {shlex.quote(where)}"
            f" && {command}"
        )
    return Refusal(
        f"the host key of {destination} is not known yet: to see and accept it, connect once:"
        f" {command}"
    )


def other_port(port: int | None) -> int | None:
    """The port, if commands must name it."""
    return None if port == SSH_PORT else port


def _command(program: str, destination: str, port: int | None) -> str:
    return shlex.join([program, *(["-p", str(port)] if port else []), destination])


def explained(error: Exception, destination: str, *, port: int | None = None) -> HarnessError:
    """`error`, which is of asyncssh or of the system, as the user should read it.

    Args:
        error: what was raised.
        destination: as the user gave it.
        port: what commands must name, if anything.
    """
    import asyncssh

    reason = plain(error) or type(error).__name__
    user, _, host = destination.rpartition("@")
    match error:
        case asyncssh.PermissionDenied():
            return DeviceUnreachable(
                f"{host} refused the login{f' of {user}' if user else ''}: check the user name, and"
                f" that `{_command('ssh', destination, port)}` works without a password"
                f" ({_command('ssh-copy-id', destination, port)})"
            )
        case asyncssh.SFTPConnectionLost() | asyncssh.SFTPNoConnection():
            return DeviceUnreachable(f"{destination}: the connection was lost: {reason}")
        case asyncssh.SFTPError():
            return HarnessError(f"{destination}: file transfer failed: {reason}")
        case asyncssh.ChannelOpenError() | asyncssh.DisconnectError():
            return DeviceUnreachable(f"{destination}: the connection was lost: {reason}")
        case asyncssh.KeyEncryptionError():
            return UsageError(f"a key for {destination} has a passphrase: add it to ssh-agent")
        case socket.gaierror():
            return DeviceUnreachable(
                f"there is no host {host}: check its name (harness devices list) and the network"
            )
        case OSError():  # also a connection that is reset
            return DeviceUnreachable(
                f"cannot reach {destination}: {_system_reason(error)}: is it on, in this"
                " network, with SSH enabled?"
            )
        case ValueError():  # asyncssh's own for configuration and key files
            return UsageError(f"your ssh configuration for {destination}: {reason}")
    return DeviceUnreachable(f"{destination}: {type(error).__name__}: {reason}")


def _system_reason(error: OSError) -> str:
    """As the system calls it: asyncio has a text of its own, of several where a name has them."""
    numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    if not numbers:
        return plain(error.strerror or error) or type(error).__name__
    return ", ".join(os.strerror(number).lower() for number in sorted(numbers))

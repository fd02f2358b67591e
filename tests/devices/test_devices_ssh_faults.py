"""A server that breaks on purpose: drops, stalls, half-written files, a full disk."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("asyncssh")  # before ssh_boards, which needs it

import asyncssh
from ssh_boards import LIMITS, User, asyncssh_server, board_profile, device, run_there

from devices.session import DeviceSession
from devices.ssh import SshDevice
from harness.records import DeviceUnreachable, HarnessError

BOOT = b'{"kind": "system", "folder": null, "onnxruntime": "any", "numpy": "any"}'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The harness's folder on a board that is set up."""
    root = tmp_path / "board" / "root"
    root.mkdir(parents=True)
    (root / "environment.json").write_bytes(BOOT)
    return root


def there(root: Path) -> SshDevice:
    return device(board_profile(remote_root=str(root)))


def stored(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "files").iterdir())


def check(session: DeviceSession, model, images) -> None:
    session.load(model.path, threads=1)
    session.set_images(images)
    np.testing.assert_array_equal(session.predict(None), model.classes(images))


def test_a_connection_that_drops_in_the_middle_of_a_reply(
    ssh_user: User, root: Path, model, images
) -> None:
    """After every twenty, then forty, ... bytes of the runner's answers, until all got through."""
    limits = iter([20, 40, 400, 480])
    dropped: list[int] = []

    async def run(process: Any) -> None:
        limit = next(limits, None) if "--lock" in process.command else None
        sent = 0

        def send(chunk: bytes) -> bool:
            nonlocal sent
            sent += len(chunk)
            if limit is not None and sent >= limit:
                dropped.append(sent)
                process.channel.get_connection().abort()
                return False
            return True

        await run_there(process, root, send=send)

    with asyncssh_server(ssh_user, root.parent, process=run), there(root).open() as session:
        check(session, model, images)
    assert len(dropped) == 4


class Fragile(asyncssh.SFTPServer):
    """Fails at the `at`-th write of a session of its kind, as `fail` does."""

    at = 0
    writes = 0

    def write(self, file_obj: Any, offset: int, data: bytes) -> Any:
        kind = type(self)
        kind.writes += 1
        if kind.writes == kind.at:
            return self.fail(file_obj, offset, data)
        return super().write(file_obj, offset, data)

    def fail(self, file_obj: Any, offset: int, data: bytes) -> Any:
        raise NotImplementedError


def fragile(fail: Any, *, at: int = 2) -> type[Fragile]:
    """Its first write is the runner's, its second the model's."""
    return type("Broken", (Fragile,), {"fail": fail, "at": at})


def test_a_connection_that_drops_in_the_middle_of_a_file(ssh_user, root, model, images) -> None:
    def fail(self: Any, file_obj: Any, offset: int, data: bytes) -> int:
        asyncssh.SFTPServer.write(self, file_obj, offset, data[:100])
        file_obj.flush()
        self.channel.get_connection().abort()
        return 0

    with (
        asyncssh_server(ssh_user, root.parent, sftp=fragile(fail)),
        there(root).open() as session,
    ):
        check(session, model, images)
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in stored(root))


def test_a_transfer_that_stalls_is_taken_up_again(ssh_user, root, model, images) -> None:
    stalled: list[Any] = []

    def fail(self: Any, file_obj: Any, offset: int, data: bytes) -> Any:
        stalled.append(file_obj)
        return asyncio.sleep(3600)

    with (
        asyncssh_server(ssh_user, root.parent, sftp=fragile(fail)),
        there(root).open() as session,
    ):
        check(session, model, images)
    (file,) = stalled
    file.close()
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in stored(root))


def test_a_file_that_arrives_short_is_one_line(ssh_user, root, model) -> None:
    class Short(asyncssh.SFTPServer):
        def write(self, file_obj: Any, offset: int, data: bytes) -> int:
            kept = data[:-1] if len(data) < 8000 else data  # the runner is longer
            super().write(file_obj, offset, kept)
            return len(data)

    def use() -> None:
        with there(root).open() as session:
            session.load(model.path, threads=1)

    size = model.path.stat().st_size
    message = rf"tiny\.onnx arrived truncated \({size - 1} of {size} bytes\), twice: check"
    with (
        asyncssh_server(ssh_user, root.parent, sftp=Short),
        pytest.raises(HarnessError, match=message),
    ):
        use()
    assert len(stored(root)) == 1  # the runner


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fills_up_is_one_line(ssh_user, root, model, code: int) -> None:
    def fail(self: Any, file_obj: Any, offset: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    def use() -> None:
        with there(root).open() as session:
            session.load(model.path, threads=1)

    with (
        asyncssh_server(ssh_user, root.parent, sftp=fragile(fail)),
        pytest.raises(HarnessError, match=rf"board: cannot write to {root}: .*disk") as caught,
    ):
        use()
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, DeviceUnreachable)
    assert len(stored(root)) == 1  # the runner


def test_a_disk_without_room_is_noticed_before_sending(ssh_user, root) -> None:
    class Full(asyncssh.SFTPServer):
        def statvfs(self, path: bytes) -> Any:
            values = list(os.statvfs(root))
            values[4] = 1000  # bavail
            return os.statvfs_result(values)

    def use() -> None:
        with there(root).open():
            pass

    with (
        asyncssh_server(ssh_user, root.parent, sftp=Full),
        pytest.raises(HarnessError, match=r"its disk is too full for .* MB are free in"),
    ):
        use()
    assert stored(root) == []


def test_a_command_that_never_ends_is_given_up(ssh_user, root) -> None:
    async def hang(process: Any) -> None:
        await asyncio.sleep(3600)

    limits = replace(LIMITS, command_s=0.5)

    def use() -> None:
        with device(board_profile(remote_root=str(root)), limits=limits).open():
            pass

    with (
        asyncssh_server(ssh_user, root.parent, process=hang),
        pytest.raises(DeviceUnreachable, match=r"more than 5 s to run sha256sum"),
    ):
        use()


def test_a_board_that_never_stops_talking_is_cut_off(ssh_user, root, monkeypatch) -> None:
    monkeypatch.setattr("devices.ssh.MAX_LINE_BYTES", 1 << 20)

    async def babble(process: Any) -> None:
        if "--lock" not in process.command:
            await run_there(process, root)
            return
        while True:
            process.stdout.write(b"x" * 65536)
            await process.stdout.drain()

    def use() -> None:
        with there(root).open():
            pass

    with (
        asyncssh_server(ssh_user, root.parent, process=babble),
        pytest.raises(DeviceUnreachable, match="a line of more than 1048576 bytes"),
    ):
        use()

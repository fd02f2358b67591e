"""A board's folder: files stored there whole or not at all, whatever happens on the way.

Enters: files of the workstation, named by their sha256. Leaves: the same on the board. The board
is not trusted: it may be full, damage what it stores, or lie about it.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from pathlib import Path, PurePosixPath

from devices.connection import MAX_OUTPUT_BYTES, Connection, Finished, Limits, asyncssh_module
from devices.plain import plain
from devices.profiles import Profile
from harness.records import DeviceUnreachable, HarnessError, UsageError

SPARE_BYTES = 8 << 20
"""Free disk that a transfer must leave: the journal and the system need some."""
HASH_PROGRAM = (
    "import hashlib,sys;h=hashlib.sha256();f=open(sys.argv[1],'rb')\n"
    "for c in iter(lambda:f.read(1<<20),b''):h.update(c)\n"
    "print(h.hexdigest())"
)


class Board:
    """A board, connected or not. `root` is the harness's folder there, absolute when connected."""

    def __init__(
        self, destination: str, *, port: int | None, root: str, limits: Limits | None = None
    ) -> None:
        self.link = Connection(destination, port=port, limits=limits)
        self.destination = destination
        self.root = root
        self._wanted_root = root
        # Every session's own, so that two that send the same file are not in each other's way.
        self._token = secrets.token_hex(8)
        self._there: set[str] = set()

    def connect(self) -> None:
        """Connect, and find the harness's folder, made if need be.

        Raises:
            DeviceUnreachable: as `Connection.connect`.
            HarnessError: the folder cannot be made.
        """
        self._there.clear()
        self.link.connect()
        try:
            self.link.do(self._find_root(), self.link.limits.command_s, "to open its files")
        except BaseException:
            self.link.close()
            raise

    def close(self) -> None:
        """End the connection at once; nothing of it stays. Calling it again does nothing."""
        self.link.close()

    def run(
        self, command: list[str], *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> Finished:
        """Run a command there to its end. Raises as `Connection.run` does."""
        return self.link.run(command, stdin=stdin, timeout_s=timeout_s)

    async def _find_root(self) -> None:
        sftp = self.link.sftp
        home = str(await sftp.realpath("."))
        self.root = str(PurePosixPath(home) / self._wanted_root)
        for folder in (self.root, self.path("files")):
            try:
                await sftp.makedirs(folder, exist_ok=True)
            except (OSError, asyncssh_module().SFTPError) as error:
                raise HarnessError(
                    f"{self.destination}: cannot make the folder {folder} ({error}): choose"
                    " another remote_root, or free some disk"
                ) from None

    def path(self, *parts: str) -> str:
        """A path in the harness's folder on the board."""
        return "/".join([self.root, *parts])

    def put(self, local: Path, *, sha256: str) -> str:
        """Store a file as files/SHA256, unless it is there, and return its path.

        It is sent to a temporary name, hashed on the board, and renamed. What is there already is
        hashed on its first use in a connection: a power cut or a worn card may have damaged it
        since. Models and arrays are hashed once more by the runner that reads them.

        Raises:
            HarnessError: the disk is full, or the file arrives damaged twice.
            DeviceUnreachable: the connection was lost; what was sent is removed by the next one.
        """
        if sha256 not in self._there:
            final = self.path("files", sha256)
            size = local.stat().st_size
            if not self._is_whole(final, sha256=sha256, size=size):
                self._store(local, final, sha256=sha256, size=size)
            self._there.add(sha256)
        return self.path("files", sha256)

    def discard(self, sha256: str) -> None:
        """Remove a stored file."""
        self._there.discard(sha256)
        self.link.do(
            self._remove(self.path("files", sha256)), self.link.limits.command_s, "to remove a file"
        )

    def read(self, path: str) -> bytes | None:
        """A small file's content; None if there is none."""
        return self.link.do(self._read(path), self.link.limits.command_s, "to read a file")

    def _is_whole(self, final: str, *, sha256: str, size: int) -> bool:
        """Whether the file is there and undamaged; a damaged one is removed."""
        limit_s = self.link.limits.command_s
        there = self.link.do(self._size(final), limit_s, "to look for a file")
        if there is None:
            return False
        try:
            whole = there == size and self._hash(final) == sha256
        except DeviceUnreachable:
            raise
        except HarnessError:  # a worn card cannot even read it
            whole = False
        if whole:
            self.link.do(self._touch(final), limit_s, "to date a file")
            return True
        self.discard(sha256)
        return False

    def _store(self, local: Path, final: str, *, sha256: str, size: int) -> None:
        part = f"{final}.{self._token}.part"
        limits, problem = self.link.limits, ""
        self.link.do(self._check_room(size), limits.command_s, "to tell its free disk")
        for _attempt in range(2):
            try:
                # The transfer has a limit of its own, by what it moves.
                self.link.do(self._send(local, part), None, "to take a file")
                arrived = self.link.do(self._size(part), limits.command_s, "to look for a file")
                if arrived != size:
                    problem = f"truncated ({arrived} of {size} bytes)"
                    continue
                if self._hash(part) != sha256:
                    problem = "damaged (another sha256)"
                    continue
                self.link.do(self._sync(part), None, "to write a file to its disk")
                self.link.do(
                    self.link.sftp.posix_rename(part, final), limits.command_s, "to rename a file"
                )
                return
            finally:
                # Renamed, refused or full: nothing half-done stays. A lost connection leaves it
                # to the next runner's sweep.
                self._try_to_remove(part)
        raise HarnessError(
            f"{self.destination}: {local.name} arrived {problem}, twice: check the board's disk and"
            " the network"
        )

    async def _send(self, local: Path, part: str) -> None:
        asyncssh = asyncssh_module()
        moved = [0]

        def progress(_from: bytes, _to: bytes, copied: int, _total: int) -> None:
            moved[0] = copied

        sending = asyncio.ensure_future(
            self.link.sftp.put(str(local), part, progress_handler=progress)
        )
        try:
            seen = -1
            while not sending.done():
                if moved[0] == seen:
                    raise DeviceUnreachable(
                        f"{self.destination} took nothing of {local.name} for"
                        f" {self.link.limits.stall_s:g} s"
                    )
                seen = moved[0]
                await asyncio.wait({sending}, timeout=self.link.limits.stall_s)
            await sending
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
            raise
        except asyncssh.SFTPError as error:
            reason = plain(error.reason or "failure")
            raise HarnessError(
                f"{self.destination}: cannot write to {self.root}: {reason}"
                f"{await self._room_hint()}"
            ) from None
        finally:
            sending.cancel()

    async def _check_room(self, size: int) -> None:
        free = await self._free_bytes()
        if free is not None and free < size + SPARE_BYTES:
            raise HarnessError(
                f"{self.destination}: its disk is too full for {size / 1e6:.1f} MB: only"
                f" {free / 1e6:.1f} MB are free in {self.root}"
            )

    async def _room_hint(self) -> str:
        free = await self._free_bytes()
        if free is None:
            return " (is its disk full?)"
        return f" (is its disk full? {free / 1e6:.1f} MB are free)"

    async def _free_bytes(self) -> int | None:
        try:
            disk = await self.link.sftp.statvfs(self.root)
        except asyncssh_module().SFTPError:  # an extension not every server has
            return None
        return int(disk.bavail) * int(disk.frsize)

    async def _size(self, path: str) -> int | None:
        try:
            return (await self.link.sftp.stat(path)).size
        except asyncssh_module().SFTPNoSuchFile:
            return None

    async def _remove(self, path: str) -> None:
        try:
            await self.link.sftp.remove(path)
        except asyncssh_module().SFTPNoSuchFile:
            pass

    async def _sync(self, path: str) -> None:
        """Have it on the disk before it gets its name, where the server can do that."""
        with suppress(asyncssh_module().SFTPOpUnsupported):
            async with self.link.sftp.open(path, "rb") as file:
                await file.fsync()

    async def _touch(self, path: str) -> None:
        """Date it now: what nobody has used for long is swept (`runner.sweep`)."""
        with suppress(asyncssh_module().SFTPError):
            await self.link.sftp.utime(path)

    async def _read(self, path: str) -> bytes | None:
        try:
            async with self.link.sftp.open(path, "rb") as file:
                content: bytes = await file.read(MAX_OUTPUT_BYTES)
                return content
        except asyncssh_module().SFTPNoSuchFile:
            return None

    def _try_to_remove(self, path: str) -> None:
        with suppress(HarnessError):  # what went wrong before is what the user should read
            self.link.do(
                self._remove(path), min(self.link.limits.command_s, 5.0), "to remove a file"
            )

    def _hash(self, path: str) -> str:
        """What the board says the file's sha256 is."""
        for command in (["sha256sum", "--", path], ["python3", "-c", HASH_PROGRAM, path]):
            done = self.link.run(command, timeout_s=10 * self.link.limits.command_s)
            if done.status == 0:
                return (done.stdout.split() or [""])[0].lstrip("\\")
        raise HarnessError(f"{self.destination} cannot hash a file ({done.last_words})")


def board_of(profile: Profile, *, limits: Limits | None = None) -> Board:
    """The board of a profile, not connected yet.

    Raises:
        UsageError: the profile has no host.
    """
    if profile.host is None:
        raise UsageError(
            f"{profile.name} has no host: harness devices add {profile.name} --host USER@BOARD"
        )
    return Board(profile.host, port=profile.port, root=profile.remote_root, limits=limits)

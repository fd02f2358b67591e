"""What a kind of device must bring: a way to carry lines and files to one runner."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from harness.records import DeviceUnreachable


class Refusal(DeviceUnreachable):
    """Trying again would not help: a changed host key, another's lock, a runner that cannot run."""


class Transport(Protocol):
    """How lines and files reach one runner. Failures to reach it raise `DeviceUnreachable`.

    After `close` it may be started again: that is how a lost connection is taken up.
    """

    def start(self) -> None:
        """Start the runner."""

    def send(self, line: str) -> None:
        """Deliver one request; `line` has no newline."""

    def receive(self, *, timeout_s: float) -> str:
        """The next line from the runner."""
        ...

    def put(self, local: Path, *, sha256: str) -> str:
        """Make the file available on the device; return its path there. `sha256` is its name."""
        ...

    def discard(self, sha256: str) -> bool:
        """Remove what `put` left there, because it is damaged; False if `put` copies nothing."""
        ...

    def close(self, *, kill: bool = False) -> None:
        """End the runner: let it finish, or at once. Calling it again does nothing."""

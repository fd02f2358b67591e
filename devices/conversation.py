"""Questions and answers over a transport, and taking a lost connection up again.

Enters: a `Transport`, requests. Leaves: replies that were checked to be replies, or one clear
error. What was loaded on the device is restored by the session (`devices.session`) that owns this.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from devices.plain import plain
from devices.transport import Refusal, Transport
from harness.records import DeviceUnreachable, HarnessError, MeasurementInvalid, UsageError

REPLY_TIMEOUT_S = 600.0
"""One batch, or one model to load, on the slowest device there is (an emulated one)."""
RECONNECT_S = 60.0
"""How long a lost connection is tried again: a board's reboot takes most of it."""
RETRY_FIRST_S, RETRY_MOST_S = 0.25, 8.0
"""Waits between two attempts double from the one to the other."""
MAX_LOSSES = 5
"""Connections one request may cost: a request that kills its runner must end some time."""

GO_ON = "the same command goes on when the device is back"

Reply = dict[str, Any]
T = TypeVar("T")


class Damaged(HarnessError):
    """A file on the device is not the one that was sent."""


ERRORS: dict[str, type[HarnessError]] = {
    "usage": UsageError,
    "output": MeasurementInvalid,
    "busy": Refusal,
    "checksum": Damaged,
}
"""What a runner's refusal means to the user; any other kind is a plain failure."""


class Conversation:
    """Requests to one runner, which may be a new one after every lost connection."""

    def __init__(
        self,
        transport: Transport,
        *,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        reconnect_s: float = 0.0,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self._transport = transport
        self.reply_timeout_s = reply_timeout_s
        self._reconnect_s = reconnect_s
        self._notice = notice or (lambda _line: None)
        self._ids = itertools.count(1)

    def ask(
        self, operation: str, *, timeout_s: float | None = None, about: str = "", **values: Any
    ) -> Reply:
        """One question, its answer; `about` names what the user should look at on failure."""
        identity = next(self._ids)
        self._transport.send(json.dumps({"id": identity, "op": operation, **values}))
        limit_s = self.reply_timeout_s if timeout_s is None else timeout_s
        reply = parse_reply(self._transport.receive(timeout_s=limit_s))
        if reply.get("id") != identity:
            raise DeviceUnreachable(f"the runner answered {reply.get('id')}, not {identity}")
        if reply.get("ok") is True:
            return reply
        message = plain(reply.get("error", "no reason given"))
        error = ERRORS.get(str(reply.get("kind")), HarnessError)
        raise error(f"{about}: {message}" if about else message)

    def ask_about(self, local: Path, sha256: str, ask: Callable[[str], Reply]) -> Reply:
        """Ask about a file, by its path on the device, where it is put first.

        A file that is damaged there is sent once more. What is still damaged does not stay.

        Raises:
            HarnessError: the device does not keep the file as it was sent.
        """
        try:
            return ask(self._transport.put(local, sha256=sha256))
        except Damaged:
            if not self._transport.discard(sha256):
                raise
        try:
            return ask(self._transport.put(local, sha256=sha256))
        except Damaged as damaged:
            self._transport.discard(sha256)
            raise HarnessError(
                f"the device damages what it stores, twice in a row ({damaged}): check its disk"
            ) from None

    def start(self, *, patient: bool) -> None:
        """Connect; if `patient` a first failure counts as a lost connection.

        Raises:
            DeviceUnreachable: no connection, or none within the budget.
        """
        try:
            self._transport.start()
        except Refusal:
            raise
        except DeviceUnreachable as lost:
            if not patient or self._reconnect_s <= 0:
                raise
            self._reconnect(lost, lambda: None)

    def surviving(self, step: Callable[[], T], *, restore: Callable[[], None]) -> T:
        """The result of `step`, which is done again after a lost connection.

        Args:
            step: what to do; it may be cut off anywhere and must be repeatable.
            restore: brings a fresh runner to the state that `step` needs.

        Raises:
            DeviceUnreachable: no connection within the budget, or too many lost.
        """
        losses = 0
        while True:
            try:
                return step()
            except Refusal:
                raise
            except DeviceUnreachable as lost:
                losses += 1
                if self._reconnect_s <= 0:
                    raise
                if losses > MAX_LOSSES:
                    raise DeviceUnreachable(
                        f"the connection was lost {losses} times at the same request: {lost};"
                        f" {GO_ON}"
                    ) from None
                self._reconnect(lost, restore)

    def _reconnect(self, lost: DeviceUnreachable, restore: Callable[[], None]) -> None:
        self._notice(f"{lost}; connecting again for up to {self._reconnect_s:g} s")
        deadline_s = time.monotonic() + self._reconnect_s
        wait_s = RETRY_FIRST_S
        while True:
            self._transport.close(kill=True)
            try:
                self._transport.start()
                restore()
            except Refusal:
                raise
            except DeviceUnreachable as error:
                if time.monotonic() + wait_s > deadline_s:
                    raise DeviceUnreachable(
                        f"{lost}; trying again for {self._reconnect_s:g} s did not help: {error};"
                        f" {GO_ON}"
                    ) from None
            else:
                self._notice("connected again: it goes on where it was")
                return
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MOST_S)


def parse_reply(line: str) -> Reply:
    """A line of the runner's as a reply."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise DeviceUnreachable(f"the runner sent what is not its protocol: {line[:200]!r}")
    return reply

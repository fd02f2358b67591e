"""The device `local`: this machine, the runner in a child process."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from devices.conversation import REPLY_TIMEOUT_S
from devices.process import ProcessTransport
from devices.session import DeviceSession, open_session

RUNNER = Path(__file__).with_name("runner.py")


@dataclass(frozen=True)
class LocalDevice:
    """This machine. A device like any other: same runner, same protocol, real times."""

    name: str = "local"
    emulated: bool = False
    reply_timeout_s: float = REPLY_TIMEOUT_S
    default_budget_s: float | None = None

    def open(self) -> AbstractContextManager[DeviceSession]:
        """Start a fresh runner; it ends with the context."""
        # -E and -P: neither PYTHONPATH nor this folder can change what the runner imports. Not
        # -I, which would also hide an onnxruntime installed with `pip install --user`.
        transport = ProcessTransport([sys.executable, "-E", "-P", str(RUNNER)])
        return open_session(transport, reply_timeout_s=self.reply_timeout_s)

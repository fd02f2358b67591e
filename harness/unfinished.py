"""Unfinished work, kept as often as that is worth its time: a kill then costs seconds.

Enters: a file, what the work is. Leaves: its state, to go on from there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.artefacts import read_partial, write_partial

SAVE_INTERVAL_SECONDS = 5.0
"""At most this much work is lost to a kill, plus the step in progress, ..."""
CHEAP_SAVE_SECONDS = 0.25
"""... or so many times more as a save takes longer than this: large states are saved less often."""


class Keeper:
    """Keeps the state of one piece of work in its `partial` file."""

    def __init__(self, partial: Path, key: str) -> None:
        self._partial, self._key = partial, key
        self._last_save = time.monotonic()
        self._cost = 0.0

    def kept(self) -> dict[str, Any] | None:
        """The state kept by whoever was killed; None where there is none of this work."""
        return read_partial(self._partial, key=self._key)

    def keep(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save the state, unless it was a moment ago; it is asked for when it is to be saved."""
        began = time.monotonic()
        interval = SAVE_INTERVAL_SECONDS * max(1.0, self._cost / CHEAP_SAVE_SECONDS)
        if began - self._last_save <= interval:
            return
        self._save(state())

    @contextlib.contextmanager
    def before_the_end(self, state: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Save the state if what is done inside, telling of a step, ends the work.

        So a time limit costs nothing, however short it is.
        """
        try:
            yield
        except Exception:
            self._save(state())
            raise

    def _save(self, state: dict[str, Any]) -> None:
        began = time.monotonic()
        write_partial(self._partial, key=self._key, state=state)
        self._last_save = time.monotonic()
        self._cost = self._last_save - began

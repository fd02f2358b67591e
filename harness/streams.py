"""Standard output is data: what others print while they work goes to standard error.

Python's `print` in a user's model, and what PyTorch's own C++ writes past it, would end up in the
middle of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_spared() -> Iterator[None]:
    """Lead both Python's standard output and the process's file descriptor 1 to standard error."""
    before = sys.stdout
    _flush(before)
    try:
        kept = os.dup(1)
    except OSError:  # closed: there is nothing to spare
        kept = None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if kept is not None:
                with contextlib.suppress(OSError):
                    os.dup2(2, 1)
            yield
        finally:
            _flush(before)
            if kept is not None:
                os.dup2(kept, 1)
                os.close(kept)


def _flush(stdout: object) -> None:
    """What waits in buffers, Python's and C's, goes where the descriptor leads now."""
    for stream in (stdout, sys.__stdout__):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
            stream.flush()  # type: ignore[attr-defined]
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library by that name
        ctypes.CDLL(None).fflush(None)

"""What went wrong with the results store in one line: mostly the store itself is healthy.

Enters: errors of SQLite. Leaves: the harness's own, which say what to do.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from harness.records import HarnessError

RESTORE = "put a copy of it back, or move it away and run again"


def cannot_write(error: sqlite3.Error, path: Path) -> HarnessError | None:
    """What to say where the disk, its rights or another program are why, or the file is damaged."""
    match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF:  # the primary code
        case sqlite3.SQLITE_FULL:
            return HarnessError(f"no space left where {path} is: free some and run again")
        case sqlite3.SQLITE_IOERR:  # as a full disk says it to the write-ahead log
            return HarnessError(
                f"no space left where {path} is, or its disk fails ({error}): free some and run"
                " again"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return HarnessError(f"another program is writing {path}: wait for it and run again")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return HarnessError(f"cannot write {path} ({error}): check permissions and space")
        case sqlite3.SQLITE_CORRUPT:
            return HarnessError(f"{path} is damaged ({error}): {RESTORE}")
    return None

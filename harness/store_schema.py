"""The tables of the results store: made, and brought along from older versions.

Enters: a connection to a new file or to a store of any age. Leaves: the tables of this version.
"""

from __future__ import annotations

import sqlite3
import time

SCHEMA_VERSION = 3
BUSY_SECONDS = 30.0
"""How long another writer is waited for."""

_INSTRUCTION_COUNT = """
CREATE TABLE instruction_count (
    model_sha256 TEXT NOT NULL REFERENCES model, device TEXT NOT NULL,
    runtime_version TEXT NOT NULL, instructions INTEGER NOT NULL, created_at TEXT NOT NULL,
    PRIMARY KEY (model_sha256, device, runtime_version))"""

_SCHEMA = f"""
CREATE TABLE evaluation_set (
    sha256 TEXT PRIMARY KEY, dataset TEXT NOT NULL, classes TEXT NOT NULL, labels BLOB NOT NULL,
    image_shape TEXT NOT NULL, examples BLOB NOT NULL, note TEXT NOT NULL,
    registered INTEGER NOT NULL);
CREATE TABLE model (
    sha256 TEXT PRIMARY KEY, variant TEXT NOT NULL, method TEXT NOT NULL, dataset TEXT NOT NULL,
    preset TEXT NOT NULL, arch TEXT NOT NULL, width INTEGER, seed INTEGER,
    cost TEXT NOT NULL, manifest TEXT NOT NULL, registered INTEGER NOT NULL);
CREATE TABLE uap (
    sha256 TEXT PRIMARY KEY, source TEXT NOT NULL, attack TEXT NOT NULL, protocol TEXT NOT NULL,
    dataset TEXT NOT NULL, seed INTEGER NOT NULL, eps REAL NOT NULL, target INTEGER,
    shape TEXT NOT NULL, delta BLOB NOT NULL, meta TEXT NOT NULL, own INTEGER NOT NULL,
    registered INTEGER NOT NULL);
CREATE TABLE prediction_run (
    id INTEGER PRIMARY KEY, model_sha256 TEXT NOT NULL REFERENCES model,
    evaluation_sha256 TEXT NOT NULL REFERENCES evaluation_set,
    uap_sha256 TEXT REFERENCES uap,
    device TEXT NOT NULL, emulated INTEGER NOT NULL, runtime TEXT NOT NULL, machine TEXT NOT NULL,
    predictions BLOB NOT NULL, seconds REAL NOT NULL,
    created_at TEXT NOT NULL, git_commit TEXT, indices BLOB);
CREATE INDEX prediction_by_model ON prediction_run (model_sha256, device, runtime);
CREATE TABLE latency_run (
    id INTEGER PRIMARY KEY, model_sha256 TEXT NOT NULL REFERENCES model,
    device TEXT NOT NULL, emulated INTEGER NOT NULL, runtime TEXT NOT NULL, machine TEXT NOT NULL,
    mode TEXT NOT NULL, threads INTEGER NOT NULL, processes TEXT NOT NULL,
    created_at TEXT NOT NULL, git_commit TEXT);
{_INSTRUCTION_COUNT};
"""
_MIGRATIONS = {
    1: "ALTER TABLE prediction_run ADD COLUMN indices BLOB",
    2: _INSTRUCTION_COUNT,
}
"""Schema -> the statement that makes it the next one. Nothing stored is lost or rewritten."""


def bring_up_to_date(connection: sqlite3.Connection) -> int:
    """Make what a new or older store lacks, whoever else opens the same file meanwhile.

    Returns:
        The schema it was written with, 0 where it was new; a newer one is left as it is.

    Raises:
        sqlite3.Error: not a results store, or it cannot be written now.
    """
    version = schema_of(connection)
    if version == 0:
        _create(connection)
    elif version < SCHEMA_VERSION:
        _migrate(connection)
    if version <= SCHEMA_VERSION:
        _log_ahead(connection)
    return version


def schema_of(connection: sqlite3.Connection) -> int:
    """The version it was written with; 0 where it is new.

    Raises:
        sqlite3.Error: not a results store.
    """
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _create(connection: sqlite3.Connection) -> None:
    """Make the tables in one transaction."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0]:
            return
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise sqlite3.DatabaseError("it is another program's database")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Write-ahead logging: readers go on while a run is written."""
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # SQLite does not wait here for another that does the same.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring an older store to this schema in one transaction."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        while version < SCHEMA_VERSION:
            connection.execute(_MIGRATIONS[version])
            version += 1
            connection.execute(f"PRAGMA user_version = {version}")

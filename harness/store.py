"""The results store: one SQLite file (WAL) of raw observations. Metrics are derived elsewhere.

Enters: frozen records of `harness.records`. Leaves: the same records, read back.
This is the only module that opens the database. A run is written in one transaction, so that a
reader never sees half of one and a killed writer loses only the run it was in.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from harness.records import (
    EvaluationSet,
    HarnessError,
    LatencyRun,
    ModelRecord,
    PredictionRun,
    UapRecord,
)
from harness.store_errors import cannot_write
from harness.store_rows import (
    StoredLatency,
    StoredPrediction,
    evaluation_set_of,
    latency_of,
    model_of,
    pack_classes,
    pack_indices,
    prediction_of,
    uap_of,
)
from harness.store_schema import BUSY_SECONDS, SCHEMA_VERSION, bring_up_to_date, schema_of

ELSEWHERE = "and its folder cannot be written: copy the workspace to one that can, and use that"


class Store:
    """The results of one workspace. Use `open_store`; close it, or use it as a context manager."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path, *, git_commit: str | None = None
    ) -> None:
        self._db = connection
        self._path = path
        self._git_commit = git_commit

    def __enter__(self) -> Store:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.close()
        if isinstance(error, sqlite3.Error) and (said := cannot_write(error, self._path)):
            raise said from None

    def close(self) -> None:
        """Close the database file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._db:
                yield self._db
        except sqlite3.OperationalError as error:
            raise cannot_write(error, self._path) or error from None

    # --- writing -------------------------------------------------------------------------------

    def add_evaluation_set(self, record: EvaluationSet) -> None:
        """Register the images and make them the current set."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO evaluation_set VALUES (?,?,?,?,?,?,?,?)",
                (
                    record.sha256,
                    record.dataset,
                    json.dumps(record.classes),
                    pack_classes(record.labels),
                    json.dumps(record.image_shape),
                    record.examples,
                    record.note,
                    self._next("evaluation_set"),
                ),
            )

    def add_model(self, record: ModelRecord) -> None:
        """Register an exported model and make it the current one of its variant."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO model VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (
                    record.sha256,
                    record.variant,
                    record.method,
                    record.dataset,
                    record.preset,
                    record.arch,
                    record.width,
                    record.seed,
                    json.dumps(asdict(record.cost)),
                    json.dumps(record.manifest),
                    self._next("model"),
                ),
            )

    def add_uap(self, record: UapRecord) -> None:
        """Register a perturbation, as the most recent one."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO uap VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    record.sha256,
                    record.source,
                    record.attack,
                    record.protocol,
                    record.dataset,
                    record.seed,
                    record.eps,
                    record.target,
                    json.dumps(record.shape),
                    record.delta,
                    json.dumps(record.meta),
                    int(record.own),
                    self._next("uap"),
                ),
            )

    def add_prediction_runs(self, runs: list[PredictionRun]) -> None:
        """Store runs, all or none.

        Raises:
            ValueError: a sample whose positions and predictions are not as many.
        """
        if any(
            run.indices is not None and len(run.indices) != len(run.predictions) for run in runs
        ):
            raise ValueError("a sample needs one prediction for each of its positions")
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO prediction_run (model_sha256, evaluation_sha256, uap_sha256, device,"
                " emulated, runtime, machine, predictions, seconds, indices, created_at,"
                " git_commit) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                [
                    (
                        run.model_sha256,
                        run.evaluation_sha256,
                        run.uap_sha256,
                        run.device,
                        int(run.emulated),
                        run.runtime,
                        json.dumps(asdict(run.machine)),
                        pack_classes(run.predictions),
                        run.seconds,
                        pack_indices(run.indices),
                        _now(),
                        self._git_commit,
                    )
                    for run in runs
                ],
            )

    def add_latency_run(self, run: LatencyRun) -> None:
        """Store one latency measurement, every raw sample of it."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO latency_run (model_sha256, device, emulated, runtime, machine, mode,"
                " threads, processes, created_at, git_commit) VALUES (?,?,?,?,?,?,?,?,?,?)",
                (
                    run.model_sha256,
                    run.device,
                    int(run.emulated),
                    run.runtime,
                    json.dumps(asdict(run.machine)),
                    run.mode,
                    run.threads,
                    json.dumps([asdict(process) for process in run.processes]),
                    _now(),
                    self._git_commit,
                ),
            )

    def add_instruction_count(
        self, model_sha256: str, *, device: str, runtime_version: str, instructions: int
    ) -> None:
        """Store how many instructions one inference takes on an emulated device."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO instruction_count VALUES (?,?,?,?,?)",
                (model_sha256, device, runtime_version, instructions, _now()),
            )

    def _next(self, table: Literal["model", "uap", "evaluation_set"]) -> int:
        query = f"SELECT coalesce(max(registered), 0) + 1 FROM {table}"  # noqa: S608 - literals
        return int(self._db.execute(query).fetchone()[0])

    # --- reading -------------------------------------------------------------------------------

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """Every evaluation set by sha256, the current one last."""
        return {
            row["sha256"]: evaluation_set_of(row)
            for row in self._db.execute("SELECT * FROM evaluation_set ORDER BY registered")
        }

    def models(self, *, current_only: bool = True) -> dict[str, ModelRecord]:
        """Models by sha256; by default only the one registered last for each variant."""
        query = "SELECT * FROM model ORDER BY registered"
        records = [model_of(row) for row in self._db.execute(query)]
        if current_only:
            records = list({record.variant: record for record in records}.values())
        return {record.sha256: record for record in records}

    def first_measured(self) -> list[str]:
        """The names of models, by when a file of that name was first run."""
        query = """SELECT variant FROM model JOIN prediction_run ON model_sha256 = model.sha256
            GROUP BY variant ORDER BY min(prediction_run.id)"""
        return [row["variant"] for row in self._db.execute(query)]

    def uaps(self) -> dict[str, UapRecord]:
        """Every perturbation by sha256: brought ones first, then the workspace's, newest last."""
        rows = self._db.execute("SELECT * FROM uap ORDER BY own, registered")
        return {row["sha256"]: uap_of(row) for row in rows}

    def predictions(self) -> list[StoredPrediction]:
        """Every prediction run, oldest first."""
        return [
            prediction_of(row)
            for row in self._db.execute("SELECT * FROM prediction_run ORDER BY id")
        ]

    def run_counts(self) -> dict[str, int]:
        """Model sha256 -> its prediction runs."""
        query = "SELECT model_sha256, count(*) AS runs FROM prediction_run GROUP BY model_sha256"
        return {row["model_sha256"]: int(row["runs"]) for row in self._db.execute(query)}

    def predictions_of(
        self, *, model_sha256: str, evaluation_sha256: str
    ) -> list[StoredPrediction]:
        """The prediction runs of one model on one evaluation set, oldest first."""
        rows = self._db.execute(
            "SELECT * FROM prediction_run WHERE model_sha256 = ? AND evaluation_sha256 = ?"
            " ORDER BY id",
            (model_sha256, evaluation_sha256),
        )
        return [prediction_of(row) for row in rows]

    def latencies(self) -> list[StoredLatency]:
        """Every latency run, oldest first."""
        return [
            latency_of(row) for row in self._db.execute("SELECT * FROM latency_run ORDER BY id")
        ]

    def instruction_counts(self) -> dict[tuple[str, str, str], int]:
        """(model sha256, device, version of onnxruntime) -> instructions of one inference."""
        return {
            (row["model_sha256"], row["device"], row["runtime_version"]): int(row["instructions"])
            for row in self._db.execute("SELECT * FROM instruction_count")
        }


def open_store(path: Path, *, create: bool = True, git_commit: str | None = None) -> Store:
    """Open the store at `path`, creating it unless told not to.

    One in a folder that may not be written can be read, and not written.

    Raises:
        HarnessError: no such file (with `create=False`), not a results store, or one written by
            a newer version; no space left, or the file cannot be written.
    """
    if not create and not path.exists():
        raise HarnessError(f"no results at {path}: run `harness attack-device` or `harness run`")
    connection = None
    try:
        # Autocommit off by hand: every write goes through `with connection`.
        read_only = path.exists() and not os.access(path.parent, os.W_OK)
        connection = _as_it_lies(path) if read_only else sqlite3.connect(path, timeout=BUSY_SECONDS)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        version = schema_of(connection) if read_only else bring_up_to_date(connection)
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise cannot_write(error, path) or HarnessError(
            f"cannot open {path} as a results store ({error}): move it away and run again"
        ) from None
    if read_only and version < SCHEMA_VERSION:
        connection.close()
        raise HarnessError(f"{path} is of an older harness, {ELSEWHERE}")
    if version > SCHEMA_VERSION:
        connection.close()
        raise HarnessError(f"{path} was written by a newer harness (schema {version}): upgrade")
    return Store(connection, path, git_commit=git_commit)


def _as_it_lies(path: Path) -> sqlite3.Connection:
    """A database in a folder that may not be written, without the files SQLite keeps beside one.

    Raises:
        HarnessError: there is a log beside it, whose rows would be missed.
    """
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise HarnessError(f"{path} was left while it was written, {ELSEWHERE}")
    return sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

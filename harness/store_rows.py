"""Rows of the results store -> records, and class indices <-> bytes."""

from __future__ import annotations

import json
import sqlite3
import sys
from array import array
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from harness.records import (
    CostCard,
    EvaluationSet,
    LatencyProcess,
    LatencyRun,
    Machine,
    ModelRecord,
    PredictionRun,
    Runtime,
    UapRecord,
)


@dataclass(frozen=True)
class StoredPrediction:
    """A `PredictionRun` with what the store added when it was written."""

    id: int
    run: PredictionRun
    created_at: str
    git_commit: str | None


@dataclass(frozen=True)
class StoredLatency:
    """A `LatencyRun` with what the store added when it was written."""

    id: int
    run: LatencyRun
    created_at: str
    git_commit: str | None


def pack_classes(values: tuple[int, ...]) -> bytes:
    """Class indices as little-endian uint16; -1 (no label) is not representable on purpose."""
    packed = array("H", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_classes(blob: bytes) -> tuple[int, ...]:
    packed = array("H")
    packed.frombytes(blob)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)


def pack_indices(values: tuple[int, ...] | None) -> bytes | None:
    """Positions in the evaluation set as little-endian uint32; None for all of it."""
    return None if values is None else np.asarray(values, dtype="<u4").tobytes()


def unpack_indices(blob: bytes | None) -> tuple[int, ...] | None:
    return None if blob is None else tuple(np.frombuffer(blob, dtype="<u4").tolist())


def shape_of(text: str) -> tuple[int, int, int]:
    channels, height, width = json.loads(text)
    return (channels, height, width)


def model_of(row: sqlite3.Row) -> ModelRecord:
    cost: dict[str, Any] = json.loads(row["cost"])
    cost["layers"] = tuple(cost["layers"])
    return ModelRecord(
        sha256=row["sha256"],
        variant=row["variant"],
        method=row["method"],
        dataset=row["dataset"],
        preset=row["preset"],
        arch=row["arch"],
        width=row["width"],
        seed=row["seed"],
        cost=CostCard(**cost),
        manifest=json.loads(row["manifest"]),
    )


def uap_of(row: sqlite3.Row) -> UapRecord:
    return UapRecord(
        sha256=row["sha256"],
        source=row["source"],
        attack=row["attack"],
        protocol=row["protocol"],
        dataset=row["dataset"],
        seed=row["seed"],
        eps=row["eps"],
        target=row["target"],
        shape=shape_of(row["shape"]),
        delta=row["delta"],
        meta=json.loads(row["meta"]),
        own=bool(row["own"]),
    )


def process_of(values: dict[str, Any]) -> LatencyProcess:
    for name in ("warmup_ns", "samples_ns", "telemetry"):
        values[name] = tuple(values[name])
    return LatencyProcess(**values)


def evaluation_set_of(row: sqlite3.Row) -> EvaluationSet:
    return EvaluationSet(
        sha256=row["sha256"],
        dataset=row["dataset"],
        classes=tuple(json.loads(row["classes"])),
        labels=unpack_classes(row["labels"]),
        image_shape=shape_of(row["image_shape"]),
        examples=row["examples"],
        note=row["note"],
    )


def prediction_of(row: sqlite3.Row) -> StoredPrediction:
    return StoredPrediction(
        id=row["id"],
        run=PredictionRun(
            model_sha256=row["model_sha256"],
            evaluation_sha256=row["evaluation_sha256"],
            uap_sha256=row["uap_sha256"],
            device=row["device"],
            emulated=bool(row["emulated"]),
            runtime=cast(Runtime, row["runtime"]),
            machine=Machine(**json.loads(row["machine"])),
            predictions=unpack_classes(row["predictions"]),
            seconds=row["seconds"],
            indices=unpack_indices(row["indices"]),
        ),
        created_at=row["created_at"],
        git_commit=row["git_commit"],
    )


def latency_of(row: sqlite3.Row) -> StoredLatency:
    return StoredLatency(
        id=row["id"],
        run=LatencyRun(
            model_sha256=row["model_sha256"],
            device=row["device"],
            emulated=bool(row["emulated"]),
            runtime=cast(Runtime, row["runtime"]),
            machine=Machine(**json.loads(row["machine"])),
            mode=row["mode"],
            threads=row["threads"],
            processes=tuple(process_of(p) for p in json.loads(row["processes"])),
        ),
        created_at=row["created_at"],
        git_commit=row["git_commit"],
    )

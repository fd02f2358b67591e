"""Rows of the results store -> records, and class indices <-> bytes."""

from __future__ import annotations

import json
import sqlite3
import sys
from array import array
from typing import Any

from harness.records import CostCard, LatencyProcess, ModelRecord, UapRecord


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
    )


def process_of(values: dict[str, Any]) -> LatencyProcess:
    for name in ("warmup_ns", "samples_ns", "telemetry"):
        values[name] = tuple(values[name])
    return LatencyProcess(**values)

"""Rules about bytes: tensors that could be stored in fewer.

Enters: a `Graph`. Leaves: findings. Only disk and download are at stake: the runtime unpacks
constants when it loads a file (FACTS E).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.graph import Array
from export.lint_finding import Finding, counted, per_filter
from export.onnx_reader import Graph
from export.packing import code_for

_WEIGHT_TYPES = frozenset(
    (TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT16)
)
_FEW_INTEGERS, _FEW_FLOATS = 16, 256
"""Distinct values that are worth a table: half a byte for integers, a byte for floats."""
_MIN_SAVED_BYTES = 1024
"""Below it the operators that unpack a tensor cost about what they save."""
_MIN_NOTED_BYTES = 64
_UNPACKING = frozenset(
    ("Cast", "Div", "Identity", "Mod", "Reshape", "Slice", "Squeeze", "Unsqueeze")
)


class _Table(NamedTuple):
    """How a tensor of few values would be stored."""

    bytes: int
    """Codes and table together."""
    distinct: int
    per_filter: bool = False
    """A table for each filter; `distinct` is the longest."""


def unpacked_tensor(graph: Graph) -> Iterator[Finding]:
    """Tensors of few distinct values, stored one value to an element."""
    for name, tensor in graph.stored_tensors():
        if tensor.data_type not in _WEIGHT_TYPES or _is_packed_already(graph, name):
            continue
        values = graph.constant(name)
        if values is None or values.nbytes < _MIN_SAVED_BYTES:
            continue
        table = _tables(values)
        if table is None or values.nbytes - table.bytes < _MIN_SAVED_BYTES:
            continue
        where = " in each filter" if table.per_filter else ""
        yield Finding(
            "unpacked_tensor",
            "info",
            name,
            f"{list(values.shape)} {values.dtype} holds {counted(table.distinct, 'distinct value')}"
            f"{where}: {values.nbytes:,} bytes now, {table.bytes:,} packed with its table",
            "store codes and read the values from a table in the graph, as `harness export` does:"
            " saves disk and download, not memory",
            {"bytes": values.nbytes, "bytes_packed": table.bytes, "distinct": table.distinct},
        )


def wasteful_fields(graph: Graph) -> Iterator[Finding]:
    """Tensors kept as lists of numbers where raw bytes are shorter."""
    tensors = excess = 0
    first = ""
    for name, tensor in graph.stored_tensors():
        if tensor.HasField("raw_data") or tensor.data_type == TensorProto.STRING:
            continue
        values = graph.constant(name)
        if values is None:
            continue
        saved = tensor.ByteSize() - _raw(values, tensor).ByteSize()
        if saved > 0:
            tensors, excess, first = tensors + 1, excess + saved, first or name
    if excess >= _MIN_NOTED_BYTES:
        yield Finding(
            "wasteful_fields",
            "info",
            first if tensors == 1 else "",
            f"{counted(tensors, 'tensor')} in float_data, int32_data or int64_data:"
            f" {counted(excess, 'byte')} more than raw_data",
            "write tensors with onnx.numpy_helper.from_array, or raw=True",
            {"tensors": tensors, "bytes": excess},
        )


def duplicate_initializers(graph: Graph) -> Iterator[Finding]:
    """The same tensor stored under several names."""
    groups: dict[tuple[int, tuple[int, ...], bytes], list[str]] = defaultdict(list)
    for name, tensor in graph.stored_tensors():
        values = graph.constant(name)
        if values is not None and values.nbytes >= _MIN_NOTED_BYTES:
            groups[tensor.data_type, values.shape, values.tobytes()].append(name)
    copies = {key: names for key, names in groups.items() if len(names) > 1}
    if copies:
        wasted = sum(len(key[2]) * (len(names) - 1) for key, names in copies.items())
        extra = sum(len(names) - 1 for names in copies.values())
        largest = max(copies, key=lambda key: len(key[2]) * len(copies[key]))
        yield Finding(
            "duplicate_initializers",
            "info",
            copies[largest][0],
            f"{counted(extra, 'tensor')} stored again under other names, {wasted:,} bytes; most by"
            f" {' = '.join(copies[largest][:2])}",
            "let the nodes share one initializer",
            {"tensors": extra, "bytes": wasted},
        )


def _tables(values: Array) -> _Table | None:
    """The table that packs a tensor best; None when none is small enough."""
    few = _FEW_FLOATS if values.dtype.kind == "f" else _FEW_INTEGERS
    tables = []
    distinct = _distinct(values, few)
    if distinct <= few:
        tables.append(_Table(_packed_bytes(values.size, distinct, values.itemsize), distinct))
    # Fake quantisation with a scale for each filter: few values in each, many in all.
    rows = per_filter(values)
    if values.dtype.kind == "f" and few < rows.shape[1] and _distinct(rows[0], few) <= few:
        counts = [_distinct(row, few) for row in rows]
        if max(counts) <= few:
            packed = _packed_bytes(values.size, max(counts), 0) + sum(counts) * values.itemsize
            tables.append(_Table(packed, max(counts), per_filter=True))
    return min(tables, key=lambda table: table.bytes, default=None)


def _distinct(values: Array, few: int) -> int:
    """How many distinct values; any number above `few` where a sample has more."""
    sample = np.unique(values.reshape(-1)[: 4 * few]).size
    return sample if sample > few else np.unique(values).size


def _packed_bytes(elements: int, distinct: int, itemsize: int) -> int:
    code = code_for(max(distinct, 2))
    return -(-elements // code.digits) * code.dtype.itemsize + distinct * itemsize


def _is_packed_already(graph: Graph, name: str) -> bool:
    """Whether a tensor is codes or the table of an unpacking in the graph."""
    pending, seen = [name], {name}
    while pending:
        tensor = pending.pop()
        for node in graph.consumers(tensor):
            if node.op_type in ("Gather", "GatherElements"):
                return True
            for output in node.output if node.op_type in _UNPACKING else ():
                if output not in seen and not graph.is_dynamic(output):
                    seen.add(output)
                    pending.append(output)
    return False


def _raw(values: Array, tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same tensor with its values as bytes."""
    raw = numpy_helper.from_array(values, tensor.name)
    if tensor.HasField("doc_string"):
        raw.doc_string = tensor.doc_string
    return raw

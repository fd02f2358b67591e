"""What a rule of the linter reports, and what the rules share.

Enters: nothing. Leaves: the `Finding` record and small questions about nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
import onnx

from export.graph import Array
from export.onnx_reader import Graph

Severity = Literal["error", "warning", "info"]
"""error: wrong results somewhere, or nothing runs it. warning: it costs. info: worth knowing."""

_KEEPS_CHANNELS = frozenset(
    (
        "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "DequantizeLinear", "Dropout",
        "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mul",
        "QuantizeLinear", "Relu", "Round", "Sigmoid", "Tanh",
    )
)  # fmt: skip
"""Operators through which channel i stays channel i."""

_CONVOLUTIONS = {
    "Conv": (1, None),
    "FusedConv": (1, None),
    "ConvInteger": (1, 3),
    "QLinearConv": (3, 5),
}
"""Where they keep their weights and the weights' zero point."""


@dataclass(frozen=True)
class Finding:
    """One thing about one file that costs something."""

    rule: str
    severity: Severity
    node: str
    """Where: a node, a tensor, an input; empty when it is the whole file."""
    cost: str
    """What it costs, with numbers of this graph; measured ratios say that they are."""
    remedy: str
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """The numbers in `cost`, for programs."""


def label(node: onnx.NodeProto) -> str:
    """The node's name, or what identifies it where it has none."""
    return node.name or f"{node.op_type} -> {next(iter(node.output), '?')}"


def counted(n: int, noun: str) -> str:
    """`1 filter`, `2 filters`; thousands with commas."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node is ONNX's own, not some vendor's of the same name."""
    return node.domain in ("", "ai.onnx")


def convolutions(graph: Graph) -> Iterator[tuple[onnx.NodeProto, str, str]]:
    """(node, weight tensor, tensor of its zero point or '') of every convolution."""
    for node in graph.nodes:
        if node.op_type in _CONVOLUTIONS and len(node.input) > 1 and node.output:
            weight, zero_point = _CONVOLUTIONS[node.op_type]
            yield node, graph.input(node, weight), graph.input(node, zero_point)


def is_elementwise(node: onnx.NodeProto) -> bool:
    """Whether channel i of a node's output depends on channel i of its inputs only."""
    return is_standard(node) and node.op_type in _KEEPS_CHANNELS


def per_filter(values: Array) -> Array:
    """Weights [filters, ...] as a matrix [filters, everything else]."""
    return (
        values.reshape(values.shape[0], prod(values.shape[1:]))
        if values.ndim
        else values.reshape(1, 1)
    )


def is_float(array: Array) -> bool:
    """Whether weights are stored as floating-point numbers."""
    return bool(np.issubdtype(array.dtype, np.floating))

"""Which operators of a graph run as 8-bit integer matrix products, and on which operands.

Enters: a `Graph`. Leaves: `Product` records, as the kernel sees them: left times right. The
convolution's weights are right in QLinearConv and left in ConvInteger; depthwise QLinearConv has a
kernel of its own and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from export.graph import Array
from export.lint_finding import is_standard, per_filter
from export.onnx_reader import Graph

_RANGES: dict[int, tuple[int, int]] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}
_LOOKS_THROUGH = frozenset(
    (
        "Cast", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose",
        "Unsqueeze",
    )
)  # fmt: skip
"""Operators whose output holds no value that their first input does not hold, if it fits."""


class Operand(NamedTuple):
    """One side of an integer product."""

    tensor: str
    zero_point: str
    kind: int
    """TensorProto.UINT8 or INT8; 0 when the file does not say."""


@dataclass(frozen=True)
class Product:
    """An operator that runs as an integer matrix product, as the kernel sees it."""

    node: onnx.NodeProto
    left: Operand
    right: Operand
    filters: Callable[[Array], Array]
    """The constant operand -> [filters, terms of one sum]."""
    precision_option: bool
    """Whether session.x64quantprecision=1 makes it exact."""


def products(graph: Graph) -> Iterator[Product]:
    for node in graph.nodes:
        found = _PRODUCTS.get(node.op_type)
        product = found(graph, node) if found is not None else None
        if product is not None:
            yield product


def _operand(graph: Graph, node: onnx.NodeProto, index: int, zero_point: int) -> Operand:
    tensor, zero = graph.input(node, index), graph.input(node, zero_point)
    # A vendor's operators stop shape inference; a zero point always has its tensor's type.
    kind = graph.element_type(tensor) or (graph.element_type(zero) if zero else 0)
    return Operand(tensor, zero, kind)


def _qlinear_conv(graph: Graph, node: onnx.NodeProto) -> Product | None:
    if _is_depthwise(graph, node, graph.input(node, 3)):
        return None
    left, right = _operand(graph, node, 0, 2), _operand(graph, node, 3, 5)
    return Product(node, left, right, per_filter, precision_option=True)


def _conv_integer(graph: Graph, node: onnx.NodeProto) -> Product:
    left, right = _operand(graph, node, 1, 3), _operand(graph, node, 0, 2)
    return Product(node, left, right, per_filter, precision_option=False)


def _matmul_at(a: int, a_zero: int, b: int, b_zero: int) -> Callable[..., Product]:
    def find(graph: Graph, node: onnx.NodeProto) -> Product:
        left, right = _operand(graph, node, a, a_zero), _operand(graph, node, b, b_zero)
        transposed = node.op_type == "QGemm" and bool(graph.attribute(node, "transB", 0))
        filters = _filters_of(graph, right, transposed=transposed)
        return Product(node, left, right, filters, precision_option=True)

    return find


def _dynamic_matmul(graph: Graph, node: onnx.NodeProto) -> Product:
    left = Operand(graph.input(node, 0), "", TensorProto.UINT8)  # quantised when it runs
    return Product(node, left, _operand(graph, node, 1, 3), _columns, precision_option=True)


def _quantised_float(graph: Graph, node: onnx.NodeProto) -> Product | None:
    """Conv, Gemm or MatMul between DequantizeLinear, which onnxruntime fuses to integers.

    A Conv only with QuantizeLinear behind it; the others also without.
    """
    sources = [graph.producer(name) for name in node.input[:2]]
    operands = [
        _operand(graph, source, 0, 2)
        for source in sources
        if source is not None and source.op_type == "DequantizeLinear"
    ]
    if len(operands) != 2:
        return None
    left, right = operands
    if node.op_type == "Conv":
        if not _is_requantised(graph, node) or _is_depthwise(graph, node, right.tensor):
            return None
        return Product(node, left, right, per_filter, precision_option=True)
    transposed = node.op_type == "Gemm" and bool(graph.attribute(node, "transB", 0))
    filters = _filters_of(graph, right, transposed=transposed)
    return Product(node, left, right, filters, precision_option=True)


_PRODUCTS: dict[str, Callable[[Graph, onnx.NodeProto], Product | None]] = {
    "QLinearConv": _qlinear_conv,
    "ConvInteger": _conv_integer,
    "MatMulInteger": _matmul_at(0, 2, 1, 3),
    "QLinearMatMul": _matmul_at(0, 2, 3, 5),
    "QGemm": _matmul_at(0, 2, 3, 5),
    "MatMulIntegerToFloat": _matmul_at(0, 4, 1, 5),
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "Conv": _quantised_float,
    "Gemm": _quantised_float,
    "MatMul": _quantised_float,
}


def _filters_of(graph: Graph, right: Operand, *, transposed: bool) -> Callable[[Array], Array]:
    """How the constant side of a matrix product lies: [..., filters, terms] or the reverse."""
    right_is_constant = graph.constant(right.tensor) is not None
    return _columns if right_is_constant and not transposed else _rows


def _rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)


def _columns(values: Array) -> Array:
    return _rows(np.swapaxes(values, -1, -2)) if values.ndim > 1 else _rows(values)


def _is_depthwise(graph: Graph, node: onnx.NodeProto, weight: str) -> bool:
    kernel = graph.shape_or_none(weight)
    group = graph.attribute(node, "group", 1)
    return kernel is not None and group > 1 and kernel[:2] == (group, 1)


def _is_requantised(graph: Graph, node: onnx.NodeProto) -> bool:
    consumer = graph.only_consumer(node.output[0])
    if consumer is not None and consumer.op_type in ("Relu", "Clip"):
        consumer = graph.only_consumer(consumer.output[0])
    return consumer is not None and consumer.op_type == "QuantizeLinear"


def value_range(graph: Graph, operand: Operand) -> tuple[int, int]:
    """(lowest, highest) value that an operand can hold, the zero point that pads it included."""
    low, high = _RANGES[operand.kind]
    table = _table_behind(graph, operand.tensor)
    padding = graph.constant(operand.zero_point) if operand.zero_point else np.array(0)
    if table is None or not table.size or padding is None or not padding.size:
        return low, high
    lowest, highest = table.min(), table.max()
    if not (low <= lowest and highest <= high and np.array_equal(table, np.rint(table))):
        return low, high  # a Cast on the way may change the values
    return min(0, int(lowest), int(padding.min())), max(0, int(highest), int(padding.max()))


def _table_behind(graph: Graph, tensor: str) -> Array | None:
    """The constant table that every element of a tensor is read from, if it is."""
    node = graph.producer(tensor)
    while node is not None and is_standard(node) and node.op_type in _LOOKS_THROUGH:
        tensor = node.input[0]
        node = graph.producer(tensor)
    if node is None or not is_standard(node) or node.op_type not in ("Gather", "GatherElements"):
        return None
    return graph.constant(node.input[0])


def worst_pairs(matrix: Array, low: int, high: int) -> Array:
    """[filters, 2]: lowest and highest sum of two products, each weight times [low, high]."""
    terms = matrix.shape[1]
    if terms > 4:  # the two largest and the two smallest weights decide
        ends = np.partition(matrix, (1, terms - 2), axis=1)
        matrix = np.concatenate([ends[:, :2], ends[:, -2:]], axis=1)
    products = matrix.astype(np.int64)[..., None] * np.array([low, high])
    highest = np.sort(products.max(axis=2), axis=1)[:, -2:].sum(axis=1)
    lowest = np.sort(products.min(axis=2), axis=1)[:, :2].sum(axis=1)
    return np.stack([lowest, highest], axis=1)

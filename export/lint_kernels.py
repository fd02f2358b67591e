"""Rules about the runtime's kernels: wrong sums on some processors, slow forms of an operation.

Enters: a `Graph`. Leaves: findings. Which operand orders saturate was found by running
onnxruntime 1.32 on an emulated x86-64 with AVX2 and without VNNI: the left operand of the matrix
product unsigned, the right one signed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from onnx import TensorProto

from export.lint_finding import Finding, convolutions, counted, is_standard, label
from export.lint_products import products, value_range, worst_pairs
from export.onnx_reader import Graph

_INT16 = np.iinfo(np.int16)
_ALIGNED, _SMALL = 8, 16
_TABLE_MIN_ELEMENTS = 1024
_GATHER_MS, _GATHER_ELEMENTS_MS, _MEASURED_ELEMENTS = 0.576, 0.087, 65_536  # FACTS E

_FEWER_BITS = (
    "store 7-bit weights (reduce_range) or uint8 weights around 128,"
    " or run with session.x64quantprecision=1"
)
_UNSIGNED_INPUT = "quantise the activations as uint8: no session option helps ConvInteger"


def saturation(graph: Graph) -> Iterator[Finding]:
    """u8 x s8 products whose sums of two can pass int16, where AVX2 adds them in 16 bits.

    The bound takes the two largest products of a filter, adjacent or not, so it holds for every
    order in which a kernel reads the weights.
    """
    for product in products(graph):
        if (product.left.kind, product.right.kind) != (TensorProto.UINT8, TensorProto.INT8):
            continue
        sides = product.left, product.right
        # The constant side gives exact coefficients; the other is known by its range only.
        constant = next((s for s in sides[::-1] if graph.constant(s.tensor) is not None), sides[1])
        other = sides[0] if constant is sides[1] else sides[1]
        low, high = value_range(graph, other)
        values = graph.constant(constant.tensor)
        matrix = np.array([[-128, -128]]) if values is None else product.filters(values)
        if not matrix.size:
            continue
        worst = worst_pairs(matrix, low, high)
        over = int(((worst > _INT16.max) | (worst < _INT16.min)).any(axis=1).sum())
        if not over:
            continue
        largest = int(np.abs(worst).max())
        of = "inputs" if values is None else f"{over:,} of {counted(len(matrix), 'filter')}"
        yield Finding(
            "saturation",
            "error",
            label(product.node),
            f"{product.node.op_type} u8 x s8: {of} can sum two products to {largest:,}"
            f" (inputs in [{low}, {high}]), past int16's {_INT16.max:,}: silently wrong on AVX2"
            " without VNNI",
            _FEWER_BITS if product.precision_option else _UNSIGNED_INPUT,
            {
                "largest_pair_sum": largest,
                "limit": int(_INT16.max),
                "filters_over": over,
                "filters": len(matrix),
                "input_max": high,
                "input_min": low,
            },
        )


def convinteger_int8_weights(graph: Graph) -> Iterator[Finding]:
    """ConvInteger whose weights are signed: the runtime has no fast kernel for that order."""
    for node in graph.nodes:
        if node.op_type == "ConvInteger":
            weight = graph.input(node, 1)
            if graph.element_type(weight) != TensorProto.INT8:
                continue
            weights = prod(graph.shape_or_none(weight) or (0,))
            yield Finding(
                "convinteger_int8_weights",
                "warning",
                label(node),
                f"{weights:,} int8 weights: measured 7 times slower than uint8"
                " (5.1 against 0.70 ms a layer, x86-64 AVX2)",
                "store the weights as uint8, 128 higher, with zero point 128: same sums",
                {"weights": weights, "measured_ratio": 7},
            )


def gather_table(graph: Graph) -> Iterator[Finding]:
    """Gather that reads a small table at every activation."""
    for node in graph.nodes:
        if node.op_type != "Gather" or not is_standard(node):
            continue
        table, index = node.input[0], node.input[1]
        shape = graph.shape_or_none(table)
        if shape is None or len(shape) != 1 or graph.is_dynamic(table):
            continue
        places = graph.shape_or_none(index)
        if not graph.is_dynamic(index) or (places and prod(places) < _TABLE_MIN_ELEMENTS):
            continue
        n = prod(places) if places is not None else 0
        per = (_GATHER_MS - _GATHER_ELEMENTS_MS) / _MEASURED_ELEMENTS
        saved = f", about {n * per:.2f} ms an image for its {n:,}" if n else ""
        yield Finding(
            "gather_table",
            "warning",
            label(node),
            f"a table of {shape[0]} read by Gather: measured {_GATHER_MS} ms against"
            f" {_GATHER_ELEMENTS_MS} by GatherElements per {_MEASURED_ELEMENTS:,} elements{saved}",
            "flatten the index to one dimension and read the table by GatherElements",
            {"table": shape[0], "elements": n, "measured_ratio": _GATHER_MS / _GATHER_ELEMENTS_MS},
        )


def unaligned_channels(graph: Graph) -> Iterator[Finding]:
    """Convolutions whose channel counts leave a part of a vector register empty."""
    for node, weight, _ in convolutions(graph):
        kernel = graph.shape_or_none(weight)
        if kernel is None or len(kernel) < 3:
            continue
        widths = {
            "input": kernel[1] * graph.attribute(node, "group", 1),
            "output": kernel[0],
        }
        odd = {side: n for side, n in widths.items() if n >= _SMALL and n % _ALIGNED}
        if not odd:
            continue
        described = " and ".join(
            f"{n} {side} channels (aligned: {n // _ALIGNED * _ALIGNED} or"
            f" {-(-n // _ALIGNED) * _ALIGNED})"
            for side, n in odd.items()
        )
        yield Finding(
            "unaligned_channels",
            "warning",
            label(node),
            f"{described}: can run slower than more channels"
            " (on one AVX2 processor 64 took 1.69 ms, 58 1.79, 56 1.50)",
            f"prune to a multiple of {_ALIGNED}, or leave the channels in",
            {f"{side}_channels": n for side, n in odd.items()},
        )

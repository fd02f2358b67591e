"""Rules about work and weights that the graph carries for nothing.

Enters: a `Graph`. Leaves: findings.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import onnx

from export.graph import Array
from export.lint_finding import (
    Finding,
    convolutions,
    is_elementwise,
    is_float,
    is_standard,
    label,
    per_filter,
)
from export.onnx_reader import Graph


def zero_filters(graph: Graph) -> Iterator[Finding]:
    """Convolutions with filters that are zero throughout: pruned, but not cut."""
    for node, weight, zero_point in convolutions(graph):
        values = graph.constant(weight)
        zero = graph.constant(zero_point) if zero_point else None
        if values is None or values.ndim < 3:
            continue
        rows = per_filter(values)
        middle = np.array(0) if zero is None else zero.reshape(-1, 1)
        if len(middle.shape) == 2 and len(middle) not in (1, len(rows)):
            continue
        zeroed = (rows == middle).all(axis=1)
        bias = (
            graph.constant(node.input[2])
            if node.op_type == "Conv" and len(node.input) > 2
            else None
        )
        # One channel has to carry what zero filters emit: alone, it is not there to be cut.
        emits = bias is not None and bias.size == len(rows) and bool(bias.reshape(-1)[zeroed].any())
        dead = int(zeroed.sum())
        if dead > emits:
            yield _masked(
                graph, node, dead, values.shape, f"{dead:,} of {len(rows):,} filters are zero"
            )


def zero_masks(graph: Graph) -> Iterator[Finding]:
    """Multiplications by a constant that silences whole channels: masked, but not cut."""
    for node in graph.nodes:
        if node.op_type != "Mul" or len(node.input) != 2:
            continue
        for mask_name, masked_name in (node.input, node.input[::-1]):
            mask = graph.constant(mask_name)
            if mask is None or not graph.is_dynamic(masked_name):
                continue
            silent = _silent_channels(mask, graph.shape_or_none(masked_name))
            if not silent:
                continue
            source = _convolution_behind(graph, masked_name)
            what = f"a constant mask silences {silent:,} channels"
            if source is None:
                yield Finding(
                    "masked_not_slim",
                    "warning",
                    label(node),
                    f"{what}, which are computed first",
                    "cut the channels from the layers before and after",
                    {"channels": silent},
                )
            else:
                conv, shape = source
                yield _masked(graph, node, silent, shape, what, conv=conv)


def fake_quantisation(graph: Graph) -> Iterator[Finding]:
    """Rounding to 8 bits and back in front of an operator whose weights are still float."""
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        if _before_rounding(graph, node.input[0]) is None:
            continue
        weight = node.input[1]
        source = graph.producer(weight)
        if source is not None and source.op_type == "DequantizeLinear":
            # Stored as integers: as it should be. Stored as float and rounded in the graph: not.
            weight = _before_rounding(graph, weight) or ""
        values = graph.constant(weight) if weight else None
        if values is None or not is_float(values):
            continue
        yield Finding(
            "fake_quantisation",
            "warning",
            label(node),
            f"{node.op_type} runs in float behind QuantizeLinear and DequantizeLinear:"
            f" {values.nbytes:,} bytes of weights that int8 would hold in {values.size:,},"
            " and two more passes over the activations",
            "store the weights as int8 behind DequantizeLinear, or take the quantisers out",
            {"bytes": values.nbytes, "bytes_int8": values.size},
        )


def batch_norm(graph: Graph) -> Iterator[Finding]:
    """Batch normalisation that the convolution before it could carry."""
    for node in graph.nodes:
        if node.op_type != "BatchNormalization" or not (is_standard(node) and node.input):
            continue
        source = graph.producer(node.input[0])
        if source is None or source.op_type not in ("Conv", "Gemm", "ConvTranspose"):
            continue
        if graph.only_consumer(node.input[0]) is None:
            continue
        vectors = [graph.shape_or_none(name) or (0,) for name in node.input[1:5]]
        numbers = sum(prod(shape) for shape in vectors)
        shape = graph.shape_or_none(node.output[0])
        passes = f", and a pass over {prod(shape):,} activations an image" if shape else ""
        yield Finding(
            "batch_norm",
            "info",
            label(node),
            f"not folded into {label(source)}: {4 * numbers:,} bytes{passes} on runtimes that do"
            " not fold it themselves",
            "fold it into the weights and bias before export (eval mode)",
            {"bytes": 4 * numbers},
        )


def _masked(
    graph: Graph,
    node: onnx.NodeProto,
    dead: int,
    kernel: tuple[int, ...],
    what: str,
    *,
    conv: onnx.NodeProto | None = None,
) -> Finding:
    """A finding about `dead` filters of a convolution with weights of shape `kernel`."""
    params = dead * prod(kernel[1:])
    output = graph.shape_or_none((conv or node).output[0])
    macs = params * prod(output[2:]) if output is not None else None
    numbers = {"filters": dead, "params": params} | ({} if macs is None else {"macs": macs})
    shown = "" if macs is None else f" and {macs:,} MACs an image"
    cost = f"{what}: {params:,} parameters{shown} here, more in the layers that read them"
    if _feeds_a_sum(graph, conv or node):
        return Finding(
            "masked_not_slim",
            "info",
            label(node),
            cost,
            "a residual sum needs these channels: they can go only where every layer that feeds the"
            ' sum has the same ones at zero (`train.sfp_coupling = "stage"` trains so)',
            numbers,
        )
    return Finding(
        "masked_not_slim",
        "warning",
        label(node),
        cost,
        "cut them from this layer and from what reads it; a zero filter still emits its bias, so"
        " keep one constant channel for them",
        numbers,
    )


def _feeds_a_sum(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a layer's channels are added to another layer's, as they are."""
    waiting, seen = [node.output[0]], set[str]()
    while waiting:
        tensor = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        for consumer in graph.consumers(tensor):
            if not is_elementwise(consumer):
                continue
            if sum(graph.is_dynamic(name) for name in consumer.input) > 1:
                return True
            waiting.append(consumer.output[0])
    return False


def _silent_channels(mask: Array, masked: tuple[int, ...] | None) -> int:
    """Channels (axis 1) that a constant factor sets to zero; 0 where it is no channel mask."""
    rank = len(masked) if masked is not None else max(mask.ndim, 4)
    if mask.ndim > rank or rank < 2:
        return 0
    dims = (1,) * (rank - mask.ndim) + mask.shape
    if dims[1] < 2:
        return 0
    others = tuple(axis for axis in range(rank) if axis != 1)
    return int((mask.reshape(dims) == 0).all(axis=others).sum())


def _convolution_behind(graph: Graph, tensor: str) -> tuple[onnx.NodeProto, tuple[int, ...]] | None:
    """(node, shape of its weights) of the convolution whose channels a tensor has."""
    places = {node.output[0]: (node, weight) for node, weight, _ in convolutions(graph)}
    while tensor not in places:
        node = graph.producer(tensor)
        if node is None or not is_elementwise(node):
            return None
        dynamic = [name for name in node.input if graph.is_dynamic(name)]
        if len(dynamic) != 1:  # a residual sum: several convolutions feed these channels
            return None
        tensor = dynamic[0]
    node, weight = places[tensor]
    shape = graph.shape_or_none(weight)
    return None if shape is None else (node, shape)


def _before_rounding(graph: Graph, tensor: str) -> str | None:
    """What QuantizeLinear, directly followed by DequantizeLinear, turned into a tensor."""
    back = graph.producer(tensor)
    if back is None or back.op_type != "DequantizeLinear":
        return None
    there = graph.producer(back.input[0])
    return there.input[0] if there is not None and there.op_type == "QuantizeLinear" else None

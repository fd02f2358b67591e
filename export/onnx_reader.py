"""Questions about an ONNX file that was possibly made elsewhere: shapes, constants, neighbours.

Enters: bytes. Leaves: a `Graph` whose shapes are known for one image. Nothing is executed but the
folding of constants (by onnx's reference implementation), so that a packed weight can be counted
as what it is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.graph import Array
from harness.records import HarnessError

_FOLDABLE = frozenset(
    (
        "Cast", "DequantizeLinear", "Div", "Gather", "GatherElements", "Identity", "Mod", "Reshape",
        "Slice", "Squeeze", "Transpose", "Unsqueeze",
    )
)  # fmt: skip
"""What may stand between a stored tensor and the operator that uses it."""


class Graph:
    """One ONNX model, its shapes inferred for a batch of one image."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values: dict[str, Array | None] = {"": None}
        self._producer = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._consumers[name].append(node)
        self._outputs = {output.name for output in model.graph.output}
        self._shapes = {name: tuple(tensor.dims) for name, tensor in self._stored.items()}
        for info in (*model.graph.value_info, *model.graph.input, *model.graph.output):
            if info.type.tensor_type.HasField("shape"):
                dims = info.type.tensor_type.shape.dim
                if all(dim.HasField("dim_value") for dim in dims):
                    self._shapes[info.name] = tuple(dim.dim_value for dim in dims)

    @classmethod
    def parse(cls, model_bytes: bytes, *, image_shape: tuple[int, int, int]) -> Graph:
        """Read a model and infer every shape for an input [1, C, H, W].

        Raises:
            HarnessError: not an ONNX model, not a model of one image input, weights outside the
                file, or shapes that contradict each other.
        """
        try:
            model = onnx.load_model_from_string(model_bytes)
        except Exception as error:  # protobuf's DecodeError; its package carries no types
            raise HarnessError(f"not an ONNX model: {error}") from error
        if not model.graph.node or not model.opset_import:
            raise HarnessError("not an ONNX model: it has no operators")
        graph = model.graph
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer):
            raise HarnessError("the ONNX file keeps weights outside itself: save it as one file")
        stored = {tensor.name for tensor in graph.initializer}
        images = [entry for entry in graph.input if entry.name not in stored]
        if len(images) != 1 or len(images[0].type.tensor_type.shape.dim) != 4:
            raise HarnessError(
                f"the ONNX file has {len(images)} inputs: one image [N, C, H, W] is expected"
            )
        _fix_shape(images[0], (1, *image_shape))
        # What the file says of other shapes may hold a symbolic batch, which would win.
        del graph.value_info[:]
        for output in graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            reason = str(error).strip().splitlines()[-1]
            raise HarnessError(f"shapes of the ONNX file cannot be inferred: {reason}") from error
        return cls(inferred)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor for one image.

        Raises:
            HarnessError: it could not be inferred.
        """
        try:
            return self._shapes[name]
        except KeyError:
            value = self.value(name)
            if value is not None:
                return value.shape
            raise HarnessError(
                f"the shape of tensor {name!r} cannot be inferred, so its layer cannot be counted"
            ) from None

    def value(self, name: str) -> Array | None:
        """A tensor that does not depend on the image; None when it does (or cannot be folded)."""
        if name not in self._values:
            self._values[name] = self._fold(name)
        return self._values[name]

    def input(self, node: onnx.NodeProto, index: int | None) -> str:
        """The name of a node's input; empty when it has none there."""
        return node.input[index] if index is not None and index < len(node.input) else ""

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None when several do, none, or it is an output."""
        consumers = self._consumers[name]
        return consumers[0] if len(consumers) == 1 and name not in self._outputs else None

    @staticmethod
    def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
        """An integer attribute."""
        return next((entry.i for entry in node.attribute if entry.name == name), default)

    def _fold(self, name: str) -> Array | None:
        if name in self._stored:
            array: Array = numpy_helper.to_array(self._stored[name])
            return array
        node = self._producer.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            entry = node.attribute[0]
            return numpy_helper.to_array(entry.t) if entry.name == "value" else None
        if node.op_type not in _FOLDABLE or node.domain not in ("", "ai.onnx"):
            return None
        feeds = {entry: self.value(entry) for entry in node.input if entry}
        if any(value is None for value in feeds.values()):
            return None
        # The reference implementation has no DequantizeLinear older than opset 19; same meaning.
        opset = max(self.opset, 21) if node.op_type == "DequantizeLinear" else self.opset
        step = helper.make_model(
            helper.make_graph(
                [node],
                "fold",
                [onnx.ValueInfoProto(name=entry) for entry in feeds],
                [onnx.ValueInfoProto(name=entry) for entry in node.output],
            ),
            opset_imports=[helper.make_opsetid("", opset)],
        )
        try:
            outputs: Any = ReferenceEvaluator(step).run([name], feeds)
        except Exception as error:
            raise HarnessError(f"constant {name!r} of the ONNX file is invalid: {error}") from error
        return np.asarray(outputs[0])


def _fix_shape(entry: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    dims = entry.type.tensor_type.shape.dim
    declared = [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
    if any(d not in (None, size) for d, size in zip(declared, shape, strict=True)):
        wanted = [size or "any" for size in declared]
        raise HarnessError(f"the ONNX file takes images {wanted}, not {list(shape)}")
    for dim, size in zip(dims, shape, strict=True):
        dim.dim_value = size

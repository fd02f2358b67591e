"""Questions about an ONNX file that was possibly made elsewhere: shapes, constants, neighbours.

Enters: bytes. Leaves: a `Graph` whose shapes are known for one image (`parse`), or as far as they
can be (`inspect`). Nothing is executed but the folding of constants (by onnx's reference
implementation), so that a packed weight can be counted as what it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.graph import Array
from harness.records import HarnessError

_FOLDABLE = frozenset(
    (
        "Abs", "Add", "Cast", "Ceil", "Clip", "DequantizeLinear", "Div", "Floor", "Gather",
        "GatherElements", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "QuantizeLinear",
        "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape",
        "Round", "Sign", "Slice", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
    )
)  # fmt: skip
"""What may stand between a stored tensor and the operator that uses it: packing, and what
fake-quantises weights."""
_BROADCASTING = frozenset(("Add", "Clip", "Div", "Max", "Min", "Mod", "Mul", "Pow", "Sub"))
_PER_AXIS = ("DequantizeLinear", "QuantizeLinear")
_NUMBERS = "biufc"
"""Kinds of numpy types that are folded: texts grow in places that no count of bytes sees."""
_MAX_FOLDED_ELEMENTS = 1 << 28
"""A table of a megabyte read at a million places is a small file and a tensor of terabytes."""
_MAX_FOLDED_BYTES = 2 << 30
"""Of all constants of one file together."""
_MAX_FOLDED_DEPTH = 100
"""Nodes between a stored tensor and its use; packed weights have six."""
_SUBGRAPHS = frozenset(("If", "Loop", "Scan"))


class Graph:
    """One ONNX model, its shapes inferred for a batch of one image."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.opset = opset_of(model)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values: dict[str, Array | None] = {"": None}
        self._folded_bytes = self._depth = 0
        self._producer = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._consumers[name].append(node)
        self._outputs = {output.name for output in model.graph.output}
        self._dynamic = _dynamic_tensors(model.graph)
        self._shapes = {name: tuple(tensor.dims) for name, tensor in self._stored.items()}
        self._element_types = {name: tensor.data_type for name, tensor in self._stored.items()}
        for info in (*model.graph.value_info, *model.graph.input, *model.graph.output):
            self._element_types.setdefault(info.name, info.type.tensor_type.elem_type)
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
        model = load_model(model_bytes)
        graph = model.graph
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

    @classmethod
    def inspect(cls, model: onnx.ModelProto) -> Graph:
        """A graph of any inputs, for a batch of one; what cannot be inferred stays unknown.

        `model` is left as it is.
        """
        single = onnx.ModelProto()
        single.CopyFrom(model)
        graph = single.graph
        stored = {tensor.name for tensor in graph.initializer}
        batch = {
            entry.type.tensor_type.shape.dim[0].dim_param
            for entry in graph.input
            if entry.name not in stored and entry.type.tensor_type.shape.dim
        }
        for info in (*graph.input, *graph.output, *graph.value_info):
            for dim in info.type.tensor_type.shape.dim[:1]:
                if not dim.HasField("dim_value") and dim.dim_param in batch:
                    dim.dim_value = 1
        try:
            single = onnx.shape_inference.infer_shapes(single, data_prop=True)
        except Exception:  # of C++, of many kinds; what the file itself says of shapes remains
            return cls(single)
        return cls(single)

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
            if self._depth >= _MAX_FOLDED_DEPTH:
                raise HarnessError(
                    f"constant {name!r} of the ONNX file is computed in too many steps"
                )
            self._depth += 1
            try:
                self._values[name] = self._fold(name)
            finally:
                self._depth -= 1
        return self._values[name]

    def shape_or_none(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor for one image, or None where it cannot be inferred."""
        try:
            return self.shape(name)
        except HarnessError:
            return None

    def constant(self, name: str) -> Array | None:
        """`value`, but None also for a constant that the file gets wrong."""
        try:
            return self.value(name)
        except HarnessError:
            return None

    def element_type(self, name: str) -> int:
        """`TensorProto.DataType` of a tensor; 0 (UNDEFINED) when nothing says it."""
        value = None if name in self._dynamic else self.constant(name)
        if value is not None:
            return int(helper.np_dtype_to_tensor_dtype(value.dtype))
        return int(self._element_types.get(name, onnx.TensorProto.UNDEFINED))

    def is_dynamic(self, name: str) -> bool:
        """Whether a tensor depends on what the model is given."""
        return name in self._dynamic

    def stored_tensors(self) -> Iterator[tuple[str, onnx.TensorProto]]:
        """Every tensor of the file: initializers, and the values of Constant nodes."""
        yield from self._stored.items()
        for node in self.nodes:
            for entry in node.attribute if node.op_type == "Constant" else ():
                if entry.name == "value" and node.output:
                    yield node.output[0], entry.t

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor; None for inputs and initializers."""
        return self._producer.get(name)

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor."""
        return self._consumers.get(name, [])

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
            return _stored_array(name, self._stored[name])
        node = self._producer.get(name)
        if node is None or name in self._dynamic:
            return None
        if node.op_type == "Constant":
            entry = node.attribute[0]
            return _stored_array(name, entry.t) if entry.name == "value" else None
        if node.op_type not in _FOLDABLE or node.domain not in ("", "ai.onnx"):
            return None
        feeds = {entry: self.value(entry) for entry in node.input if entry}
        if any(value is None for value in feeds.values()):
            return None
        known = [value for value in feeds.values() if value is not None]
        if any(value.dtype.kind not in _NUMBERS and not _is_small_float(value) for value in known):
            return None
        if known and _folded_elements(node, known) > _MAX_FOLDED_ELEMENTS:
            raise HarnessError(f"constant {name!r} of the ONNX file unpacks to too large a tensor")
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
            with np.errstate(all="ignore"):
                outputs: Any = ReferenceEvaluator(step).run([name], feeds)
        except Exception as error:
            raise HarnessError(f"constant {name!r} of the ONNX file is invalid: {error}") from error
        folded = np.asarray(outputs[0])
        self._folded_bytes += folded.nbytes
        if self._folded_bytes > _MAX_FOLDED_BYTES:
            raise HarnessError("the constants of the ONNX file unpack to too much memory")
        return folded


def load_model(model_bytes: bytes) -> onnx.ModelProto:
    """The model in a file's bytes; data that it keeps elsewhere is never read.

    Raises:
        HarnessError: not an ONNX model, or weights outside the file.
    """
    try:
        model = onnx.load_model_from_string(model_bytes)
    except Exception as error:  # protobuf's DecodeError; its package carries no types
        raise HarnessError(f"not an ONNX model: {' '.join(str(error).split())}") from error
    if not model.graph.node or not model.opset_import:
        raise HarnessError("not an ONNX model: it has no operators")
    if any(_is_external(tensor) for tensor in _tensors(model)):
        raise HarnessError("the ONNX file keeps weights outside itself: save it as one file")
    return model


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto, wherever in the model: attributes, subgraphs, functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def opset_of(model: onnx.ModelProto) -> int:
    """Of the standard operators; 0 for a model without them."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _dynamic_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that depend on an input; nodes come in topological order."""
    dynamic = {entry.name for entry in graph.input}
    dynamic -= {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        # Without an input: a constant, or a source of random numbers.
        source = not any(node.input) and node.op_type != "Constant"
        if source or node.op_type in _SUBGRAPHS or any(name in dynamic for name in node.input):
            dynamic.update(name for name in node.output if name)
    return dynamic


def _stored_array(name: str, tensor: onnx.TensorProto) -> Array:
    try:
        array: Array = numpy_helper.to_array(tensor)
    except Exception as error:  # too few bytes for its shape, a type numpy lacks, ...
        raise HarnessError(f"tensor {name!r} of the ONNX file is damaged: {error}") from error
    return array


def _is_small_float(value: Array) -> bool:
    """Numbers that numpy lacks, of `ml_dtypes`: bfloat16, 8-bit floats, 4-bit integers."""
    return value.dtype.kind == "V" and value.dtype.names is None


def _folded_elements(node: onnx.NodeProto, operands: list[Array]) -> int:
    """How many elements folding would make; 0 for operands that the operator will refuse."""
    first, *rest = operands
    axis = Graph.attribute(node, "axis", 1 if node.op_type in _PER_AXIS else 0)
    along = first.shape[axis] if -first.ndim <= axis < first.ndim else 1
    if node.op_type == "Gather" and rest:
        return rest[0].size * (first.size // max(along, 1))
    if node.op_type in _BROADCASTING and rest:
        try:
            return prod(np.broadcast_shapes(*(operand.shape for operand in operands)))
        except ValueError:
            return 0
    if node.op_type in _PER_AXIS and rest and along == 1:
        return first.size * rest[0].size
    return max(operand.size for operand in operands)


def _fix_shape(entry: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    dims = entry.type.tensor_type.shape.dim
    declared = [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
    if any(d not in (None, size) for d, size in zip(declared, shape, strict=True)):
        wanted = [size or "any" for size in declared]
        raise HarnessError(f"the ONNX file takes images {wanted}, not {list(shape)}")
    for dim, size in zip(dims, shape, strict=True):
        dim.dim_value = size

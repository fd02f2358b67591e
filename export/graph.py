"""What the float and the integer graph share: a builder of ONNX graphs, their first and last nodes.

Enters: numpy arrays and operator names. Leaves: a checked `onnx.ModelProto`, the same bytes for
the same calls. A node's output tensor has the node's name, so a trace of the file reads like the
model: `blocks.3.conv1`, `blocks.3.add`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 13
"""The lowest that has per-channel DequantizeLinear; every onnxruntime since 1.7 runs it."""
IR_VERSION = 7
"""The file-format version that came with opset 13."""
NOMINAL_BITS = "nominal_bits"
"""Metadata key: JSON {node name: [weight bits, activation bits]} of the compression method."""
IMAGE = "image"
LOGITS = "logits"

Array = npt.NDArray[Any]
NominalBits = dict[str, tuple[int, int]]


class GraphBuilder:
    """Nodes and constants in the order they are added."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, Array] = {}

    def constant(self, name: str, value: Array) -> str:
        """An initializer; asking again for the same name and value shares it.

        Raises:
            ValueError: the name is taken by another value.
        """
        known = self._constants.setdefault(name, value)
        if known is not value and not (known.dtype == value.dtype and np.array_equal(known, value)):
            raise ValueError(f"two different constants are called {name!r}")
        return name

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, output: str = "", **attributes: Any
    ) -> str:
        """Append an operator; returns its output tensor, named like the node unless given."""
        output = output or name
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def centred_image(self, mean_255: Array) -> str:
        """Pixels minus the mean, as float32; `mean_255` [1, C, 1, 1] in pixel units."""
        pixels = self.node("Cast", [IMAGE], "pixels", to=TensorProto.FLOAT)
        mean = self.constant("mean_255", np.asarray(mean_255, dtype=np.float32))
        return self.node("Sub", [pixels, mean], "centred")

    def classify(self, features: str, weight: str, bias: Array) -> None:
        """Global average pool and the last layer; `weight` names a tensor [classes, features]."""
        pooled = self.node("GlobalAveragePool", [features], "pool")
        flat = self.node("Flatten", [pooled], "flatten")
        self.node(
            "Gemm",
            [flat, weight, self.constant("fc.bias", bias)],
            "fc",
            output=LOGITS,
            transB=1,
        )

    def finish(
        self, *, classes: int, metadata: Mapping[str, str], nominal_bits: NominalBits
    ) -> onnx.ModelProto:
        """The model: image uint8 [N, C, H, W] -> logits float32 [N, classes], any N.

        Raises:
            ValueError: `metadata` uses a key that this package writes itself.
            onnx.checker.ValidationError: the graph is not valid ONNX.
        """
        if NOMINAL_BITS in metadata:
            raise ValueError(f"metadata key {NOMINAL_BITS!r} is reserved")
        image = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["N", *self.image_shape])
        logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", classes])
        graph = helper.make_graph(
            self._nodes,
            "classifier",
            [image],
            [logits],
            # from_array stores raw bytes: a repeated field would cost up to ten bytes a weight.
            [numpy_helper.from_array(value, name) for name, value in self._constants.items()],
        )
        model = helper.make_model(
            graph,
            producer_name="uap-edge-harness",
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        properties = {**metadata, NOMINAL_BITS: json.dumps(nominal_bits, sort_keys=True)}
        helper.set_model_props(model, dict(sorted(properties.items())))
        onnx.checker.check_model(model, full_check=True)
        return model


def serialise(model: onnx.ModelProto) -> bytes:
    """The file's bytes; the same model gives the same bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def conv_attributes(*, kernel: int, stride: int, padding: int) -> dict[str, Any]:
    """ONNX attributes of a square convolution."""
    return {
        "kernel_shape": [kernel, kernel],
        "strides": [stride, stride],
        "pads": [padding] * 4,
    }

"""The layers of an integer network as ONNX nodes.

Enters: layers of the twin. Leaves: their nodes in a `GraphBuilder`, computing the same codes bit
for bit (FACTS E), in explicit QLinearConv and ConvInteger: a QDQ graph would be exact only where
the runtime's optimiser happens to fuse it.

A quantiser is Sub(quarter unit), QuantizeLinear(half unit) - the "codes" - and a 256-entry table -
the "levels". The table is read by GatherElements on the flattened tensor, six times faster than
Gather (FACTS E).

Every hidden convolution has several exact forms: the integer convolution (QLinearConv or
ConvInteger); where the result is float, an integer matrix product over gathered patches, because
the runtime's ConvInteger has no u8 x s8 kernel and its matrix product has; and a float convolution
over the same whole numbers, whose sums stay below 2^24. Which is fastest depends on shape and
processor, so it is chosen by measurement (`export.tuning`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from onnx import TensorProto
from torch import Tensor

from export.graph import Array, GraphBuilder, NominalBits, conv_attributes
from export.packing import packed_constant
from harness.models.integer import (
    ActivationQuantiser,
    IntegerBlock,
    IntegerConv,
    LevelTable,
    RequantisedConv,
    RescaledConv,
)

_EIGHT_BITS = (8, 8)
_UINT8_MIDDLE = 128
"""ConvInteger is seven times slower on int8 weights than on uint8 with this zero point."""


Kernel = Literal["integer", "matmul", "float"]
"""The form a hidden convolution takes in the file; all compute the same whole numbers."""
_MATMUL_CHANNELS = 32
"""Unmeasured, fewer input channels go to ConvInteger: gathering short runs of bytes costs more than
the faster product saves (docs/adr/0006)."""


def forms_of(layer: RequantisedConv | RescaledConv) -> tuple[Kernel, ...]:
    """The forms this layer can take."""
    if isinstance(layer, RequantisedConv):
        return ("integer", "float")
    return ("integer", "matmul", "float")


def default_form(layer: RequantisedConv | RescaledConv) -> Kernel:
    """The form it takes where nothing was measured."""
    wide = layer.conv.weight.shape[1] >= _MATMUL_CHANNELS
    return "matmul" if wide and "matmul" in forms_of(layer) else "integer"


class Features(NamedTuple):
    """A tensor [N, channels, height, width] of the graph."""

    tensor: str
    channels: int
    height: int
    width: int


@dataclass
class Levels:
    """Integer activations, written as uint8 or as float when a convolution first asks."""

    name: str
    shape: Features
    table: LevelTable
    index: str
    """The flat int32 codes that the table is read at."""
    written: dict[Literal["uint8", "float"], str] = field(default_factory=dict)


class IntegerWriter:
    """Appends the twin's layers to a graph, noting each layer's nominal bits."""

    def __init__(
        self,
        graph: GraphBuilder,
        hidden_bits: int,
        *,
        packed: bool,
        kernels: Mapping[str, Kernel],
    ) -> None:
        self.graph = graph
        self.bits: NominalBits = {}
        self._hidden_bits = (hidden_bits, hidden_bits)
        self._kernels = kernels
        self._weight: Callable[[str, Array], str] = (
            (lambda name, value: packed_constant(graph, name, value)) if packed else graph.constant
        )

    def stem(self, stem: RescaledConv, x: Features) -> Features:
        """Float convolution of whole numbers: QLinearConv at 8 x 8 bits would saturate AVX2."""
        graph = self.graph
        self.bits["stem"] = _EIGHT_BITS
        stored = graph.constant("stem.weight.int8", stem.conv.weight_int8())
        weight = graph.node("Cast", [stored], "stem.weight", to=TensorProto.FLOAT)
        sums = graph.node("Conv", [x.tensor, weight], "stem", **_attributes(stem.conv))
        # A fast convolution algorithm may leave the sums a little off whole numbers.
        whole = graph.node("Round", [sums], "stem.whole")
        shifted = self._rescale(stem, whole, "stem")
        return convolved(graph.node("Relu", [shifted], "stem.relu"), x, stem.conv)

    def block(self, block: IntegerBlock, x: Features, name: str) -> Features:
        graph = self.graph
        levels = self.quantise(block.quantise, x, f"{name}.quantise")
        hidden = self.requantised(block.conv1, levels, f"{name}.conv1")
        y = self.rescaled(block.conv2, hidden, f"{name}.conv2")
        skip = x
        if block.shortcut is not None and block.quantise_shortcut is not None:
            if not same_quantiser(block.quantise, block.quantise_shortcut):
                levels = self.quantise(block.quantise_shortcut, x, f"{name}.quantise_shortcut")
            skip = self.rescaled(block.shortcut, levels, f"{name}.shortcut")
        added = graph.node("Add", [y.tensor, skip.tensor], f"{name}.add")
        return y._replace(tensor=graph.node("Relu", [added], f"{name}.relu"))

    def quantise(self, quantiser: ActivationQuantiser, x: Features, name: str) -> Levels:
        graph = self.graph
        quarter = graph.constant(f"{name}.quarter_unit", as_array(quantiser.quarter_unit))
        half = graph.constant(f"{name}.half_unit", as_array(quantiser.half_unit))
        shifted = graph.node("Sub", [x.tensor, quarter], f"{name}.shifted")
        codes = graph.node("QuantizeLinear", [shifted, half, self._zero()], f"{name}.codes")
        return self._look_up(quantiser.levels, x._replace(tensor=codes), name)

    def _look_up(self, table: LevelTable, codes: Features, name: str) -> Levels:
        graph = self.graph
        flat = graph.constant("shape.flat", np.array([-1], dtype=np.int64))
        index = graph.node("Reshape", [codes.tensor, flat], f"{name}.flat")
        index = graph.node("Cast", [index], f"{name}.index", to=TensorProto.INT32)
        return Levels(name, codes, table, index)

    def as_read_by(self, levels: Levels, kernel: Kernel) -> str:
        """The tensor of integer activations that a convolution of this form reads."""
        dtype: Literal["uint8", "float"] = "float" if kernel == "float" else "uint8"
        if dtype in levels.written:
            return levels.written[dtype]
        graph, table = self.graph, levels.table
        name = f"{levels.name}.levels"
        if levels.written:  # in the other type: forms of both read this tensor
            (other,) = levels.written.values()
            to = TensorProto.FLOAT if dtype == "float" else TensorProto.UINT8
            tensor = graph.node("Cast", [other], f"{name}.{dtype}", to=to)
        else:
            entries = graph.constant(
                f"levels.{table.bits}bit.{dtype}",
                as_array(table.table).astype(np.float32 if dtype == "float" else np.uint8),
            )
            # The shape comes back from constants: only N is dynamic.
            shape = self._shape(*levels.shape[1:])
            inputs = [entries, levels.index]
            found = graph.node("GatherElements", inputs, f"{levels.name}.looked_up", axis=0)
            tensor = graph.node("Reshape", [found, shape], name)
        levels.written[dtype] = tensor
        return tensor

    def requantised(self, layer: RequantisedConv, x: Levels, name: str) -> Levels:
        """Levels -> levels; the batch norm and the quarter unit live in scale and bias."""
        graph, output = self.graph, layer.output
        self.bits[name] = self._hidden_bits
        codes = f"{name}.codes"
        kernel = self._kernels.get(name) or default_form(layer)
        activations = self.as_read_by(x, kernel)
        if kernel == "float":
            sums = self._float_sums(layer.conv, activations, name)
            whole = graph.constant(f"{name}.multiplier", np.array(layer.multiplier, np.float32))
            bias = graph.constant(f"{name}.bias", as_array(layer.bias))
            gain = graph.constant(f"{name}.gain", as_array(layer.gain))
            step = graph.node("Mul", [sums, whole], f"{name}.multiplied")
            step = graph.node("Add", [step, bias], f"{name}.biased")
            step = graph.node("Mul", [step, gain], f"{name}.half_units")
            one = graph.constant("one", np.array(1, dtype=np.float32))
            graph.node(
                "QuantizeLinear", [step, one, self._zero()], f"{name}.quantised", output=codes
            )
        else:
            weight = layer.conv.weight_int8() * np.int8(layer.multiplier)
            inputs = [
                activations,
                graph.constant(f"{name}.input_unit", np.array(layer.input_unit, dtype=np.float32)),
                self._zero(),
                self._weight(f"{name}.weight", weight),
                graph.constant(f"{name}.weight_scale", layer.weight_scale),
                graph.constant(f"zeros.{len(weight)}", np.zeros(len(weight), dtype=np.int8)),
                graph.constant(f"{name}.half_unit", as_array(output.half_unit)),
                self._zero(),
                graph.constant(f"{name}.bias", layer.bias_int32()),
            ]
            graph.node("QLinearConv", inputs, name, output=codes, **_attributes(layer.conv))
        shape = convolved(codes, x.shape, layer.conv)
        return self._look_up(output.levels, shape, name)

    def rescaled(self, layer: RescaledConv, x: Levels, name: str) -> Features:
        """Levels -> float: exact sums, then one scale and one shift per channel."""
        graph = self.graph
        self.bits[name] = self._hidden_bits
        kernel = self._kernels.get(name) or default_form(layer)
        activations = self.as_read_by(x, kernel)
        shape = convolved("", x.shape, layer.conv)
        if kernel == "float":
            sums = self._float_sums(layer.conv, activations, name)
        else:
            whole = (
                self._product_sums(layer.conv, x.shape._replace(tensor=activations), shape, name)
                if kernel == "matmul"
                else self._integer_sums(layer.conv, activations, name)
            )
            sums = graph.node("Cast", [whole], f"{name}.float", to=TensorProto.FLOAT)
        return shape._replace(tensor=self._rescale(layer, sums, name))

    def _integer_sums(self, conv: IntegerConv, activations: str, name: str) -> str:
        weight = (conv.weight_int8().astype(np.int16) + _UINT8_MIDDLE).astype(np.uint8)
        inputs = [
            activations,
            self._weight(f"{name}.weight", weight),
            self._zero(),
            self.graph.constant("middle.uint8", np.array(_UINT8_MIDDLE, dtype=np.uint8)),
        ]
        return self.graph.node("ConvInteger", inputs, name, **_attributes(conv))

    def _product_sums(self, conv: IntegerConv, x: Features, y: Features, name: str) -> str:
        """Convolution as MatMulInteger: every output pixel's patch is a row, channels innermost."""
        graph = self.graph
        _, channels, size, _ = conv.weight.shape
        rows = graph.node("Transpose", [x.tensor], f"{name}.channels_last", perm=[0, 2, 3, 1])
        if conv.padding:
            pads = [0, conv.padding, conv.padding, 0] * 2
            around = graph.constant(f"pads.{conv.padding}", np.array(pads, dtype=np.int64))
            rows = graph.node("Pad", [rows, around, self._zero()], f"{name}.padded")
        # Column by column, then row by row: the second pass copies runs `size` times as long.
        rows = self._shifted(rows, axis=2, size=size, stride=conv.stride, count=y.width, name=name)
        rows = self._shifted(rows, axis=1, size=size, stride=conv.stride, count=y.height, name=name)
        patches = graph.node(
            "Reshape", [rows, self._shape(size * size * channels)], f"{name}.patches"
        )
        weight = conv.weight_int8().transpose(2, 3, 1, 0).reshape(-1, y.channels)
        stored = self._weight(f"{name}.weight", np.ascontiguousarray(weight))
        sums = graph.node("MatMulInteger", [patches, stored], name)
        shape = self._shape(y.height, y.width, y.channels)
        sums = graph.node("Reshape", [sums, shape], f"{name}.pixels")
        return graph.node("Transpose", [sums], f"{name}.channels_first", perm=[0, 3, 1, 2])

    def _shifted(
        self, tensor: str, *, axis: int, size: int, stride: int, count: int, name: str
    ) -> str:
        """What each of `size` kernel positions meets along `axis`, side by side as channels."""
        if size == stride == 1:
            return tensor
        graph, side = self.graph, f"{name}.{('rows', 'columns')[axis - 1]}"
        parts = []
        for first in range(size):
            bounds = [
                graph.constant(f"slice.{value}", np.array([value], dtype=np.int64))
                for value in (first, first + stride * (count - 1) + 1, axis, stride)
            ]
            parts.append(graph.node("Slice", [tensor, *bounds], f"{side}.{first}"))
        return parts[0] if size == 1 else graph.node("Concat", parts, side, axis=3)

    def _float_sums(self, conv: IntegerConv, activations: str, name: str) -> str:
        """Float convolution of whole numbers: exact while sums stay below 2^24."""
        graph = self.graph
        stored = self._weight(f"{name}.weight.int8", conv.weight_int8())
        weight = graph.node("Cast", [stored], f"{name}.weight", to=TensorProto.FLOAT)
        sums = graph.node("Conv", [activations, weight], name, **_attributes(conv))
        # Without it the runtime folds the scale that follows into the weights: no longer whole.
        return graph.node("Round", [sums], f"{name}.whole")

    def _rescale(self, layer: RescaledConv, sums: str, name: str) -> str:
        graph = self.graph
        scale = graph.constant(f"{name}.scale", as_array(layer.scale))
        shift = graph.constant(f"{name}.shift", as_array(layer.shift))
        scaled = graph.node("Mul", [sums, scale], f"{name}.scaled")
        return graph.node("Add", [scaled, shift], f"{name}.shifted")

    def _shape(self, *dims: int) -> str:
        """A constant [-1, *dims]: only N is dynamic."""
        name = "shape.Nx" + "x".join(map(str, dims))
        return self.graph.constant(name, np.array([-1, *dims], dtype=np.int64))

    def _zero(self) -> str:
        return self.graph.constant("zero.uint8", np.array(0, dtype=np.uint8))


def same_quantiser(one: ActivationQuantiser, other: ActivationQuantiser) -> bool:
    return bool(one.unit == other.unit) and one.levels.bits == other.levels.bits


def _attributes(conv: IntegerConv) -> dict[str, Any]:
    return conv_attributes(kernel=conv.weight.shape[-1], stride=conv.stride, padding=conv.padding)


def convolved(tensor: str, x: Features, conv: IntegerConv) -> Features:
    """The shape that `conv` gives to `x`."""
    channels, _, kernel, _ = conv.weight.shape
    height, width = (
        (size + 2 * conv.padding - kernel) // conv.stride + 1 for size in (x.height, x.width)
    )
    return Features(tensor, channels, height, width)


def as_array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array

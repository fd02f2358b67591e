"""Integer weights on disk at few bits: several to a code, unpacked by the graph itself.

Enters: an integer tensor of few distinct values. Leaves: an initializer of codes and the standard
operators that turn it back into the tensor, so that any onnxruntime reads the file. The runtime
folds them when it loads the model: packing saves disk and download, not memory (FACTS E).

A tensor of L distinct values is a string of digits in base L; a code is a whole number of k
digits. Three values need 1.6 bits (five to a byte), seven 3.2 (five to two bytes), fifteen 4
(two to a byte): less than 2, 3 and 4-bit tensor types would take, without a type that only recent
runtimes know.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.graph import Array, GraphBuilder

_CODE_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16))
_MIN_SAVING_BYTES = 1024
"""The operators that unpack a tensor take a few hundred bytes of the file themselves."""


@dataclass(frozen=True)
class Code:
    """How many digits of which base go into one stored integer."""

    base: int
    digits: int
    dtype: np.dtype[np.uint8] | np.dtype[np.uint16]

    @property
    def bits_per_value(self) -> float:
        """Storage per weight."""
        return 8 * self.dtype.itemsize / self.digits

    def pack(self, digits: Array) -> Array:
        """Digits [n], each below the base -> codes [ceil(n / digits)], most significant first."""
        padded = np.zeros(-(-digits.size // self.digits) * self.digits, dtype=np.int64)
        padded[: digits.size] = digits
        weights = self.base ** np.arange(self.digits)[::-1]
        codes: Array = (padded.reshape(-1, self.digits) * weights).sum(axis=1)
        return codes.astype(self.dtype)


def code_for(base: int) -> Code:
    """The densest code of `base` values; the narrower type when two are equally dense.

    Raises:
        ValueError: fewer than two or more than 256 values.
    """
    if not 2 <= base <= 256:
        raise ValueError(f"{base} distinct values cannot be packed: 2 to 256 can")
    codes = []
    for dtype in _CODE_TYPES:
        digits = 1
        while base ** (digits + 1) <= 256**dtype.itemsize:
            digits += 1
        codes.append(Code(base, digits, dtype))
    return min(codes, key=lambda code: code.bits_per_value)


def packed_constant(graph: GraphBuilder, name: str, value: Array) -> str:
    """The tensor `name`, stored packed where that saves, plain where it does not.

    Args:
        graph: gets the initializers and, for a packed tensor, the nodes that unpack it.
        name: of the tensor; nodes and initializers of the packing start with it.
        value: integers; their distinct values become the digits.
    """
    levels, digits = np.unique(value, return_inverse=True)
    if not 2 <= levels.size <= 256:
        return graph.constant(name, value)
    code = code_for(levels.size)
    codes = code.pack(digits.reshape(-1))
    if value.nbytes - codes.nbytes < _MIN_SAVING_BYTES:
        return graph.constant(name, value)
    suffix = f"{code.base}.{code.digits}"
    base = graph.constant(f"pack.base.{code.base}", np.array(code.base, dtype=np.int32))
    powers = code.base ** np.arange(code.digits)[::-1]
    place = graph.constant(f"pack.places.{suffix}", powers.astype(np.int32))
    flat = graph.constant("shape.flat", np.array([-1], dtype=np.int64))
    column = graph.constant("shape.column", np.array([-1, 1], dtype=np.int64))
    stored = graph.constant(f"{name}.codes", codes)
    step = graph.node("Cast", [stored], f"{name}.int32", to=TensorProto.INT32)
    step = graph.node("Reshape", [step, column], f"{name}.column")
    step = graph.node("Div", [step, place], f"{name}.shifted")
    step = graph.node("Mod", [step, base], f"{name}.digits")
    step = graph.node("Reshape", [step, flat], f"{name}.flat")
    if codes.size * code.digits > value.size:
        step = _first(graph, step, value.size, f"{name}.unpadded")
    table = graph.constant(f"{name}.levels", levels)
    step = graph.node("GatherElements", [table, step], f"{name}.values", axis=0)
    shape = "shape." + "x".join(str(size) for size in value.shape)
    graph.constant(shape, np.array(value.shape, dtype=np.int64))
    return graph.node("Reshape", [step, shape], name)


def _first(graph: GraphBuilder, tensor: str, count: int, name: str) -> str:
    start = graph.constant("slice.start", np.array([0], dtype=np.int64))
    end = graph.constant(f"slice.{count}", np.array([count], dtype=np.int64))
    return graph.node("Slice", [tensor, start, end], name)

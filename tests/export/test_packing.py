"""Packed weights come back exactly, through onnxruntime and through the reader of cost cards."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.graph import Array, GraphBuilder, serialise
from export.onnx_reader import Graph
from export.packing import Code, code_for, packed_constant
from export.runtime import RunSettings, open_session

IMAGE_SHAPE = (1, 2, 2)


def model_of(value: Array) -> onnx.ModelProto:
    """A classifier that also returns the tensor `weight`, stored as `packed_constant` decides."""
    graph = GraphBuilder(IMAGE_SHAPE)
    features = graph.centred_image(np.zeros((1, 1, 1, 1)))
    packed_constant(graph, "weight", value)
    graph.classify(
        features, graph.constant("w", np.ones((2, 1), np.float32)), np.zeros(2, np.float32)
    )
    model = graph.finish(classes=2, metadata={}, nominal_bits={})
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    model.graph.node.append(helper.make_node("Identity", ["weight"], ["out"], name="out"))
    model.graph.output.append(helper.make_tensor_value_info("out", kind, value.shape))
    return model


def came_back(model: onnx.ModelProto, *, optimise: bool) -> Array:
    session = open_session(serialise(model), RunSettings(optimise=optimise))
    (value,) = session.run(["out"], {"image": np.zeros((1, *IMAGE_SHAPE), np.uint8)})
    result: Array = value
    return result


# Two to fifteen levels are what APoT has; beyond, any byte.
tensors = st.tuples(
    st.sampled_from([np.int8, np.uint8]),
    st.integers(2, 40),
    st.lists(st.integers(1, 17), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=60, deadline=None)
@given(tensors, st.booleans())
def test_every_tensor_comes_back_bit_for_bit(
    case: tuple[type, int, list[int], int], optimise: bool
) -> None:
    dtype, n_levels, shape, seed = case
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    levels = rng.choice(np.arange(info.min, info.max + 1), n_levels, replace=False).astype(dtype)
    value = rng.choice(levels, (*shape, 40))
    model = model_of(value)
    result = came_back(model, optimise=optimise)
    assert result.dtype == value.dtype
    np.testing.assert_array_equal(result, value)
    read = Graph.parse(serialise(model_of(value)), image_shape=IMAGE_SHAPE).value("weight")
    np.testing.assert_array_equal(read, value)


@pytest.mark.parametrize(
    ("base", "digits", "bytes_per_code"),
    # 3^5 = 243, 7^5 = 16,807, 15^2 = 225: the densest that fit one or two bytes.
    [(2, 8, 1), (3, 5, 1), (7, 5, 2), (15, 2, 1), (16, 2, 1), (17, 3, 2), (256, 1, 1)],
)
def test_the_densest_code(base: int, digits: int, bytes_per_code: int) -> None:
    code = code_for(base)
    assert (code.digits, code.dtype.itemsize) == (digits, bytes_per_code)
    assert code.bits_per_value >= math.log2(base)


def test_codes_by_hand() -> None:
    digits = np.array([2, 0, 1, 2, 1, 1])
    # 2*81 + 0*27 + 1*9 + 2*3 + 1 = 178; the last byte is 1*81, padded with zeros.
    packed = Code(3, 5, np.dtype(np.uint8)).pack(digits)
    assert packed.tolist() == [178, 81]
    assert packed.dtype == np.uint8


@pytest.mark.parametrize("base", [0, 1, 257])
def test_what_cannot_be_packed_is_refused(base: int) -> None:
    with pytest.raises(ValueError, match="2 to 256"):
        code_for(base)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((64, 64, 3, 3), np.int8),  # one value: nothing to tell apart
        np.arange(256, dtype=np.uint8).repeat(64),  # no redundancy
        np.tile(np.array([0, 1], np.int8), 100),  # too small to pay for the unpacking
    ],
)
def test_a_tensor_that_packing_would_not_shrink_stays_plain(value: Array) -> None:
    model = model_of(value)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert "weight" in stored
    assert stored["weight"].data_type in (TensorProto.INT8, TensorProto.UINT8)
    np.testing.assert_array_equal(came_back(model, optimise=True), value)

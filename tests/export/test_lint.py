"""Every rule on graphs small enough to count by hand: where it speaks, and where it must not."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_cases import IMAGE_SHAPE, masked, pruned, trained, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from lint_cases import FLOAT, S8, S8_ZERO, U8, U8_ZERO, found, model, node, one
from onnx import TensorProto, helper

from devices.model_file import MAX_MODEL_BYTES as DEVICE_LIMIT
from export.float_graph import float_graph
from export.integer_graph import integer_graph
from export.lint import MAX_MODEL_BYTES, lint, lint_file
from export.lint_products import worst_pairs
from export.packing import code_for
from export.saturation import saturation_margins
from export.slim import slim
from harness.models.folded import fold
from harness.records import UsageError

ONE = np.float32(1)


def weights(*shape: int, of: int = 0, dtype: type = np.int8) -> np.ndarray:
    return np.full(shape, of, dtype=dtype)


# --- saturation ----------------------------------------------------------------------------------

Q = {"s": ONE, "xz": U8_ZERO, "wz": S8_ZERO}


def qlinear_conv(weight: np.ndarray, *, group: int = 1, channels: int = 3) -> onnx.ModelProto:
    conv = node("QLinearConv", "image s xz w s wz s xz", "logits", group=group)
    shape = ("N", channels, 8, 8)
    return model([conv], {"w": weight, **Q}, shape=shape, output_kind=U8, output_shape=None)


def test_saturation_counts_the_filters_that_can_pass_int16() -> None:
    weight = weights(4, 3, 1, 1)
    weight[0, :, 0, 0] = (64, 64, 1)  # 255 * 128 = 32,640 fits
    weight[1, :, 0, 0] = (64, 1, 65)  # 255 * 129 = 32,895, neighbours or not
    weight[2, :, 0, 0] = (-64, -64, 127)  # opposite signs never add up
    weight[3, :, 0, 0] = (-65, 0, -64)
    finding = one(qlinear_conv(weight), "saturation")
    assert finding.severity == "error"
    assert finding.node == "logits"
    assert finding.numbers == {
        "largest_pair_sum": 32_895,
        "limit": 32_767,
        "filters_over": 2,
        "filters": 4,
        "input_max": 255,
        "input_min": 0,
    }
    assert "2 of 4 filters" in finding.cost
    assert "x64quantprecision" in finding.remedy
    weight[[1, 3]] = 0
    assert not found(qlinear_conv(weight), "saturation")


def test_one_product_alone_fits() -> None:
    assert not found(qlinear_conv(weights(8, 1, 1, 1, of=-128), channels=1), "saturation")


def test_unsigned_weights_do_not_saturate() -> None:
    conv = node("QLinearConv", "image s xz w s xz s xz", "logits")
    built = model([conv], {"w": weights(4, 3, 3, 3, of=255, dtype=np.uint8), **Q},
                  output_kind=U8, output_shape=None)  # fmt: skip
    assert not found(built, "saturation")


def test_depthwise_has_an_exact_kernel_unless_it_multiplies_channels() -> None:
    """As an emulated AVX2 without VNNI showed."""
    assert not found(qlinear_conv(weights(3, 1, 3, 3, of=127), group=3), "saturation")
    assert one(qlinear_conv(weights(6, 1, 3, 3, of=127), group=3), "saturation")


@pytest.mark.parametrize(("top", "saturates"), [(48, False), (128, False), (129, True)])
def test_a_table_bounds_the_activations(top: int, saturates: bool) -> None:
    """-128 * 2 * 128 = -32,768 is int16's lowest; 129 passes it."""
    nodes = [
        node("Reshape", "image flat", "f"),
        node("Cast", "f", "index", to=TensorProto.INT32),
        node("GatherElements", "table index", "values", axis=0),
        node("Reshape", "values shape", "levels"),
        node("QLinearConv", "levels s xz w s wz s xz", "logits"),
    ]
    constants = {
        "flat": np.array([-1]),
        "shape": np.array([-1, 3, 8, 8]),
        "table": np.linspace(0, top, 256).astype(np.uint8),
        "w": weights(2, 3, 3, 3, of=-128),
        **Q,
    }
    built = model(nodes, constants, output_kind=U8, output_shape=None)
    assert bool(found(built, "saturation")) == saturates
    constants["xz"] = np.uint8(255)  # padding is the zero point, whatever the table holds
    built = model(nodes, constants, output_kind=U8, output_shape=None)
    assert one(built, "saturation").numbers["input_max"] == 255


@pytest.mark.parametrize(("top", "bounded"), [(48.0, True), (48.5, False), (300.0, False)])
def test_a_table_of_floats_bounds_them_only_where_the_cast_keeps_its_values(
    top: float, bounded: bool
) -> None:
    nodes = [
        node("Reshape", "image flat", "f"),
        node("Cast", "f", "index", to=TensorProto.INT32),
        node("GatherElements", "table index", "values", axis=0),
        node("Reshape", "values shape", "floats"),
        node("Cast", "floats", "levels", to=U8),
        node("QLinearConv", "levels s xz w s wz s xz", "logits"),
    ]
    constants = {
        "flat": np.array([-1]),
        "shape": np.array([-1, 3, 8, 8]),
        "table": np.array([0.0] * 255 + [top], dtype=np.float32),
        "w": weights(2, 3, 3, 3, of=127),
        **Q,
    }
    built = model(nodes, constants, output_kind=U8, output_shape=None)
    assert bool(found(built, "saturation")) != bounded


def test_convinteger_multiplies_the_other_way_round() -> None:
    """Its weights are the left operand: unsigned ones saturate, with signed activations."""

    def conv_integer(kind: int, weight: np.ndarray) -> onnx.ModelProto:
        return model([node("ConvInteger", "image w", "logits")], {"w": weight}, kind=kind,
                     output_kind=TensorProto.INT32, output_shape=None)  # fmt: skip

    finding = one(conv_integer(S8, weights(2, 3, 3, 3, of=255, dtype=np.uint8)), "saturation")
    assert finding.numbers["largest_pair_sum"] == 2 * 128 * 255
    assert "x64quantprecision" not in finding.remedy
    assert not found(conv_integer(S8, weights(2, 3, 3, 3, of=127, dtype=np.uint8)), "saturation")
    assert not found(conv_integer(U8, weights(2, 3, 3, 3, of=127)), "saturation")
    assert not found(conv_integer(U8, weights(2, 3, 3, 3, of=255, dtype=np.uint8)), "saturation")


COLUMNS = weights(16, 4)
COLUMNS[:2, 1] = 127  # one column adds two large products; every row has at most one
MATMULS = {
    "MatMulInteger": node("MatMulInteger", "image w", "logits"),
    "QLinearMatMul": node("QLinearMatMul", "image s xz w s wz s xz", "logits"),
    "QGemm": node("QGemm", "image s xz w s wz", "logits", domain="com.microsoft"),
    "MatMulIntegerToFloat": node(
        "MatMulIntegerToFloat", "image w s s xz wz", "logits", domain="com.microsoft"
    ),
    "DynamicQuantizeMatMul": node(
        "DynamicQuantizeMatMul", "image w s wz", "logits", domain="com.microsoft"
    ),
}


@pytest.mark.parametrize("op", MATMULS)
def test_matrix_products_sum_along_columns(op: str) -> None:
    kind = FLOAT if op.startswith("Dynamic") else U8

    def built(weight: np.ndarray) -> onnx.ModelProto:
        # Types that are not those of the operator's output are not looked at.
        outputs = {"MatMulInteger": TensorProto.INT32, "QLinearMatMul": U8}
        return model([MATMULS[op]], {"w": weight, **Q}, kind=kind, shape=("N", 16),
                     output_kind=outputs.get(op, FLOAT), output_shape=None)  # fmt: skip

    finding = one(built(COLUMNS), "saturation")
    assert (finding.numbers["filters_over"], finding.numbers["filters"]) == (1, 4)
    assert finding.numbers["largest_pair_sum"] == 2 * 255 * 127
    assert not found(built(np.ascontiguousarray(COLUMNS.T)), "saturation")


def qdq(op: str, weight: np.ndarray, *, after: str = "", **attributes: object) -> onnx.ModelProto:
    nodes = [
        node("DequantizeLinear", "image s xz", "x"),
        node("DequantizeLinear", "w s wz", "weight"),
        node(op, "x weight", "y", **attributes),
    ]
    last = "y"
    for step in after.split():
        inputs = f"{last} s xz" if step == "QuantizeLinear" else last
        nodes.append(node(step, inputs, f"{last}.{step}"))
        last = f"{last}.{step}"
    kind = U8 if after.endswith("QuantizeLinear") else FLOAT
    shape = ("N", 3, 8, 8) if op == "Conv" else ("N", 16)
    return model(nodes, {"w": weight, **Q}, shape=shape, output=last, output_kind=kind,
                 output_shape=None)  # fmt: skip


@pytest.mark.parametrize(
    ("op", "after", "saturates"),
    [
        ("Conv", "QuantizeLinear", True),
        ("Conv", "Relu QuantizeLinear", True),
        ("Conv", "", False),  # stays a float convolution
        ("Conv", "HardSigmoid QuantizeLinear", False),
        ("MatMul", "", True),
        ("Gemm", "", True),
        ("Gemm", "QuantizeLinear", True),
    ],
)
def test_what_the_runtime_fuses_to_integers(op: str, after: str, saturates: bool) -> None:
    weight = weights(4, 3, 3, 3, of=127) if op == "Conv" else COLUMNS
    assert bool(found(qdq(op, weight, after=after), "saturation")) == saturates


def test_transposed_gemm_sums_along_rows() -> None:
    transposed = np.ascontiguousarray(COLUMNS.T)
    assert found(qdq("Gemm", transposed, transB=1), "saturation")
    assert not found(qdq("Gemm", np.ascontiguousarray(COLUMNS.T[:, :4]), transB=1), "nothing")
    square = weights(16, 16)
    square[:2, 1] = 127
    assert found(qdq("Gemm", square), "saturation")
    assert not found(qdq("Gemm", square, transB=1), "saturation")


@given(
    st.integers(1, 7).flatmap(
        lambda terms: st.lists(
            st.lists(st.integers(-128, 127), min_size=terms, max_size=terms),
            min_size=1,
            max_size=4,
        )
    ),
    st.integers(-128, 0),
    st.integers(0, 255),
)
@settings(deadline=None)
def test_worst_pairs_are_those_of_all_pairs(rows: list[list[int]], low: int, high: int) -> None:
    for row, (lowest, highest) in zip(
        rows, worst_pairs(np.array(rows, dtype=np.int8), low, high).tolist(), strict=True
    ):
        products = [(w * low, w * high) for w in row]
        pairs = [
            (min(a) + min(b), max(a) + max(b))
            for i, a in enumerate(products)
            for b in products[i + 1 :]
        ] or [(min(p), max(p)) for p in products]
        assert (lowest, highest) == (min(p[0] for p in pairs), max(p[1] for p in pairs))


# --- slow forms ----------------------------------------------------------------------------------


def test_convinteger_with_int8_weights() -> None:
    conv = node("ConvInteger", "image w", "logits")

    def built(dtype: type) -> onnx.ModelProto:
        return model([conv], {"w": weights(4, 3, 3, 3, of=1, dtype=dtype)},
                     output_kind=TensorProto.INT32, output_shape=None)  # fmt: skip

    finding = one(built(np.int8), "convinteger_int8_weights")
    assert finding.numbers["weights"] == 4 * 3 * 9
    assert not found(built(np.uint8), "convinteger_int8_weights")


def table_lookup(op: str, *, side: int = 32, rank: int = 1) -> onnx.ModelProto:
    nodes = [
        node("Reshape", "image flat", "f"),
        node("Cast", "f", "index", to=TensorProto.INT32),
        node(op, "table index", "logits"),
    ]
    table = np.arange(256, dtype=np.float32).reshape(-1, *[1] * (rank - 1))
    return model(nodes, {"flat": np.array([-1]), "table": table}, shape=("N", 3, side, side),
                 output_shape=None)  # fmt: skip


def test_gather_as_a_table() -> None:
    finding = one(table_lookup("Gather"), "gather_table")
    assert finding.numbers["elements"] == 3 * 32 * 32
    assert finding.numbers["table"] == 256
    assert f"{3 * 32 * 32 * (0.576 - 0.087) / 65_536:.2f} ms" in finding.cost
    assert not found(table_lookup("GatherElements"), "gather_table")
    assert not found(table_lookup("Gather", side=16), "gather_table")  # 768 elements
    assert not found(table_lookup("Gather", rank=2), "gather_table")  # rows of an embedding


def float_conv(out: int, into: int, *, group: int = 1) -> onnx.ModelProto:
    conv = node("Conv", "image w", "logits", group=group)
    weight = np.random.default_rng(0).normal(size=(out, into // group, 1, 1)).astype(np.float32)
    return model([conv], {"w": weight}, kind=FLOAT, shape=("N", into, 8, 8), output_shape=None)


def test_unaligned_channels() -> None:
    assert one(float_conv(58, 64), "unaligned_channels").numbers == {"output_channels": 58}
    finding = one(float_conv(60, 20, group=20), "unaligned_channels")
    assert finding.numbers == {"input_channels": 20, "output_channels": 60}
    assert "56 or 64" in finding.cost
    for out, into in ((64, 3), (16, 24), (15, 8), (64, 10)):
        assert not found(float_conv(out, into), "unaligned_channels")


# --- weights that could be fewer, or smaller -----------------------------------------------------


def test_unpacked_integers() -> None:
    values = (np.arange(16 * 64 * 9) % 3 - 1).astype(np.int8).reshape(16, 64, 3, 3)

    def built(weight: np.ndarray) -> onnx.ModelProto:
        nodes = [node("ConvInteger", "image w", "logits")]
        return model(nodes, {"w": weight}, shape=("N", 64, 8, 8), output_kind=TensorProto.INT32,
                     output_shape=None)  # fmt: skip

    finding = one(built(values), "unpacked_tensor")
    assert finding.node == "w"
    # Three values: five to a byte, and the table of three.
    packed = -(-16 * 64 * 9 // 5) + 3
    assert finding.numbers == {"bytes": 9216, "bytes_packed": packed, "distinct": 3}
    sixteen = (np.arange(9216) % 16).astype(np.int8).reshape(16, 64, 3, 3)
    assert one(built(sixteen), "unpacked_tensor").numbers["bytes_packed"] == 9216 // 2 + 16
    seventeen = (np.arange(9216) % 17).astype(np.int8).reshape(16, 64, 3, 3)
    assert not found(built(seventeen), "unpacked_tensor")
    assert not found(built(values[:2]), "unpacked_tensor")  # 1,152 bytes: saves less than 1 KiB


def test_fake_quantised_floats_with_a_scale_for_each_filter() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(-7, 8, size=(16, 64, 3, 3))
    levels[:, 0, 0, 0], levels[:, 0, 0, 1] = -7, 7
    scales = rng.uniform(0.5, 2, size=(16, 1, 1, 1))
    weight = (levels * scales).astype(np.float32)

    def built(w: np.ndarray) -> onnx.ModelProto:
        nodes = [node("Conv", "image w", "logits")]
        return model(nodes, {"w": w}, kind=FLOAT, shape=("N", 64, 8, 8), output_shape=None)

    per_filter = [len(np.unique(row)) for row in weight.reshape(16, -1)]
    assert max(per_filter) == 15
    finding = one(built(weight), "unpacked_tensor")
    assert finding.numbers["bytes"] == 4 * 9216
    assert finding.numbers["bytes_packed"] == 9216 // 2 + 4 * sum(per_filter)
    assert "in each filter" in finding.cost
    random = rng.normal(size=(16, 64, 3, 3)).astype(np.float32)
    assert not found(built(random), "unpacked_tensor")


@pytest.mark.parametrize("gather", ["Gather", "GatherElements"])
def test_what_the_graph_unpacks_is_packed(gather: str) -> None:
    codes = (np.arange(16 * 64 * 9) % 3).astype(np.uint8)
    nodes = [
        node("Cast", "codes", "index", to=TensorProto.INT32),
        node(gather, "table index", "flat"),
        node("Slice", "flat start end", "cut"),
        node("Reshape", "cut shape", "w"),
        node("Conv", "image w", "logits"),
    ]
    constants = {
        "codes": codes,
        "table": np.array([-1, 0, 1], dtype=np.float32),
        "start": np.array([0]),
        "end": np.array([9216]),
        "shape": np.array([16, 64, 3, 3]),
    }
    built = model(nodes, constants, kind=FLOAT, shape=("N", 64, 8, 8), output_shape=None)
    assert not found(built, "unpacked_tensor")


def test_zero_filters() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    weight[[1, 4, 6]] = 0
    conv = node("Conv", "image w", "logits", pads=[1] * 4, strides=[2, 2])
    built = model([conv], {"w": weight}, kind=FLOAT, output_shape=None)
    finding = one(built, "masked_not_slim")
    assert finding.numbers == {"filters": 3, "params": 3 * 27, "macs": 3 * 27 * 4 * 4}
    weight[:, 0, 0, 0] = 1e-30
    assert not found(model([conv], {"w": weight}, kind=FLOAT, output_shape=None), "masked_not_slim")


@pytest.mark.parametrize(("bias", "seen"), [(0.0, True), (0.5, False)])
def test_one_constant_channel_is_there_on_purpose(bias: float, seen: bool) -> None:
    """What zero filters emit needs a channel: alone it cannot be cut, two of them can merge."""
    weight = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    weight[4] = 0
    conv = node("Conv", "image w b", "logits", pads=[1] * 4)
    constants = {"w": weight, "b": np.full(8, bias, dtype=np.float32)}
    built = model([conv], constants, kind=FLOAT, output_shape=None)
    assert bool(found(built, "masked_not_slim")) is seen
    weight[5] = 0
    built = model([conv], constants, kind=FLOAT, output_shape=None)
    assert one(built, "masked_not_slim").numbers["filters"] == 2


def test_zero_filters_that_a_residual_sum_needs_are_a_note() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    weight[[1, 4]] = 0
    skip = np.ones((8, 3, 1, 1), dtype=np.float32)
    nodes = [
        node("Conv", "image w", "y", pads=[1] * 4),
        node("Conv", "image v", "x"),
        node("Add", "y x", "logits"),
    ]
    built = model(nodes, {"w": weight, "v": skip}, kind=FLOAT, output_shape=None)
    finding = one(built, "masked_not_slim")
    assert finding.severity == "info"
    assert "residual sum" in finding.remedy


def test_a_quantised_zero_is_the_zero_point() -> None:
    weight = weights(4, 3, 3, 3, of=128, dtype=np.uint8)
    weight[0] = 3
    weight[1] = 0  # not zero: -128

    def built(zero: int) -> onnx.ModelProto:
        constants = {"w": weight, "xz": U8_ZERO, "wz": np.uint8(zero)}
        return model([node("ConvInteger", "image w xz wz", "logits")], constants,
                     output_kind=TensorProto.INT32, output_shape=None)  # fmt: skip

    assert one(built(128), "masked_not_slim").numbers["filters"] == 2
    assert one(built(0), "masked_not_slim").numbers["filters"] == 1


def masked_model(mask: np.ndarray, *, residual: bool = False) -> onnx.ModelProto:
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    nodes = [
        node("Conv", "image w", "c", pads=[1] * 4),
        node("Relu", "c", "r"),
        node("Add", "r image", "a") if residual else node("Identity", "r", "a"),
        node("Mul", "a mask", "logits"),
    ]
    return model(nodes, {"w": weight, "mask": mask}, kind=FLOAT, shape=("N", 4, 8, 8),
                 output_shape=None)  # fmt: skip


def test_zero_masks() -> None:
    mask = np.array([1, 0, 1, 0], dtype=np.float32)
    for shape in ((4, 1, 1), (1, 4, 1, 1)):
        finding = one(masked_model(mask.reshape(shape)), "masked_not_slim")
        assert finding.numbers == {"filters": 2, "params": 2 * 36, "macs": 2 * 36 * 64}
    tied = one(masked_model(mask.reshape(4, 1, 1), residual=True), "masked_not_slim")
    assert tied.numbers == {"channels": 2}
    assert not found(masked_model(np.ones((4, 1, 1), dtype=np.float32)), "masked_not_slim")
    units = np.ones((4, 8, 8), dtype=np.float32)
    units[:, ::2] = 0  # no channel is silent everywhere
    assert not found(masked_model(units), "masked_not_slim")
    units[2] = 0
    assert one(masked_model(units), "masked_not_slim").numbers["filters"] == 1
    assert not found(masked_model(mask), "masked_not_slim")  # [4] scales columns, not channels


def test_fake_quantisation() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    quantised_input = [
        node("QuantizeLinear", "image s xz", "q"),
        node("DequantizeLinear", "q s xz", "x"),
    ]
    nodes = [*quantised_input, node("Conv", "x w", "logits")]
    built = model(nodes, {"w": weight, **Q}, kind=FLOAT, output_shape=None)
    finding = one(built, "fake_quantisation")
    assert finding.numbers == {"bytes": 4 * 108, "bytes_int8": 108}
    rounded = [
        *quantised_input,
        node("QuantizeLinear", "w s wz", "wq"),
        node("DequantizeLinear", "wq s wz", "wd"),
        node("Conv", "x wd", "logits"),
    ]
    built = model(rounded, {"w": weight, **Q}, kind=FLOAT, output_shape=None)
    assert one(built, "fake_quantisation").numbers["bytes"] == 4 * 108
    stored = [
        *quantised_input,
        node("DequantizeLinear", "w s wz", "wd"),
        node("Conv", "x wd", "logits"),
    ]
    integers = weights(4, 3, 3, 3, of=1)
    built = model(stored, {"w": integers, **Q}, kind=FLOAT, output_shape=None)
    assert not found(built, "fake_quantisation")


def test_batch_norm_behind_a_convolution() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    vectors = {key: np.arange(1, 5, dtype=np.float32) for key in "gbmv"}

    def built(between: str) -> onnx.ModelProto:
        nodes = [
            node("Conv", "image w", "c"),
            node(between, "c", "r"),
            node("BatchNormalization", "r g b m v", "logits"),
        ]
        if between == "Identity":
            nodes[1:] = [node("BatchNormalization", "c g b m v", "logits")]
        return model(nodes, {"w": weight, **vectors}, kind=FLOAT, opset=15, ir_version=8,
                     output_shape=None)  # fmt: skip

    assert one(built("Identity"), "batch_norm").numbers == {"bytes": 4 * 4 * 4}
    assert not found(built("Relu"), "batch_norm")  # nothing to fold it into


def test_wasteful_fields() -> None:
    values = np.full(100, -1, dtype=np.int8)
    nodes = [node("Add", "image w", "logits")]
    built = model(nodes, kind=S8, shape=("N", 100), output_kind=S8, output_shape=None, opset=14)
    listed = helper.make_tensor("w", S8, [100], values.tolist())
    built.graph.initializer.append(listed)
    finding = one(built, "wasteful_fields")
    raw = helper.make_tensor("w", S8, [100], values.tobytes(), raw=True)
    # A negative number takes ten bytes in a list.
    assert finding.numbers == {"tensors": 1, "bytes": listed.ByteSize() - raw.ByteSize()}
    assert 900 <= finding.numbers["bytes"] <= 904
    built.graph.initializer[0].CopyFrom(raw)
    assert not found(built, "wasteful_fields")
    built.graph.initializer[0].CopyFrom(helper.make_tensor("w", FLOAT, [2], [1.0, 2.0]))
    floats = model([node("Add", "image w", "logits")], kind=FLOAT, shape=("N", 2))
    floats.graph.initializer.append(helper.make_tensor("w", FLOAT, [2], [1.0, 2.0]))
    assert not found(floats, "wasteful_fields")  # packed floats are as short as raw ones


def test_duplicate_initializers() -> None:
    same = np.arange(32, dtype=np.float32)
    nodes = [
        node("Add", "image a", "x"),
        node("Add", "x b", "y"),
        node("Add", "y c", "z"),
        node("Add", "z d", "logits"),
    ]
    constants = {"a": same, "b": same, "c": same, "d": same + 1}
    built = model(nodes, constants, kind=FLOAT, shape=("N", 32), output_shape=None)
    finding = one(built, "duplicate_initializers")
    assert finding.numbers == {"tensors": 2, "bytes": 2 * 128}
    constants["b"], constants["c"] = same.reshape(1, 32), same + 2
    built = model(nodes, constants, kind=FLOAT, shape=("N", 32), output_shape=None)
    assert not found(built, "duplicate_initializers")  # another shape is another tensor


# --- interface -----------------------------------------------------------------------------------

NET = [
    node("Cast", "image", "pixels", to=FLOAT),
    node("GlobalAveragePool", "pixels", "pool"),
    node("Flatten", "pool", "logits"),
]


def renamed(built: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    """`built` with another name for its input or output."""
    for entry in (*built.graph.input, *built.graph.output):
        entry.name = new if entry.name == old else entry.name
    for step in built.graph.node:
        for names in (step.input, step.output):
            names[:] = [new if name == old else name for name in names]
    return built


def conforming(**changes: object) -> onnx.ModelProto:
    options = {"output_shape": ("N", 3), "opset": 13} | changes
    return model(NET, **options)


def test_the_convention_is_silent_on_what_follows_it() -> None:
    assert lint(conforming()) == ()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: renamed(conforming(), "image", "input.1"), ["called 'input.1'"]),
        (lambda: renamed(conforming(), "logits", "495"), ["called '495'"]),
        (lambda: conforming(kind=FLOAT), ["float: scaling", "4 times the bytes"]),
        (lambda: conforming(shape=(1, 3, 8, 8)), ["fixed at 1", "one by one"]),
        (lambda: conforming(shape=(16, 3, 8, 8)), ["fixed at 16", "refuses"]),
        (lambda: conforming(shape=("N", 8, 8, 3), output_shape=("N", 8)), ["channels last"]),
        (lambda: conforming(shape=("N", 3, None, None)), ["[?, 3, ?, ?]", "size open"]),
        (lambda: conforming(output_shape=("N", "classes")), ["the output is [?, ?]"]),
    ],
)
def test_each_difference_from_the_convention(
    build: Callable[[], onnx.ModelProto], says: list[str]
) -> None:
    finding = one(build(), "input_convention")
    assert finding.severity == "warning"
    for part in says:
        assert part in finding.cost


def test_several_inputs_and_outputs_degrade_to_findings() -> None:
    built = model(
        [node("Add", "image mask", "logits"), node("Relu", "logits", "features")],
        kind=FLOAT,
        shape=("N", "T"),
        output_shape=None,
    )
    for name, side in (("mask", built.graph.input), ("features", built.graph.output)):
        side.append(helper.make_tensor_value_info(name, FLOAT, ["N", "T"]))
    first, second = found(built, "input_convention")
    assert first.cost.startswith("2 inputs (image, mask)")
    assert second.cost.startswith("2 outputs (logits, features)")


def test_newer_than_needed() -> None:
    finding = one(conforming(opset=17, ir_version=8), "newer_than_needed")
    # Cast and Flatten changed last in opset 13.
    assert finding.numbers == {"opset": 17, "opset_needed": 13, "ir": 8, "ir_needed": 7}
    assert "onnxruntime 1.12 or later" in finding.cost
    assert "1.7 would do" in finding.cost
    only_ir = one(conforming(ir_version=10), "newer_than_needed")
    assert "onnxruntime 1.18 or later" in only_ir.cost
    assert not found(conforming(), "newer_than_needed")
    hard_swish = model([node("HardSwish", "image", "logits")], kind=FLOAT, opset=14)
    assert not found(hard_swish, "newer_than_needed")  # HardSwish came with opset 14


def test_subgraphs_are_named_as_unseen() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", FLOAT, None)],
    )
    choose = node("If", "yes", "logits", then_branch=branch, else_branch=branch)
    built = model([choose], {"yes": np.array(True)}, kind=FLOAT)
    assert one(built, "not_checked").node == "logits"


def test_an_invalid_model_is_one_error() -> None:
    built = conforming()
    built.graph.node[1].input[0] = "nowhere"
    (finding,) = lint(built)
    assert (finding.rule, finding.severity) == ("invalid_model", "error")
    assert "nowhere" in finding.cost


# --- this project's files ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["conv1", "conv2"])
def test_our_mixed_forms_do_not_saturate(form: str) -> None:
    """Where a float and an integer convolution read the same levels, one of them reads a Cast."""
    network = twin(4)
    kernels = {f"blocks.{index}.{form}": "float" for index, _ in enumerate(network.blocks())}
    built = integer_graph(network, image_shape=IMAGE_SHAPE, metadata={}, kernels=kernels)
    assert not found(built, "saturation")
    assert any(step.op_type == "QLinearConv" for step in built.graph.node) == (form == "conv2")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_our_integer_files_do_not_saturate(bits: int, packed: bool) -> None:
    network = twin(bits)
    built = integer_graph(network, image_shape=IMAGE_SHAPE, metadata={}, packed=packed)
    findings = lint(built)
    rules = {finding.rule for finding in findings}
    allowed = {"masked_not_slim", "duplicate_initializers"} | (
        set() if packed else {"unpacked_tensor"}
    )
    assert rules <= allowed
    assert all(finding.severity != "error" for finding in findings)


def test_our_weights_at_full_range_would_saturate_and_are_found() -> None:
    """The same file with one weight pair raised: the table's 48 x (100 x 8) passes int16."""
    network = twin(4)
    built = integer_graph(network, image_shape=IMAGE_SHAPE, metadata={}, packed=False)
    margins = saturation_margins(network)
    assert all(margin.factor > 1 for margin in margins)
    tables = [t for t in built.graph.initializer if t.name.startswith("levels.")]
    for tensor in tables:
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[values == values.max()] = 255
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    scale = 255 / 48
    over = {m.layer for m in margins if m.layer.endswith("conv1") and m.worst_pair * scale > 32_767}
    assert {finding.node for finding in found(built, "saturation")} == over


@pytest.mark.parametrize("make", [trained, lambda: pruned(0.5), lambda: masked(3)])
def test_our_float_files(make: Callable) -> None:
    slimmed, _ = slim(fold(make()))
    findings = lint(float_graph(slimmed, image_shape=IMAGE_SHAPE, metadata={}))
    # Filters zeroed where a residual sum keeps their channel stay in the file.
    assert {f.rule for f in findings} <= {
        "masked_not_slim",
        "unaligned_channels",
        "duplicate_initializers",
    }


def test_a_pruned_model_that_was_not_slimmed() -> None:
    folded = fold(pruned(0.5))
    built = float_graph(folded, image_shape=IMAGE_SHAPE, metadata={})
    expected = {}
    for name, module in folded.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 4:
            zero = int((weight.flatten(1) == 0).all(dim=1).sum())
            if zero:
                expected[name] = zero
    assert sum(expected.values()) == sum(
        finding.numbers["filters"] for finding in found(built, "masked_not_slim")
    )


def test_packed_bytes_are_those_of_the_packing() -> None:
    assert (code_for(3).digits, code_for(16).digits) == (5, 2)


# --- files ---------------------------------------------------------------------------------------


def test_the_limit_is_the_devices() -> None:
    assert MAX_MODEL_BYTES == DEVICE_LIMIT


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.onnx", b"", "is empty"),
        ("text.onnx", b"not a model\n", "not an ONNX model"),
        ("big.onnx", b"\0" * 2000, "has 2000 bytes, the limit for a model is 1000"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        lint_file(path, max_bytes=1000)


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="is not a file"):
            lint_file(path)
    with pytest.raises(UsageError, match="No such file"):
        lint_file(tmp_path / "missing")


@pytest.mark.parametrize("where", ["initializer", "attribute"])
def test_external_data_is_refused_wherever_it_hides(tmp_path: Path, where: str) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, dtype=np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    built = conforming()
    if where == "initializer":
        built.graph.initializer.append(tensor)
    else:
        built.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    path = tmp_path / "model.onnx"
    path.write_bytes(built.SerializeToString())
    with pytest.raises(UsageError, match="outside itself"):
        lint_file(path)


def test_a_small_file_that_unpacks_to_terabytes() -> None:
    nodes = [
        node("Gather", "table index", "huge", axis=0),
        node("Reshape", "huge flat", "w"),
        node("Mul", "image w", "logits"),
    ]
    constants = {
        "table": np.zeros((1, 1 << 18), dtype=np.float32),
        "index": np.zeros(1 << 20, dtype=np.int64),
        "flat": np.array([-1]),
    }
    built = model(nodes, constants, kind=FLOAT, shape=("N", 1), output_shape=None)
    assert not [f for f in lint(built) if f.severity == "error"]


def test_a_long_chain_of_constants() -> None:
    names = ["c", *(f"c{i}" for i in range(5000))]
    chain = [node("Identity", a, b) for a, b in pairwise(names)]
    built = model([*chain, node("Mul", f"image {names[-1]}", "logits")], {"c": np.zeros(300)},
                  kind=TensorProto.DOUBLE, shape=("N", 300), output_kind=TensorProto.DOUBLE,
                  output_shape=None)  # fmt: skip
    assert found(built, "nothing") == []


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(changed)))
        kind = rng.integers(3)
        if kind == 0:
            changed[at] = int(rng.integers(256))
        elif kind == 1:
            del changed[at : at + int(rng.integers(1, 9))]
        else:
            changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_in_findings_or_one_error(tmp_path: Path, seed: int) -> None:
    built = (
        qdq("Conv", weights(4, 3, 3, 3, of=127), after="Relu QuantizeLinear"),
        masked_model(np.array([1, 0, 1, 0], dtype=np.float32).reshape(4, 1, 1)),
        table_lookup("Gather"),
        model([MATMULS["QGemm"]], {"w": COLUMNS, **Q}, shape=("N", 16), output_shape=None),
    )[seed]
    content = built.SerializeToString()
    rng = np.random.default_rng(seed)
    path = tmp_path / "damaged.onnx"
    checked = 0
    for _ in range(250):
        path.write_bytes(damaged(content, rng))
        try:
            findings = lint_file(path)
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most files end without an error
        else:
            checked += all(finding.rule != "invalid_model" for finding in findings)
    assert checked > 4  # the damage was not always fatal

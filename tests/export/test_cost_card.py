from __future__ import annotations

import gzip
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from export_cases import MEAN_255, full_width, masked, pruned, trained, twin
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from export.cost import cost_card, uncounted_operators
from export.float_graph import float_graph
from export.graph import serialise
from export.integer_graph import integer_graph
from export.onnx_reader import Graph
from export.slim import slim
from harness.models.folded import FoldedResNet, fold
from harness.records import CostCard, HarnessError

SHAPE = (3, 32, 32)


def card_of(model: FoldedResNet) -> CostCard:
    content = serialise(float_graph(model, image_shape=SHAPE, metadata={}))
    return cost_card(content, image_shape=SHAPE)


def torch_macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SHAPE))
    return counter.get_total_flops() // 2


def conv_macs(cin: int, cout: int, kernel: int, side: int) -> int:
    return cin * cout * kernel**2 * side**2


def resnet18_by_hand(width: int) -> tuple[int, int]:
    """(MACs, parameters) at 32 x 32 with batch norm folded, written out."""
    convs = [(3, width, 3, 32)] + [(width, width, 3, 32)] * 4
    for stage in (1, 2, 3):
        cout, side = width * 2**stage, 32 // 2**stage
        convs += [(cout // 2, cout, 3, side), (cout // 2, cout, 1, side)]
        convs += [(cout, cout, 3, side)] * 3
    macs = sum(conv_macs(*conv) for conv in convs) + 8 * width * 10
    params = sum(cin * cout * kernel**2 + cout for cin, cout, kernel, _ in convs)
    return macs, params + 8 * width * 10 + 10


# --- this project's files ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 8])
def test_counts_equal_hand_counts_and_torch(width: int) -> None:
    model = fold(trained(width=width))
    card = card_of(model)
    assert (card.macs, card.params) == resnet18_by_hand(width)
    assert card.macs == torch_macs(model)
    assert card.params == sum(p.numel() for p in model.parameters())
    assert card.nonzeros == sum(int((p != 0).sum()) for p in model.parameters())
    assert card.bops_executed == card.bops_nominal == card.macs * 32 * 32
    assert card.opset == 13
    assert uncounted_operators(card) == ()


@pytest.mark.parametrize("make", [lambda: pruned(0.5), lambda: masked(3)], ids=["sfp", "pp3"])
def test_slim_models_are_counted_as_they_execute(make) -> None:
    masked_model = fold(make())
    slimmed, _ = slim(masked_model)
    card = card_of(slimmed)
    assert card.macs == torch_macs(slimmed) < card_of(masked_model).macs
    assert card.params == sum(p.numel() for p in slimmed.parameters())


@pytest.mark.parametrize("bits", [2, 4])
def test_integer_models(bits: int) -> None:
    model = twin(bits)
    content = serialise(integer_graph(model, image_shape=SHAPE, metadata={}))
    card = cost_card(content, image_shape=SHAPE)
    assert card.macs == torch_macs(model) == resnet18_by_hand(4)[0]
    by_name = {layer["name"]: layer for layer in card.layers}
    weights = next(iter(model.blocks())).conv1.conv.weight
    conv1 = by_name["blocks.0.conv1"]
    assert conv1["params"] == weights.numel() + 4 + 4  # scales and biases
    conv2, block = by_name["blocks.0.conv2"], next(iter(model.blocks())).conv2
    # Stored as uint8 around 128: a zero level is 128 in the file.
    expected = (block.conv.weight != 0).sum() + (block.scale != 0).sum() + (block.shift != 0).sum()
    assert conv2["nonzeros"] == int(expected)
    assert conv2["bits_nominal"] == [bits, bits]
    assert conv2["bits_executed"] == [8, 8]
    assert by_name["stem"]["bits_nominal"] == [8, 8]
    assert by_name["fc"]["params"] == 32 * 10 + 10
    hidden = card.macs - by_name["stem"]["macs"] - by_name["fc"]["macs"]
    assert card.bops_nominal == (
        hidden * bits**2 + by_name["stem"]["macs"] * 64 + by_name["fc"]["macs"] * 256
    )


def test_file_and_gzip_sizes() -> None:
    content = serialise(float_graph(fold(trained(width=4)), image_shape=SHAPE, metadata={}))
    card = cost_card(content, image_shape=SHAPE)
    assert card.file_bytes == len(content)
    assert gzip.decompress(gzip.compress(content, 6, mtime=0)) == content
    assert card.gzip_bytes == len(gzip.compress(content, 6, mtime=0)) < len(content)


def test_resnet18_at_width_64_saves_what_was_measured() -> None:
    """FACTS C and D, in percent of MACs and parameters."""
    full = card_of(full_width())
    assert (full.macs, full.params) == resnet18_by_hand(64)
    assert full.macs == 555_422_720

    def saved(model: FoldedResNet, align: int) -> tuple[float, float]:
        card = card_of(slim(model, align=align)[0])
        return 100 * (1 - card.macs / full.macs), 100 * (1 - card.params / full.params)

    sfp = full_width(zeroed_share=1 - 0.9)
    expected = {"sfp": (8.7, 9.5), "aligned": (5.9, 9.0)}
    assert saved(sfp, 1) == pytest.approx(expected["sfp"], abs=0.05)
    assert saved(sfp, 8) == pytest.approx(expected["aligned"], abs=0.05)
    for stage, percent in ((2, (3.1, 1.3)), (3, (3.1, 5.1)), (4, (2.0, 6.3))):
        model = full_width()
        block = list(model.blocks())[2 * stage - 1]
        channels = block.conv2.out_channels
        block.mask = (torch.arange(channels) >= int(channels * 0.3)).float()[:, None, None]
        assert saved(model, 1) == pytest.approx(percent, abs=0.05)


# --- files made elsewhere ------------------------------------------------------------------------


def foreign(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    *,
    shape: Sequence[int | str] = ("N", 3, 8, 8),
    output: str = "y",
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()


def card_of_foreign(*args, **kwargs) -> CostCard:
    return cost_card(foreign(*args, **kwargs), image_shape=(3, 8, 8))


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, dtype=np.float32)


def test_grouped_convolution_and_matmul_with_its_bias() -> None:
    card = card_of_foreign(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], group=3, pads=[1] * 4, strides=[2, 2]),
            helper.make_node("Flatten", ["c"], ["f"]),
            helper.make_node("MatMul", ["f", "m"], ["p"]),
            helper.make_node("Add", ["p", "b"], ["y"]),
        ],
        {"w": floats(6, 1, 3, 3), "m": floats(96, 5), "b": floats(5)},
    )
    assert card.macs == 6 * 1 * 9 * 4 * 4 + 96 * 5
    assert card.params == 6 * 9 + 96 * 5 + 5


def test_transposed_gemm() -> None:
    for trans_b, weight in ((0, floats(192, 7)), (1, floats(7, 192))):
        card = card_of_foreign(
            [
                helper.make_node("Flatten", ["x"], ["f"]),
                helper.make_node("Gemm", ["f", "w"], ["y"], transB=trans_b),
            ],
            {"w": weight},
        )
        assert (card.macs, card.params) == (192 * 7, 192 * 7)


def test_a_packed_weight_counts_as_what_it_unpacks_to() -> None:
    codes = (np.arange(4 * 3 * 9) % 3).astype(np.uint8)
    card = card_of_foreign(
        [
            helper.make_node("Cast", ["codes"], ["i"], to=TensorProto.INT32),
            helper.make_node("GatherElements", ["table", "i"], ["flat"]),
            helper.make_node("Reshape", ["flat", "shape"], ["w"]),
            helper.make_node("Conv", ["x", "w"], ["y"]),
        ],
        {
            "codes": codes,
            "table": np.array([0, 0.5, -1], dtype=np.float32),
            "shape": np.array([4, 3, 3, 3]),
        },
    )
    assert card.params == 4 * 3 * 9
    assert card.nonzeros == 4 * 3 * 9 * 2 // 3


def test_a_shared_weight_is_stored_once_and_executed_twice() -> None:
    card = card_of_foreign(
        [
            helper.make_node("Conv", ["x", "w"], ["h"], pads=[1] * 4),
            helper.make_node("Conv", ["h", "w"], ["y"], pads=[1] * 4),
        ],
        {"w": floats(3, 3, 3, 3)},
    )
    assert (card.macs, card.params) == (2 * 81 * 64, 81)


def test_operators_that_hide_products_are_named_not_guessed() -> None:
    card = card_of_foreign(
        [
            helper.make_node("Conv", ["x", "w"], ["h"]),
            helper.make_node("ConvTranspose", ["h", "t"], ["y"], name="up"),
        ],
        {"w": floats(2, 3, 1, 1), "t": floats(2, 1, 2, 2)},
    )
    assert card.macs == 2 * 3 * 64
    assert uncounted_operators(card) == ("ConvTranspose",)
    assert {"name": "up", "op": "ConvTranspose", "macs": None} in card.layers


def test_what_has_no_shape_is_named_not_guessed_and_its_weights_are_counted() -> None:
    card = card_of_foreign(conv_after("Gelu", domain="com.microsoft"), ONE_BY_ONE)
    assert card.macs == 0
    assert uncounted_operators(card) == ("Conv", "Gelu")
    assert card.params == ONE_BY_ONE["w"].size


def conv_after(op: str, **attributes: object) -> list[onnx.NodeProto]:
    return [
        helper.make_node(op, ["x"], ["h"], **attributes),
        helper.make_node("Conv", ["h", "w"], ["y"]),
    ]


ONE_BY_ONE = {"w": floats(2, 3, 1, 1)}
BAD_FILES = {
    "garbage": (b"\x00garbage", "not an ONNX model"),
    "empty": (b"", "not an ONNX model"),
    "shape contradiction": (
        foreign([helper.make_node("Add", ["x", "w"], ["y"])], {"w": floats(5)}),
        "cannot be inferred",
    ),
    "other size": (foreign(conv_after("Relu"), ONE_BY_ONE, shape=(1, 3, 9, 9)), r"\[1, 3, 9, 9\]"),
    "not an image": (foreign(conv_after("Relu"), ONE_BY_ONE, shape=(1, 3)), "one image"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_clear_error(case: str) -> None:
    content, message = BAD_FILES[case]
    with pytest.raises(HarnessError, match=message):
        cost_card(content, image_shape=(3, 8, 8))


def test_weights_outside_the_file_are_refused() -> None:
    model = onnx.load_model_from_string(foreign(conv_after("Relu"), ONE_BY_ONE))
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(HarnessError, match="outside itself"):
        cost_card(model.SerializeToString(), image_shape=(3, 8, 8))


def test_nonsense_nominal_bits_are_refused() -> None:
    model = onnx.load_model_from_string(foreign(conv_after("Relu"), ONE_BY_ONE))
    helper.set_model_props(model, {"nominal_bits": "[4]"})
    with pytest.raises(HarnessError, match="nominal_bits"):
        cost_card(model.SerializeToString(), image_shape=(3, 8, 8))


def test_the_mean_is_no_parameter() -> None:
    layer = card_of(fold(trained(width=4))).layers[0]
    assert len(MEAN_255) == 3
    assert layer["params"] == 4 * 27 + 4


def test_texts_are_not_folded_they_grow_where_no_count_of_bytes_sees_it() -> None:
    nodes = [helper.make_node("Add", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(60)]
    nodes.append(helper.make_node("Conv", ["x", "w"], ["y"]))
    model = onnx.load_model_from_string(foreign(nodes, ONE_BY_ONE))
    model.graph.initializer.append(helper.make_tensor("s0", TensorProto.STRING, [1], [b"abcd"]))
    graph = Graph.inspect(model)
    assert graph.constant("s60") is None


@pytest.mark.parametrize("op", ["Clip", "Add", "QuantizeLinear"])
def test_a_tensor_that_would_be_huge_is_not_made(op: str) -> None:
    wide = {"a": floats(200_000, 1), "b": floats(200_000)}
    inputs = ["a", "b", "b"] if op == "Clip" else ["a", "b"]
    nodes = [helper.make_node(op, inputs, ["w"]), helper.make_node("Conv", ["x", "w"], ["y"])]
    model = onnx.load_model_from_string(foreign(nodes, wide))
    with pytest.raises(HarnessError, match="too large a tensor"):
        Graph.inspect(model).value("w")

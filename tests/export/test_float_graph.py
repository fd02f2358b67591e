from __future__ import annotations

import copy
import json

import onnx
import pytest
import torch
from export_cases import IMAGE_SHAPE, images, logits, masked, pruned, relative_error, trained

from export.float_graph import float_graph
from export.graph import GraphBuilder, serialise
from export.runtime import RunSettings, open_session, run
from export.slim import slim
from export.verify import verify_float
from harness.models.folded import FoldedResNet, fold

PIXELS = images(65, seed=9)


def built(model: FoldedResNet) -> onnx.ModelProto:
    return float_graph(model, image_shape=IMAGE_SHAPE, metadata={"variant": "full"})


@pytest.mark.parametrize(
    "settings", [RunSettings(), RunSettings(threads=1, optimise=False, batch_size=7)]
)
@pytest.mark.parametrize(
    "make",
    [
        trained,
        lambda: pruned(0.5),
        lambda: masked(2),
        lambda: masked(3),
        lambda: masked(4),
    ],
    ids=["full", "sfp", "pp2", "pp3", "pp4"],
)
def test_onnxruntime_computes_the_trained_model(make, settings: RunSettings) -> None:
    model = make()
    for align in (1, 8):
        slimmed, _ = slim(fold(model), align=align)
        agreement = verify_float(serialise(built(slimmed)), model, PIXELS, settings=[settings])
        assert agreement.passed, agreement.reason
        assert agreement.relative_error < 1e-5
        assert agreement.codes_compared is None


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_wrong_block_is_named_even_where_the_logits_hide_it(value: float) -> None:
    model = trained()
    deployed = slim(fold(model))[0]
    other = copy.deepcopy(deployed)
    next(iter(other.blocks())).conv2.bias[0] += value
    content = serialise(built(deployed))
    agreement = verify_float(content, model, PIXELS, deployed=deployed)
    assert agreement.passed, agreement.reason
    assert [layer.layer for layer in agreement.layers] == [f"blocks.{i}.relu" for i in range(8)]
    agreement = verify_float(content, model, PIXELS, deployed=other)
    assert not agreement.passed
    assert "first blocks.0.relu" in agreement.reason
    assert all((layer.relative_error or 0) <= 1e30 for layer in agreement.layers)


def test_unit_masks_multiply() -> None:
    model = trained()
    model.stage_output(3).mask = (torch.rand(32, 4, 4) > 0.3).float()
    graph = built(slim(fold(model))[0])
    assert [node.name for node in graph.graph.node if node.op_type == "Mul"] == ["blocks.5.masked"]
    assert verify_float(serialise(graph), model, PIXELS).passed


def test_nodes_are_named_like_the_model() -> None:
    graph = built(slim(fold(masked(2)))[0])
    names = {node.name: node.op_type for node in graph.graph.node}
    assert names["blocks.2.shortcut"] == "Conv"
    assert names["blocks.3.conv1"] == "Conv"
    assert names["blocks.3.skip"] == "Gather"
    assert len(names) == len(graph.graph.node)


def test_the_interface_is_uint8_images_of_any_number_to_float_logits() -> None:
    session = open_session(serialise(built(fold(trained()))))
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["N", 3, 16, 16])
    assert (output.name, output.type, output.shape) == ("logits", "tensor(float)", ["N", 10])
    for n in (1, 5):
        actual = run(session, PIXELS[:n])
        assert relative_error(actual, logits(trained(), PIXELS[:n])) < 1e-5


def test_metadata_travels_in_the_file() -> None:
    session = open_session(serialise(built(fold(trained()))))
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["variant"] == "full"
    assert json.loads(properties["nominal_bits"])["blocks.7.conv2"] == [32, 32]


def test_the_file_needs_only_opset_13() -> None:
    model = built(fold(trained()))
    assert [entry.version for entry in model.opset_import] == [13]
    assert model.ir_version <= 10


def test_reserved_metadata_is_refused() -> None:
    with pytest.raises(ValueError, match="reserved"):
        float_graph(fold(trained()), image_shape=IMAGE_SHAPE, metadata={"nominal_bits": "{}"})


def test_one_name_cannot_mean_two_constants() -> None:
    graph = GraphBuilder(IMAGE_SHAPE)
    bias = trained().fc.bias.numpy()
    assert graph.constant("bias", bias) == graph.constant("bias", bias.copy())
    with pytest.raises(ValueError, match="two different constants"):
        graph.constant("bias", bias + 1)

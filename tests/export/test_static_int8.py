"""onnxruntime's static int8: what the file holds, what it depends on, and what is said of it."""

from __future__ import annotations

import json
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_cases import images, logits, trained
from onnx import TensorProto, numpy_helper
from torch import nn

from export.cost import cost_card
from export.exporter import Exported, load_manifest
from export.float_graph import float_graph
from export.graph import serialise
from export.runtime import RunSettings, open_session, run
from export.static_int8 import export_static_int8, int8_margins, quantise
from harness.models.folded import FoldedResNet, fold
from harness.records import HarnessError

SHAPE = (3, 16, 16)
CALIBRATION = images(60, seed=11)
OTHERS = images(100, seed=12)


@cache
def quantised(seed: int = 11, order: int = 1, count: int = 60) -> bytes:
    graph = float_graph(fold(trained(width=4)), image_shape=SHAPE, metadata={})
    return quantise(graph, images(60, seed=seed)[:count][::order], metadata={"variant": "int8"})


def exported(folder: Path, reference: nn.Module | None = None, **changes: Any) -> Exported:
    model = trained(width=4)
    request: dict[str, Any] = {
        "out": folder / "int8.onnx",
        "calibration": CALIBRATION,
        "metadata": {"variant": "int8", "seed": "0"},
        "classes": tuple("0123456789"),
    }
    return export_static_int8(fold(model), reference or model, **{**request, **changes})


def stored(content: bytes) -> dict[str, np.ndarray]:
    graph = onnx.load_model_from_string(content).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


# --- the file ------------------------------------------------------------------------------------


def test_the_file_is_one_that_any_runtime_of_opset_13_reads(tmp_path: Path) -> None:
    result = exported(tmp_path)
    model = onnx.load(result.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 13)]
    assert model.ir_version == 7
    assert {node.domain for node in model.graph.node} == {""}
    (image,), (answer,) = model.graph.input, model.graph.output
    dims = [dim.dim_value or dim.dim_param for dim in image.type.tensor_type.shape.dim]
    assert (image.name, dims) == ("image", ["N", *SHAPE])
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    dims = [dim.dim_value or dim.dim_param for dim in answer.type.tensor_type.shape.dim]
    assert (answer.name, dims) == ("logits", ["N", 10])
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["variant"] == "int8"
    assert json.loads(properties["classes"]) == list("0123456789")
    assert set(properties) == {"variant", "seed", "classes", "nominal_bits"}


def test_weights_are_rounded_channel_by_channel() -> None:
    values = stored(quantised())
    conv = fold(trained(width=4)).stem
    weight, scale = values["stem.weight_quantized"], values["stem.weight_scale"]
    assert weight.dtype == np.int8
    assert not values["stem.weight_zero_point"].any()
    expected = conv.weight.abs().amax((1, 2, 3)).numpy()
    assert scale == pytest.approx(expected / 127, rel=1e-6)
    restored = weight * scale[:, None, None, None]
    error = np.abs(restored - conv.weight.numpy())
    assert (error <= 0.5001 * scale[:, None, None, None]).all()


def test_the_range_of_the_first_layer_is_that_of_the_calibration_images() -> None:
    values = stored(quantised())
    centred = CALIBRATION - fold(trained(width=4)).mean_255.numpy()
    low, high = centred.min(), centred.max()
    assert values["centred_scale"] == pytest.approx((high - low) / 255, rel=1e-6)
    assert values["centred_zero_point"] == round(-low / ((high - low) / 255))


def test_it_depends_on_the_calibration_images_and_not_on_their_order() -> None:
    assert quantised() == quantised.__wrapped__()
    assert quantised(order=-1) == quantised()
    assert quantised(count=30) != quantised()
    assert quantised(seed=12) != quantised()


def test_the_batch_does_not_matter() -> None:
    session = open_session(quantised())
    together = run(session, OTHERS, RunSettings(batch_size=100))
    for size in (1, 33):
        assert np.array_equal(run(session, OTHERS, RunSettings(batch_size=size)), together)


def test_onnxruntime_runs_every_layer_in_integers_as_counted(tmp_path: Path) -> None:
    content, path = quantised(), tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3  # it warns that such a file is for this machine only
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    executed = [node.op_type for node in onnx.load(path).graph.node]
    card = cost_card(content, image_shape=SHAPE)
    plain = cost_card(
        serialise(float_graph(fold(trained(width=4)), image_shape=SHAPE, metadata={})),
        image_shape=SHAPE,
    )
    assert executed.count("QLinearConv") == 20
    assert executed.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Gemm"} & set(executed)
    assert [layer["bits_executed"] for layer in card.layers] == [[8, 8]] * 21
    assert (card.macs, card.params) == (plain.macs, plain.params)
    assert card.bops_executed == card.bops_nominal == 64 * plain.macs
    assert plain.bops_executed == 1024 * plain.macs


def test_a_convolution_whose_result_stays_float_is_counted_as_float() -> None:
    """Without a QuantizeLinear behind it, onnxruntime does not fuse a Conv."""
    model = onnx.load_model_from_string(quantised())
    (behind,) = [node for node in model.graph.node if "stem.relu" in node.input[0]][:1]
    assert behind.op_type == "QuantizeLinear"
    tap = onnx.helper.make_node("Identity", [behind.input[0]], ["tap"], name="tap")
    model.graph.node.append(tap)
    card = cost_card(serialise(model), image_shape=SHAPE)
    assert [layer["bits_executed"][0] for layer in card.layers] == [32] + [8] * 20


# --- what is said of it --------------------------------------------------------------------------


def test_the_agreement_is_that_of_the_file_with_the_trained_model(tmp_path: Path) -> None:
    result = exported(tmp_path)
    manifest = load_manifest(result.path)
    assert manifest == result.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.json", "int8.onnx"]
    predicted = run(open_session(result.path.read_bytes()), CALIBRATION).argmax(axis=1)
    expected = logits(trained(width=4), CALIBRATION).argmax(axis=1)
    share = float((predicted == expected).mean())
    assert share >= 0.5
    assert manifest["agreement"]["argmax_agreement"] == pytest.approx(share)
    assert manifest["agreement"]["images"] == 60
    assert manifest["agreement"]["passed"] is manifest["exact"] is False
    assert manifest["slimming"] is None
    exactness, saturation = manifest["notes"]
    assert f"not exact: weights and activations are rounded to 8 bits; on {share:.1%}" in exactness
    assert "can saturate on x86 with AVX2 but no VNNI" in saturation
    assert all(len(note) <= 200 for note in manifest["notes"])  # the report's table cuts there


def test_the_reference_is_compared_with_and_changes_no_byte(tmp_path: Path) -> None:
    other = trained(width=4)
    other.fc.bias[0] += 1.0
    one, two = exported(tmp_path / "a"), exported(tmp_path / "b", other)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.agreement != two.agreement


def test_bounds_hold_for_the_worst_pair_of_products() -> None:
    values = stored(quantised())
    margins = int8_margins(quantised())
    assert len(margins) == 21
    for margin in margins:
        weight = values[f"{margin.layer}.weight_quantized"].astype(int)
        worst = 0
        for filters in weight.reshape(len(weight), -1):
            pairs = np.maximum(filters[:, None], 0) + np.maximum(filters[None, :], 0)
            np.fill_diagonal(pairs, 0)
            low = np.minimum(filters[:, None], 0) + np.minimum(filters[None, :], 0)
            np.fill_diagonal(low, 0)
            worst = max(worst, pairs.max(), -low.min())
        assert (margin.worst_pair, margin.limit) == (255 * worst, 32767)


def test_a_file_that_cannot_saturate_is_not_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.static_int8.int8_margins", lambda content: ())
    (note,) = exported(tmp_path).manifest["notes"]
    assert note.startswith("not exact")


# --- what is refused, and what is left behind -----------------------------------------------------


def test_a_broken_file_is_not_written(tmp_path: Path) -> None:
    """A reference whose classes are all others: less than half of the predictions agree."""
    reference = trained(width=4)
    reference.fc.weight.copy_(reference.fc.weight.roll(1, dims=0))
    reference.fc.bias.copy_(reference.fc.bias.roll(1, dims=0))
    with pytest.raises(HarnessError, match=r"refused, nothing written.* 0\.0% of 60") as caught:
        exported(tmp_path, reference)
    assert "more typical, calibration images" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calibration": CALIBRATION.astype(np.float32)}, "must be uint8"),
        ({"calibration": CALIBRATION[:0]}, "must be uint8"),
        ({"out": Path("int8.pt")}, r"must be called \*\.onnx"),
        ({"classes": ("cat", "dog")}, "2 class names for a model of 10"),
        ({"metadata": {"classes": "x"}}, "reserved"),
    ],
)
def test_wrong_requests_are_errors_before_anything_is_written(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed_logged_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(temporary)
    root = logging.getLogger()
    before = list(root.handlers)
    model = fold(trained(width=4))
    weights = [parameter.clone() for parameter in model.parameters()]
    graph = float_graph(model, image_shape=SHAPE, metadata={})
    content = serialise(graph)
    quantise(graph, CALIBRATION, metadata={})
    assert capfd.readouterr() == ("", "")
    assert root.handlers == before
    assert list(temporary.iterdir()) == []
    assert serialise(graph) == content  # the quantiser works on a copy
    assert all(map(torch.equal, model.parameters(), weights))
    assert isinstance(model, FoldedResNet)

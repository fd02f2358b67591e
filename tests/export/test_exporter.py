from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_cases import images, masked, pruned, trained, twin
from torch import nn

import export.exporter
from export.exporter import Exported, export_model, load_manifest, manifest_cost
from export.float_graph import float_graph
from export.graph import serialise
from export.integer_graph import integer_graph
from export.runtime import open_session, run
from export.verify import verify_float, verify_integer
from harness.models.folded import fold
from harness.models.integer import IntegerResNet
from harness.records import HarnessError

PIXELS = images(50, seed=11)
NAMES = tuple(f"class {index}" for index in range(10))


def exported(folder: Path, model: Any = None, reference: nn.Module | None = None) -> Exported:
    trained_model = pruned(0.5)
    return export_model(
        model or fold(trained_model),
        reference or trained_model,
        out=folder / "sfp.onnx",
        calibration=PIXELS,
        metadata={"variant": "sfp", "dataset": "digits", "seed": "0"},
        classes=NAMES,
    )


# --- what is written -----------------------------------------------------------------------------


def test_file_and_manifest_describe_each_other(tmp_path: Path) -> None:
    result = exported(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sfp.json", "sfp.onnx"]
    manifest = load_manifest(result.path)
    assert manifest == load_manifest(result.manifest_path) == result.manifest
    assert manifest["sha256"] == result.sha256
    assert manifest["metadata"]["variant"] == "sfp"
    assert manifest["classes"] == list(NAMES)
    assert manifest["min_opset"] == 13
    assert manifest["checked_with"]["onnxruntime"] == result.agreement.runtime_version
    assert manifest["agreement"]["passed"] is True
    assert manifest["agreement"]["images"] == 50
    assert manifest["slimming"]["blocks"][0]["inner_after"] == 5
    assert manifest["nominal_bits"]["stem"] == [32, 32]
    assert manifest_cost(manifest) == result.cost
    assert result.cost.file_bytes == result.path.stat().st_size
    properties = open_session(result.path.read_bytes()).get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == list(NAMES)


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for make in (exported, integer_export):
        one, two = make(tmp_path / "a"), make(tmp_path / "b")
        assert one.path.read_bytes() == two.path.read_bytes()
        assert one.manifest_path.read_bytes() == two.manifest_path.read_bytes()


def test_the_manifest_states_the_cost_of_other_widths(tmp_path: Path) -> None:
    model = pruned(0.7, width=16)
    result = export_model(
        fold(model), model, out=tmp_path / "sfp.onnx", calibration=PIXELS, metadata={}, align=8
    )
    exact, trained_as = (result.manifest["other_widths"][k] for k in ("exact", "as_trained"))
    alone = export_model(
        fold(model), model, out=tmp_path / "exact.onnx", calibration=PIXELS, metadata={}
    )
    assert (exact["macs"], exact["params"]) == (alone.cost.macs, alone.cost.params)
    assert exact["macs"] < result.cost.macs < trained_as["macs"]
    assert exact["params"] < result.cost.params < trained_as["params"]


def integer_export(folder: Path) -> Exported:
    model = twin(3)
    return exported(folder, model, copy.deepcopy(model))


def test_integer_manifest_counts_codes(tmp_path: Path) -> None:
    result = integer_export(tmp_path)
    assert result.slimming is None
    assert result.agreement.code_mismatches == 0
    assert result.manifest["agreement"]["codes_compared"] > 0
    assert result.manifest["nominal_bits"]["blocks.7.conv2"] == [3, 3]


def test_masks_that_cannot_be_cut_are_exported_and_reported(tmp_path: Path) -> None:
    model = trained()
    model.stage_output(2).mask = (torch.rand(16, 8, 8) > 0.3).float()
    result = exported(tmp_path, fold(model), model)
    assert "nothing was saved" in result.manifest["slimming"]["method"]
    unmasked = trained()
    plain = exported(tmp_path / "plain", fold(unmasked), unmasked)
    assert (result.cost.macs, result.cost.params) == (plain.cost.macs, plain.cost.params)
    assert result.cost.file_bytes > plain.cost.file_bytes


# --- what is refused -----------------------------------------------------------------------------


def first_conv_weight(model: nn.Module) -> torch.Tensor:
    return next(iter(model.blocks())).conv1.weight


def perturb_conv(model: nn.Module) -> None:
    first_conv_weight(model)[0, 0, 0, 0] += 0.05


def perturb_batchnorm_mean(model: nn.Module) -> None:
    model.bn1.running_mean[0] += 0.05


def perturb_last_layer(model: nn.Module) -> None:
    model.fc.weight[0, 0] += 0.02


def not_a_number(model: nn.Module) -> None:
    model.fc.bias[0] = float("nan")


@pytest.mark.parametrize(
    "tamper", [perturb_conv, perturb_batchnorm_mean, perturb_last_layer, not_a_number]
)
def test_a_float_model_that_is_not_its_reference_is_not_written(
    tamper: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = masked(3)
    reference = copy.deepcopy(model)
    tamper(reference)
    with pytest.raises(HarnessError, match="export of sfp refused, nothing written"):
        exported(tmp_path, fold(model), reference)
    assert list(tmp_path.iterdir()) == []


def one_weight_level(model: IntegerResNet) -> None:
    list(model.blocks())[4].conv2.conv.weight[0, 0, 1, 1] += 1


def one_bias(model: IntegerResNet) -> None:
    list(model.blocks())[7].conv1.bias[0] += 200


def one_clip(model: IntegerResNet) -> None:
    list(model.blocks())[2].quantise.half_unit *= 1.01


def one_last_weight(model: IntegerResNet) -> None:
    model.fc.weight[0, 0] += 0.05


@pytest.mark.parametrize("tamper", [one_weight_level, one_bias, one_clip, one_last_weight])
def test_an_integer_model_that_is_not_its_twin_is_not_written(
    tamper: Callable[[IntegerResNet], None], tmp_path: Path
) -> None:
    model = twin(4)
    reference = copy.deepcopy(model)
    tamper(reference)
    with pytest.raises(HarnessError, match="refused"):
        exported(tmp_path, model, reference)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    before = exported(tmp_path)
    content = before.path.read_bytes(), before.manifest_path.read_bytes()
    model = pruned(0.5)
    reference = copy.deepcopy(model)
    perturb_last_layer(reference)
    with pytest.raises(HarnessError):
        exported(tmp_path, fold(model), reference)
    assert (before.path.read_bytes(), before.manifest_path.read_bytes()) == content


def test_near_ties_are_told_from_disagreements() -> None:
    """Two classes of the same weights always lead; a millionth decides which."""
    reference = pruned(0.5)
    reference.fc.weight[1] = reference.fc.weight[0]
    reference.fc.bias[:2] = 8.0
    model = copy.deepcopy(reference)
    reference.fc.bias[0] += 4e-6
    model.fc.bias[1] += 4e-6
    content = serialise(float_graph(fold(model), image_shape=(3, 16, 16), metadata={}))
    agreement = verify_float(content, reference, PIXELS)
    assert agreement.near_ties == len(PIXELS)
    assert agreement.argmax_agreement == 0.0
    assert not agreement.passed
    assert "limit 0.999" in agreement.reason
    assert "no ties" not in agreement.reason
    assert "logits differ" not in agreement.reason


def test_wrong_requests_are_errors_before_anything_is_written(tmp_path: Path) -> None:
    model = trained()
    good: dict[str, Any] = {
        "out": tmp_path / "full.onnx",
        "calibration": PIXELS,
        "metadata": {},
    }
    for wrong, message in (
        ({"calibration": PIXELS.astype(np.float32)}, "must be uint8"),
        ({"calibration": PIXELS[:0]}, "must be uint8"),
        ({"out": tmp_path / "full.pt"}, r"must be called \*\.onnx"),
        ({"classes": ("cat", "dog")}, "2 class names for a model of 10"),
        ({"metadata": {"classes": "x"}}, "reserved"),
        ({"align": 0}, "align"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(fold(model), model, **{**good, **wrong})
    with pytest.raises(TypeError, match="integer twin"):
        export_model(twin(2), model, **good)
    assert list(tmp_path.iterdir()) == []


def test_a_twin_without_its_tensors_in_the_file_is_an_error() -> None:
    content = serialise(float_graph(fold(trained(width=4)), image_shape=(3, 16, 16), metadata={}))
    with pytest.raises(HarnessError, match=r"no tensor 'blocks\.0\.quantise\.codes'"):
        verify_integer(content, twin(2), PIXELS)


def test_runtime_failures_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="onnxruntime cannot load the model") as caught:
        open_session(b"not a model")
    assert "\n" not in str(caught.value)
    session = open_session(serialise(integer_graph(twin(2), image_shape=(3, 16, 16), metadata={})))
    with pytest.raises(HarnessError, match="onnxruntime cannot run the model"):
        run(session, PIXELS[:, :, :8])


# --- manifests that lie --------------------------------------------------------------------------


def damage_model(result: Exported) -> None:
    result.path.write_bytes(result.path.read_bytes()[:-1])


def remove_model(result: Exported) -> None:
    result.path.unlink()


def remove_manifest(result: Exported) -> None:
    result.manifest_path.unlink()


def cut_manifest(result: Exported) -> None:
    result.manifest_path.write_bytes(result.manifest_path.read_bytes()[:200])


def binary_manifest(result: Exported) -> None:
    result.manifest_path.write_bytes(b"\xff\xfe\x00")


def other_json(result: Exported) -> None:
    result.manifest_path.write_text("[1, 2]")


def newer_format(result: Exported) -> None:
    manifest = json.loads(result.manifest_path.read_text())
    result.manifest_path.write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_model, "is not the file that"),
        (remove_model, "cannot read"),
        (remove_manifest, "cannot read"),
        (cut_manifest, "is not a manifest"),
        (binary_manifest, "is not a manifest"),
        (other_json, "is not a manifest"),
        (newer_format, "has format 99"),
    ],
)
def test_damage_is_found(damage: Callable[[Exported], None], message: str, tmp_path: Path) -> None:
    result = exported(tmp_path)
    damage(result)
    with pytest.raises(HarnessError, match=message):
        load_manifest(result.path)


def test_interrupted_between_the_two_files_the_manifest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path)
    write = export.exporter.write_atomic

    def write_models_only(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(export.exporter, "write_atomic", write_models_only)
    model = pruned(0.7)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, fold(model), model)
    with pytest.raises(HarnessError, match="is not the file that"):
        load_manifest(tmp_path / "sfp.onnx")


def test_a_cost_card_with_other_fields_is_refused() -> None:
    with pytest.raises(HarnessError, match="no valid cost card"):
        manifest_cost({"cost": {"layers": [], "price": 3}})

"""Models: built from a seed, folded without changing the function, kept bit for bit on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import CLASSES, logits, spec, split, state_bytes, trained
from torch import nn

from harness.artefacts import sha256_file
from harness.inference import predict
from harness.models.checkpoint import load_checkpoint, save_checkpoint
from harness.models.folded import fold
from harness.models.resnet import ResNet, build_model
from harness.records import UsageError

IMAGES = split(16, seed=5).images


# --- building -----------------------------------------------------------------------------------


def test_a_seed_decides_every_weight() -> None:
    first = state_bytes(build_model(spec(), seed=1))
    assert state_bytes(build_model(spec(), seed=1)) == first
    other = state_bytes(build_model(spec(), seed=2))
    changed = {name for name in first if first[name] != other[name]}
    convs_and_fc = {n for n in first if "conv" in n or "downsample.0" in n or n.startswith("fc.")}
    assert changed == convs_and_fc


@pytest.mark.parametrize("bits", [None, 3])
def test_building_leaves_the_global_generator_alone(bits: int | None) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_model(spec(bits=bits), seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_have_the_variance_of_he() -> None:
    model = build_model(spec(width=16), seed=0)
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 5000:
            wanted = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
            assert conv.weight.std().item() == pytest.approx(wanted, rel=0.05), name


def test_the_architecture_is_resnet18_for_small_images() -> None:
    model = build_model(spec(width=64), seed=0)
    conv_weights = 3 * 64 * 9  # stem
    for cin, cout in ((64, 64), (64, 128), (128, 256), (256, 512)):
        conv_weights += cin * cout * 9 + 3 * cout * cout * 9
        conv_weights += cin * cout if cin != cout else 0
    norms = 2 * (64 + sum(4 * c + (c if c > 64 else 0) for c in (64, 128, 256, 512)))
    assert sum(p.numel() for p in model.parameters()) == conv_weights + norms + 513 * CLASSES
    model.eval()
    shapes: list[tuple[int, ...]] = []
    for stage in range(1, 5):
        model.stage_output(stage).register_forward_hook(lambda _m, _i, y: shapes.append(y.shape))
    logits(model, np.zeros((1, 3, 32, 32), np.uint8))
    assert shapes == [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8), (1, 512, 4, 4)]


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UsageError, match="unknown arch 'vgg': choose from resnet18"):
        ResNet(replace(spec(), arch="vgg"))


@pytest.mark.parametrize("stage", [0, 5, -1])
def test_a_stage_that_does_not_exist_is_named(stage: int) -> None:
    with pytest.raises(UsageError, match=f"has stages 1 to 4, not {stage}"):
        build_model(spec(), seed=0).stage_output(stage)
    with pytest.raises(UsageError, match="has stages 1 to 4"):
        ResNet(spec(mask_stage=stage, mask_shape=(1, 1, 1)))


# --- folding ------------------------------------------------------------------------------------


def with_mask(model: ResNet, stage: int, *, unit: bool) -> ResNet:
    channels = model.stage_output(stage).bn2.num_features
    side = 8 // 2 ** (stage - 1) if unit else 1
    mask = np.random.default_rng(stage).random((channels, side, side)) < 0.6
    model.stage_output(stage).mask = torch.from_numpy(mask.astype(np.float32))
    return model


@pytest.mark.parametrize(
    "make",
    [
        trained,
        lambda: trained(width=6),
        lambda: with_mask(trained(), 2, unit=False),
        lambda: with_mask(trained(), 4, unit=False),
        lambda: with_mask(trained(), 3, unit=True),
    ],
    ids=["plain", "width 6", "masked channels", "last stage masked", "masked units"],
)
def test_folding_changes_nothing(make: Callable[[], ResNet]) -> None:
    model = make()
    before = state_bytes(model)
    expected, actual = logits(model, IMAGES), logits(fold(model), IMAGES)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()
    assert state_bytes(model) == before


def test_folding_keeps_a_negative_and_a_zero_gain() -> None:
    model = trained()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0], module.weight[1] = 0.0, -0.7
    expected, actual = logits(model, IMAGES), logits(fold(model), IMAGES)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_folded_model_is_frozen_and_has_no_batch_norm() -> None:
    model = fold(trained())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_quantised_model_has_no_float_folding() -> None:
    with pytest.raises(ValueError, match="integerise"):
        fold(trained(bits=2))


# --- prediction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_predictions_are_of_the_clipped_bytes(batch_size: int) -> None:
    model = trained()
    delta = np.random.default_rng(0).integers(-60, 61, IMAGES.shape[1:]).astype(np.int16)
    attacked = np.clip(IMAGES.astype(np.int64) + delta, 0, 255).astype(np.uint8)
    assert (attacked == 255).any()
    device = torch.device("cpu")
    predicted = predict(model, IMAGES, delta, device=device, batch_size=batch_size)
    assert predicted.tolist() == logits(model, attacked).argmax(axis=1).tolist()
    clean = predict(model, IMAGES, None, device=device, batch_size=batch_size)
    assert clean.tolist() == logits(model, IMAGES).argmax(axis=1).tolist()
    assert clean.dtype == predicted.dtype == np.int64


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [trained, lambda: trained(bits=3), lambda: with_mask(trained(), 3, unit=True)],
    ids=["float", "apot", "masked"],
)
def test_a_checkpoint_is_kept_bit_for_bit(tmp_path: Path, make: Callable[[], ResNet]) -> None:
    model = make()
    mask = model.stage_output(3).mask
    if mask is not None:
        model.spec = replace(model.spec, mask_stage=3, mask_shape=tuple(mask.shape))
    path, again = tmp_path / "full.pt", tmp_path / "again.pt"
    save_checkpoint(path, model, variant="full", key="k", meta={"epochs": 3})
    checkpoint = load_checkpoint(path)
    assert (checkpoint.variant, checkpoint.key, checkpoint.meta) == ("full", "k", {"epochs": 3})
    assert checkpoint.spec == model.spec
    built = checkpoint.build()
    assert not built.training
    assert state_bytes(built) == state_bytes(model)
    assert np.array_equal(logits(built, IMAGES), logits(model, IMAGES))
    save_checkpoint(again, built, variant="full", key="k", meta={"epochs": 3})
    assert sha256_file(again) == sha256_file(path)


def test_a_model_in_another_memory_format_gives_the_same_bytes(tmp_path: Path) -> None:
    files = tmp_path / "a.pt", tmp_path / "b.pt"
    save_checkpoint(files[0], trained(), variant="full", key="k", meta={})
    transposed = trained().to(memory_format=torch.channels_last)
    save_checkpoint(files[1], transposed, variant="full", key="k", meta={})
    assert sha256_file(files[0]) == sha256_file(files[1])


def checkpoint_content() -> dict[str, Any]:
    model = trained()
    return {
        "format": 1,
        "variant": "full",
        "key": "k",
        "spec": asdict(model.spec),
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "meta": {},
    }


def refused(path: Path, content: dict[str, Any]) -> str:
    torch.save(content, path)
    with pytest.raises(UsageError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("field", ["variant", "key", "spec", "weights", "meta"])
def test_a_checkpoint_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    content = checkpoint_content()
    del content[field]
    message = refused(tmp_path / "c.pt", content)
    assert f"'{field}'" in message
    assert "`harness train` makes it again" in message


@pytest.mark.parametrize("field", sorted(asdict(spec())))
def test_a_spec_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    content = checkpoint_content()
    del content["spec"][field]
    assert f"'{field}'" in refused(tmp_path / "c.pt", content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", 3),
        ("key", None),
        ("meta", [1]),
        ("spec", [1, 2]),
        ("spec", None),
        ("weights", [1]),
        ("weights", None),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    assert str(tmp_path) in refused(tmp_path / "c.pt", checkpoint_content() | {field: value})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("arch", "vgg", "unknown arch 'vgg'"),
        ("width", 10**9, "width 1000000000"),
        ("width", 0, "width 0"),
        ("width", -8, "width -8"),
        ("width", "wide", "ValueError"),
        ("width", None, "TypeError"),
        ("width", float("inf"), "OverflowError"),
        ("width", float("nan"), "ValueError"),
        ("width", 8, "wrong shape"),
        ("classes", 10**9, "classes 1000000000"),
        ("classes", 1, "classes 1 "),
        ("classes", CLASSES + 1, "fc.weight has the wrong shape"),
        ("in_channels", 7, "in_channels 7"),
        ("in_channels", 1, "one value a channel"),
        ("bits", 5, "bits 5"),
        ("bits", 2, "does not hold the weights"),
        ("mean_255", (1, 2), "one value a channel"),
        ("mean_255", 3, "TypeError"),
        ("mean_255", (float("inf"), 0, 0), "OverflowError"),
        ("std_255", (1.0, 0.0, 1.0), "std must be positive"),
        ("std_255", (1.0, float("nan"), 1.0), "std must be positive"),
        ("bn_eps", float("nan"), "bn_eps must be positive"),
        ("bn_eps", -1.0, "bn_eps must be positive"),
        ("mask_shape", (10**5, 10**5, 1), "out of range"),
        ("mask_shape", (-1, 1, 1), "out of range"),
        ("mask_shape", (4, 4), "ValueError"),
    ],
)
def test_an_impossible_spec_is_refused(tmp_path: Path, field: str, value: Any, named: str) -> None:
    content = checkpoint_content()
    content["spec"][field] = value
    if field == "mask_shape":
        content["spec"]["mask_stage"] = 2
    assert named in refused(tmp_path / "c.pt", content)


def test_a_mask_in_a_stage_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    content = checkpoint_content()
    content["spec"] |= {"mask_stage": 9, "mask_shape": (4, 1, 1)}
    assert "stages 1 to 4" in refused(tmp_path / "c.pt", content)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("conv1.weight", lambda t: t.index_put_((torch.tensor(0),), torch.tensor(torch.nan)), ""),
        ("bn1.running_var", lambda t: t.fill_(torch.inf), "not finite"),
        ("fc.bias", lambda t: t[:-1], "wrong shape"),
        ("conv1.weight", lambda t: t.flatten(), "wrong shape"),
        ("conv1.weight", lambda t: t.double(), "not a plain torch.float32"),
        ("conv1.weight", lambda t: t.to(torch.complex64), "not a plain torch.float32"),
        ("fc.weight", lambda t: t.to_sparse(), "not a plain torch.float32"),
        ("fc.weight", lambda t: t.to("meta"), "not a plain torch.float32"),
        ("conv1.weight", lambda t: t.tolist(), "wrong shape"),
        ("bn1.num_batches_tracked", lambda t: t.float(), "not a plain torch.int64"),
    ],
)
def test_impossible_weights_are_refused(tmp_path: Path, name: str, change: Any, named: str) -> None:
    content = checkpoint_content()
    content["weights"][name] = change(content["weights"][name])
    message = refused(tmp_path / "c.pt", content)
    assert named in message
    assert name in message


@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_weights_of_another_model_are_refused(tmp_path: Path, change: str) -> None:
    content = checkpoint_content()
    weights = content["weights"]
    if change != "extra":
        kept = weights.pop("fc.bias")
    if change != "missing":
        weights["head.bias"] = weights["fc.weight"] if change == "extra" else kept
    assert "does not hold the weights of a resnet18" in refused(tmp_path / "c.pt", content)

"""Soft filter pruning, post-training pruning and APoT training on models of a few channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_cases import CLASSES, CPU, MEAN_255, STD_255, spec, split, state_bytes, trained
from torch import nn

from harness.compression.pp import least_active_mask, mean_activation
from harness.compression.sfp import (
    prunable_convs,
    zero_weakest_channels,
    zero_weakest_filters,
)
from harness.compression.variants import (
    BUILDERS,
    RELEVANT,
    Build,
    build_variant,
    planned_epochs,
    relevant_config,
    variant_seed,
)
from harness.config import Config, TrainConfig
from harness.data.dataset import Dataset
from harness.models.resnet import ResNet, build_model
from harness.presets import preset_named
from harness.records import VARIANTS, Method, UsageError, variant_named
from harness.training.loop import Recipe, train


def dataset() -> Dataset:
    return Dataset(
        name="patterns",
        classes=tuple("abcd"),
        train=split(48),
        calibration=split(40, seed=3),
        attack=split(48),
        evaluation=split(32, seed=4),
        flip=False,
        note="",
        digests={},
        fingerprint="f",
        mean_255=MEAN_255,
        std_255=STD_255,
    )


def small_config(**train: Any) -> Config:
    base = preset_named("quickstart")
    values: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "sfp_keep": 0.5,
        "pp_epochs": 1,
        "apot_epochs": 1,
        "crop_padding": 1,
    }
    return dataclasses.replace(
        base, width=4, train=dataclasses.replace(base.train, **(values | train))
    )


def build(name: str, tmp_path: Path, *, parent: ResNet | None = None, **train: Any) -> ResNet:
    return build_variant(
        Build(
            variant=variant_named(name),
            config=small_config(**train),
            data=dataset(),
            parent=parent,
            key=name,
            partial=tmp_path / "partial.pt",
            device=CPU,
            progress=lambda *_: None,
        )
    )


# --- soft filter pruning ------------------------------------------------------------------------


def zero_filters(conv: nn.Conv2d) -> set[int]:
    return {i for i, w in enumerate(conv.weight.detach()) if not w.any()}


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.25, 1.0, 0.01])
def test_exactly_the_filters_of_smallest_norm_are_zeroed(keep: float) -> None:
    model = trained(width=10, steps=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    zeroed = zero_weakest_filters(model, keep=keep)
    layers = dict(prunable_convs(model))
    assert set(zeroed) == set(layers)
    assert len(layers) == 17  # 20 convolutions, three of them shortcuts
    for name, conv in layers.items():
        old = before[f"{name}.weight"].double()
        n_zero = int(conv.out_channels * (1 - Fraction(str(keep))))
        norms = [float((w**2).sum()) for w in old]
        weakest = set(sorted(range(len(norms)), key=norms.__getitem__)[:n_zero])
        assert set(zeroed[name]) == zero_filters(conv) == weakest
        survivors = [i for i in range(conv.out_channels) if i not in weakest]
        assert torch.equal(conv.weight[survivors].double(), old[survivors])
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(parameter, before[name])


def test_zeroed_filters_receive_gradients_and_may_return() -> None:
    model = trained()
    zeroed = zero_weakest_filters(model, keep=0.5)
    biases = {n: m.bias.tolist() for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    model.train()
    images = split(32)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = F.cross_entropy(
        model(torch.from_numpy(images.images).float()), torch.from_numpy(images.labels)
    )
    loss.backward()
    optimiser.step()
    returned = {
        (name, i)
        for name, conv in prunable_convs(model)
        for i in zeroed[name]
        if conv.weight[i].any()
    }
    behind_relu, summed = set(), set()
    for name, which in zeroed.items():
        (summed if name.endswith("conv2") else behind_relu).update((name, i) for i in which)
    # A zeroed filter emits its batch norm's bias, so straight behind ReLU it learns only where
    # that is positive; a second convolution learns through the skip connection added to it.
    assert returned & behind_relu == {
        (name, i) for name, i in behind_relu if biases[name.replace("conv", "bn")][i] > 0
    }
    assert 0 < len(returned & behind_relu) < len(behind_relu)
    assert len(returned & summed) > 0.9 * len(summed)


def test_a_filter_zeroed_after_one_epoch_is_trained_in_the_next(tmp_path: Path) -> None:
    zeroed: list[set[tuple[str, int]]] = []
    back: list[bool] = []

    def prune(model: ResNet) -> None:
        if zeroed:
            layers = dict(prunable_convs(model))
            back.extend(bool(layers[name].weight[i].any()) for name, i in zeroed[-1])
        pruned = zero_weakest_filters(model, keep=0.5)
        zeroed.append({(name, i) for name, which in pruned.items() for i in which})

    recipe = Recipe(
        epochs=6,
        batch_size=16,
        schedule="step",
        decay_epochs=(),
        momentum=0.9,
        weight_decay=1e-4,
        learning_rates={"": 0.1},
        crop_padding=0,
        flip=False,
        after_epoch=prune,
    )
    train(
        build_model(spec(), seed=1),
        split(48),
        recipe,
        seed=0,
        key="k",
        partial=tmp_path / "p.pt",
        device=CPU,
        progress=lambda *_: None,
    )
    assert len(zeroed) == 6
    assert sum(back) > 0.5 * len(back)  # most, before the next pruning
    assert any(later != zeroed[0] for later in zeroed[1:])  # and some stay: the choice is anew


@pytest.mark.parametrize("name", ["sfp", "sfp_mixup", "sfp_cutout"])
def test_a_soft_pruned_model_ends_pruned_in_every_layer(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path, sfp_keep=0.7)
    assert not model.training
    for layer, conv in prunable_convs(model):
        assert len(zero_filters(conv)) == int(conv.out_channels * 0.3 + 1e-9), layer
    for layer, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and "downsample" in layer:
            assert zero_filters(conv) == set()


# --- post-training pruning ----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.1])
def test_coupled_pruning_zeroes_the_channels_of_smallest_joint_norm(keep: float) -> None:
    model = build_model(spec(width=16), seed=1)
    expected = {}
    for index, stage in enumerate(model.stages):
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        convs += [model.conv1] if index == 0 else []
        joint = sum(conv.weight.detach().double().pow(2).sum((1, 2, 3)) for conv in convs)
        assert isinstance(joint, torch.Tensor)
        n_zero = int(len(joint) * (1 - Fraction(str(keep))))
        expected[f"stages.{index}"] = tuple(sorted(joint.argsort()[:n_zero].tolist()))
    zeroed = zero_weakest_channels(model, keep=keep)
    assert zeroed == expected
    for index, stage in enumerate(model.stages):
        for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
            zero = torch.where(conv.weight.flatten(1).abs().sum(1) == 0)[0].tolist()
            assert tuple(zero) == expected[f"stages.{index}"]


def test_coupled_training_ends_with_one_set_a_stage(tmp_path: Path) -> None:
    model = build("sfp", tmp_path, sfp_coupling="stage")
    for stage in model.stages:
        sets = {
            tuple(torch.where(conv.weight.flatten(1).abs().sum(1) == 0)[0].tolist())
            for conv in stage.modules()
            if isinstance(conv, nn.Conv2d)
        }
        assert len(sets) == 1
        assert len(sets.pop()) == stage[0].bn1.num_features // 2


def test_mean_activation_is_the_mean_of_the_blocks_output() -> None:
    model, images = trained(), split(40, seed=3).images
    outputs: list[torch.Tensor] = []
    handle = model.stage_output(2).register_forward_hook(lambda _m, _i, y: outputs.append(y))
    with torch.no_grad():
        for image in images:
            model(torch.from_numpy(image[None]).float())
    handle.remove()
    expected = np.mean([y[0].double().numpy() for y in outputs], axis=0)
    for batch_size in (7, 40, 256):
        actual = mean_activation(model, images, stage=2, batch_size=batch_size)
        assert actual.dtype == torch.float64
        assert actual.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not model.stage_output(2)._forward_hooks


@pytest.mark.parametrize("keep", [0.7, 0.9, 0.5, 1.0])
@pytest.mark.parametrize("granularity", ["channel", "unit"])
def test_exactly_the_least_active_are_masked(granularity: str, keep: float) -> None:
    activation = torch.rand((10, 4, 4), generator=torch.Generator().manual_seed(0)).double()
    mask = least_active_mask(activation, keep=keep, granularity=granularity)
    score = activation.mean(dim=(1, 2)) if granularity == "channel" else activation.flatten()
    n_zero = round(len(score) * (1 - keep))
    weakest = sorted(range(len(score)), key=score.tolist().__getitem__)[:n_zero]
    assert mask.shape == ((10, 1, 1) if granularity == "channel" else (10, 4, 4))
    assert mask.flatten().tolist() == [0.0 if i in weakest else 1.0 for i in range(len(score))]


def test_the_number_masked_is_rounded_down() -> None:
    mask = least_active_mask(torch.rand(16, 2, 2), keep=0.7, granularity="channel")
    assert int((mask == 0).sum()) == 4  # 4.8


@pytest.mark.parametrize("granularity", ["channel", "unit"])
@pytest.mark.parametrize(("name", "stage"), [("pp2", 2), ("pp3", 3), ("pp4", 4)])
def test_a_pruned_model_masks_what_its_parent_used_least(
    name: str, stage: int, granularity: str, tmp_path: Path
) -> None:
    parent = trained()
    before = state_bytes(parent)
    activation = mean_activation(parent, dataset().calibration.images, stage=stage)
    mask = least_active_mask(activation, keep=0.7, granularity=granularity)
    model = build(name, tmp_path, parent=parent, pp_granularity=granularity, pp_lr=0.05)
    assert (model.spec.mask_stage, model.spec.mask_shape) == (stage, tuple(mask.shape))
    masks = {s: model.stage_output(s).mask for s in range(1, 5)}
    for s, kept in masks.items():
        assert (kept is None) == (s != stage)
    assert masks[stage] is not None
    assert torch.equal(masks[stage], mask)  # fine-tuning did not touch it
    changed = {n for n, value in state_bytes(model).items() if before.get(n) not in (value, None)}
    assert "conv1.weight" in changed  # but it did fine-tune
    assert state_bytes(parent) == before
    outputs: list[torch.Tensor] = []
    model.stage_output(stage).register_forward_hook(lambda _m, _i, y: outputs.append(y))
    with torch.no_grad():
        model(torch.from_numpy(dataset().evaluation.images).float())
    assert not (outputs[0] * (1 - mask)).any()


def test_without_fine_tuning_only_the_mask_is_new(tmp_path: Path) -> None:
    parent = trained()
    model = build("pp3", tmp_path, parent=parent, pp_epochs=0)
    mine = state_bytes(model)
    del mine["stages.2.1.mask"]
    assert mine == state_bytes(parent)


def test_masked_channels_receive_no_gradient() -> None:
    model = trained()
    mask = torch.ones(8, 1, 1)
    mask[[1, 5]] = 0
    model.stage_output(2).mask = mask
    block = model.stage_output(2)
    model(torch.from_numpy(split(8).images).float()).square().sum().backward()
    for parameter in (block.conv2.weight, block.bn2.weight, block.bn2.bias):
        assert parameter.grad is not None
        received = (
            parameter.grad.flatten(1).any(dim=1)
            if parameter.grad.ndim > 1
            else (parameter.grad != 0)
        )
        assert (~received).nonzero().flatten().tolist() == [1, 5]


# --- APoT ---------------------------------------------------------------------------------------


def test_quantisation_starts_from_the_weights_of_its_parent(tmp_path: Path) -> None:
    full = trained()
    q4 = build("q4", tmp_path, parent=full, apot_epochs=0)
    copied = state_bytes(q4)
    assert {n: v for n, v in copied.items() if not n.endswith("_alpha")} == state_bytes(full)
    alphas = {n: p.item() for n, p in q4.named_parameters() if n.endswith("_alpha")}
    assert set(alphas.values()) == {3.0, 8.0}
    assert len(alphas) == 2 * 19  # every convolution but the stem
    with torch.no_grad():
        for name, parameter in q4.named_parameters():
            if name.endswith("_alpha"):
                parameter.mul_(0.5)
    q3 = build("q3", tmp_path, parent=q4, apot_epochs=0)
    assert q3.spec.bits == 3
    assert state_bytes(q3) == state_bytes(q4)  # the learned clips too


def test_quantised_training_moves_weights_and_clips(tmp_path: Path) -> None:
    full = trained()
    q4 = build("q4", tmp_path, parent=full)
    before = state_bytes(build("q4", tmp_path, parent=full, apot_epochs=0))
    after = state_bytes(q4)
    for name in ("conv1.weight", "fc.weight"):
        assert after[name] != before[name]
    clips = [name for name in after if name.endswith("_alpha")]
    assert all(after[name] != before[name] for name in clips)
    assert all(bool(torch.isfinite(p).all()) for p in q4.parameters())


def test_a_parent_with_other_layers_is_refused(tmp_path: Path) -> None:
    parent = trained()
    parent.stage_output(2).mask = torch.ones(8, 1, 1)
    with pytest.raises(UsageError, match="full cannot start q4"):
        build("q4", tmp_path, parent=parent)


# --- recipes ------------------------------------------------------------------------------------


def test_every_method_has_a_recipe() -> None:
    methods = set(get_args(Method))
    assert set(BUILDERS) == set(RELEVANT) == methods == {v.method for v in VARIANTS}
    train_config = TrainConfig()
    epochs = {v.name: planned_epochs(v, train_config) for v in VARIANTS}
    assert (epochs["full"], epochs["sfp"]) == (160, 160)
    assert (epochs["pp2"], epochs["q2"]) == (20, 100)


def test_every_variant_has_a_seed_of_its_own() -> None:
    seeds = [variant_seed(seed, v.name) for seed in (0, 1) for v in VARIANTS]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert variant_seed(0, "full") == 923932007  # the same on every machine, for ever


@pytest.mark.parametrize("name", ["full", "sfp"])
def test_the_same_seed_trains_the_same_bytes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = state_bytes(build(name, tmp_path))
    torch.manual_seed(2)
    assert state_bytes(build(name, tmp_path)) == first
    initial = build_model(spec(), seed=variant_seed(0, name))
    assert state_bytes(initial)["fc.weight"] != first["fc.weight"]
    assert initial.spec.classes == CLASSES


def change(value: Any) -> Any:
    if isinstance(value, str):
        other = {"step": "one_cycle", "channel": "unit", "layer": "stage"}
        return (other | {"fp32": "bf16", "scratch": "full"})[value]
    return (*value, 99) if isinstance(value, tuple) else value / 2 if value else 1


def depends(name: str) -> set[str]:
    """The keys of [train] that decide whether this variant must be trained again."""
    base = Config()
    plain: Callable[[Config], Any] = lambda c: relevant_config(variant_named(name), c)  # noqa: E731
    return {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if plain(
            dataclasses.replace(
                base,
                train=dataclasses.replace(
                    base.train, **{field.name: change(getattr(base.train, field.name))}
                ),
            )
        )
        != plain(base)
    }


def test_only_what_matters_makes_a_variant_stale() -> None:
    keys = {v.name: depends(v.name) for v in VARIANTS}
    assert "lr" in keys["full"]
    assert not {k for k in keys["full"] if k.startswith(("sfp_", "pp_", "apot_", "mixup", "cut"))}
    assert keys["sfp"] - keys["full"] >= {"sfp_keep"}
    assert keys["sfp_mixup"] - keys["sfp"] == {"mixup_alpha"}
    assert keys["sfp_cutout"] - keys["sfp"] == {"cutout_size"}
    assert {k for k in keys["pp2"] if "_" in k and k.startswith("pp")} == {
        "pp_keep",
        "pp_granularity",
        "pp_epochs",
        "pp_lr",
    }
    assert {k for k in keys["q2"] if k.startswith("apot")} == {
        "apot_epochs",
        "apot_lr",
        "apot_alpha_lr_activation",
        "apot_alpha_lr_weight",
    }
    assert {"nesterov", "precision"} <= keys["full"]
    assert "sfp_start" in keys["sfp"]
    # An option that is new changes no key while it is off: nobody's models are trained again.
    assert not {"nesterov", "precision", "sfp_start"} & set(
        relevant_config(variant_named("sfp"), Config())
    )
    for name in keys:
        other = dataclasses.replace(Config(), width=32)
        variant = variant_named(name)
        assert relevant_config(variant, other) != relevant_config(variant, Config())

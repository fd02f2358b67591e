"""How each variant is made: a short table from method to function.

Enters: a `Config`, the data, and the parent's checkpoint where there is one. Leaves: a trained
`ResNet` in eval mode. Adding a method is one entry here and one file beside this one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.compression.pp import least_active_mask, mean_activation
from harness.compression.sfp import COUPLINGS
from harness.config import Config, TrainConfig
from harness.data.dataset import Dataset
from harness.models.resnet import ModelSpec, ResNet, build_model
from harness.records import Method, UsageError, Variant
from harness.training.loop import Progress, Recipe, train

VERSION = 3
"""Raised when training changes what it makes; every checkpoint is then rebuilt."""


@dataclass(frozen=True)
class Build:
    """Everything that making one variant needs."""

    variant: Variant
    config: Config
    data: Dataset
    parent: ResNet | None
    key: str
    partial: Path
    device: torch.device
    progress: Progress

    @property
    def seed(self) -> int:
        """One seed a variant: variants trained from scratch share neither weights nor order."""
        return variant_seed(self.config.seed, self.variant.name)


def build_variant(build: Build) -> ResNet:
    """Train or compress one variant.

    Raises:
        UsageError: the configuration cannot be applied to this architecture.
    """
    return BUILDERS[build.variant.method](build)


def variant_seed(seed: int, variant: str) -> int:
    """A seed for one variant, the same on every machine (unlike Python's `hash`)."""
    return zlib.crc32(f"{seed}/{variant}".encode()) % 2**31


def relevant_config(variant: Variant, config: Config) -> dict[str, Any]:
    """The part of the configuration a variant's weights depend on, besides its parent."""
    train_config = config.train
    common: dict[str, Any] = {
        "arch": config.arch,
        "width": config.width,
        "seed": config.seed,
        "batch_size": train_config.batch_size,
        "schedule": train_config.schedule,
        "decay_epochs": train_config.decay_epochs,
        "momentum": train_config.momentum,
        "weight_decay": train_config.weight_decay,
        "bn_eps": train_config.bn_eps,
        "crop_padding": train_config.crop_padding,
        "epochs": train_config.epochs,
    }
    for name in RELEVANT[variant.method]:
        common[name] = getattr(train_config, name)
    # Named only where they are not what they were before there was a choice: no model is retrained
    # for a new option.
    defaults = TrainConfig()
    for name in ("nesterov", "precision", *(("sfp_start",) if variant.method == "sfp" else ())):
        if getattr(train_config, name) != getattr(defaults, name):
            common[name] = getattr(train_config, name)
    if variant.augment != "mixup":
        common.pop("mixup_alpha", None)
    if variant.augment != "cutout":
        common.pop("cutout_size", None)
    return common


def parent_of(variant: Variant, config: Config) -> str | None:
    """The variant whose checkpoint this one starts from; None when trained from scratch."""
    if variant.method == "sfp" and config.train.sfp_start == "full":
        return "full"
    return variant.parent


RELEVANT: dict[Method, tuple[str, ...]] = {
    "full": ("lr",),
    "sfp": ("lr", "sfp_keep", "sfp_coupling", "mixup_alpha", "cutout_size"),
    "pp": ("pp_keep", "pp_granularity", "pp_epochs", "pp_lr"),
    "apot": ("apot_epochs", "apot_lr", "apot_alpha_lr_activation", "apot_alpha_lr_weight"),
}


def _full(build: Build) -> ResNet:
    model = build_model(_spec(build), seed=build.seed)
    _train(build, model, _base_recipe(build.config.train, build.data))
    return model


def _sfp(build: Build) -> ResNet:
    train_config = build.config.train

    def prune(model: ResNet) -> None:
        COUPLINGS[train_config.sfp_coupling](model, keep=train_config.sfp_keep)

    model = build_model(_spec(build), seed=build.seed)
    if build.parent is not None:
        model.load_state_dict(build.parent.state_dict())
    recipe = replace(
        _base_recipe(train_config, build.data),
        after_epoch=prune,
        mixup_alpha=train_config.mixup_alpha if build.variant.augment == "mixup" else None,
        cutout_size=train_config.cutout_size if build.variant.augment == "cutout" else None,
    )
    if build.parent is not None:  # a tenth of the rate from a trained model (He et al. 2018)
        recipe = replace(recipe, learning_rates={"": train_config.lr / 10})
    _train(build, model, recipe)
    return model


def _pp(build: Build) -> ResNet:
    parent, stage = build.parent, build.variant.stage
    assert parent is not None
    assert stage is not None
    train_config = build.config.train
    parent = parent.to(build.device).eval()
    activation = mean_activation(parent, build.data.calibration.images, stage=stage)
    mask = least_active_mask(
        activation, keep=train_config.pp_keep, granularity=train_config.pp_granularity
    )
    channels, height, width = mask.shape
    spec = replace(parent.spec, mask_stage=stage, mask_shape=(channels, height, width))
    model = build_model(spec, seed=build.seed)
    model.load_state_dict(parent.state_dict(), strict=False)
    model.stage_output(stage).mask = mask.float().cpu()
    recipe = replace(
        _fine_tuning(train_config, build.data, epochs=train_config.pp_epochs),
        learning_rates={"": train_config.pp_lr},
    )
    _train(build, model, recipe)
    return model


def _apot(build: Build) -> ResNet:
    parent, bits = build.parent, build.variant.bits
    assert parent is not None
    assert bits is not None
    train_config = build.config.train
    model = build_model(replace(parent.spec, bits=bits), seed=build.seed)
    # Progressive initialisation: full -> 4 -> 3 -> 2 bits. A float parent has no clips.
    missing, unexpected = model.load_state_dict(parent.state_dict(), strict=False)
    if unexpected or any(not name.endswith("_alpha") for name in missing):
        raise UsageError(f"{build.variant.parent} cannot start {build.variant.name}: other layers")
    recipe = replace(
        _fine_tuning(train_config, build.data, epochs=train_config.apot_epochs),
        precision="fp32",  # bf16 would move activations across the quantisers' thresholds
        learning_rates={
            "": train_config.apot_lr,
            "activation_alpha": train_config.apot_alpha_lr_activation,
            "weight_alpha": train_config.apot_alpha_lr_weight,
        },
    )
    _train(build, model, recipe)
    return model


BUILDERS: dict[Method, Callable[[Build], ResNet]] = {
    "full": _full,
    "sfp": _sfp,
    "pp": _pp,
    "apot": _apot,
}


def planned_epochs(variant: Variant, train_config: TrainConfig) -> int:
    """Passes over the training split that making this variant takes."""
    by_method: dict[Method, int] = {
        "full": train_config.epochs,
        "sfp": train_config.epochs,
        "pp": train_config.pp_epochs,
        "apot": train_config.apot_epochs,
    }
    return by_method[variant.method]


def _spec(build: Build) -> ModelSpec:
    data = build.data
    return ModelSpec(
        arch=build.config.arch,
        width=build.config.width,
        in_channels=data.train.images.shape[1],
        classes=len(data.classes),
        mean_255=data.mean_255,
        std_255=data.std_255,
        bn_eps=build.config.train.bn_eps,
    )


def _base_recipe(train_config: TrainConfig, data: Dataset) -> Recipe:
    return Recipe(
        epochs=train_config.epochs,
        batch_size=train_config.batch_size,
        schedule=train_config.schedule,
        decay_epochs=train_config.decay_epochs,
        momentum=train_config.momentum,
        nesterov=train_config.nesterov,
        precision=train_config.precision,
        weight_decay=train_config.weight_decay,
        learning_rates={"": train_config.lr},
        crop_padding=train_config.crop_padding,
        flip=data.flip,
    )


def _fine_tuning(train_config: TrainConfig, data: Dataset, *, epochs: int) -> Recipe:
    # The decay epochs belong to the base schedule: here they fall at the same fractions of it.
    scaled = tuple(round(d * epochs / train_config.epochs) for d in train_config.decay_epochs)
    return replace(_base_recipe(train_config, data), epochs=epochs, decay_epochs=scaled)


def _train(build: Build, model: ResNet, recipe: Recipe) -> None:
    train(
        model,
        build.data.train,
        recipe,
        seed=build.seed,
        key=build.key,
        partial=build.partial,
        device=build.device,
        progress=build.progress,
    )

"""Arms of the audit: workspaces that differ from the audited one by one choice each.

Enters: the audited configuration. Leaves: that of an arm. The choices are those found in the
authors' public code (github mataach/adversarial_ml, kenny-co/sgd-uap-torch), not in their paper.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from typing import Any

from harness.config import Config
from harness.config_file import config_from_dict, to_toml

BASE = "base"
"""The audited workspace itself."""
_LATER_SEED = re.compile(r"(?:seed|(?P<arm>.+)_s)(?P<offset>[1-9][0-9]?)")
"""Names of arms that `in_seed` makes."""


@dataclass(frozen=True)
class Arm:
    """A workspace: the audited configuration with one choice changed."""

    name: str
    changes: dict[str, Any]
    """Key of `harness.toml`, with its table -> value."""
    what: str
    seed_offset: int = 0
    """Added to the audited seed: the same once more, trained and crafted anew."""


CRAFTED_ALIKE: dict[str, Any] = {
    "protocol": "paper",
    "attack": "sgd",
    "craft.attack_images": 10_000,
    "craft.batch_size": 250,
    "craft.epochs": 5,
}
"""As many images as CIFAR-10 has for evaluation, and 200 steps, as the authors made."""

ARMS = (
    Arm(
        "crafted_apart",
        {**CRAFTED_ALIKE, "craft.split": "attack", "craft.batch_norm": "eval"},
        "crafted on training images, batch norm in eval mode",
    ),
    Arm(
        "crafted_on_test",
        {**CRAFTED_ALIKE, "craft.split": "evaluation", "craft.batch_norm": "eval"},
        "crafted on the evaluated images themselves",
    ),
    Arm(
        "crafted_in_train_mode",
        {**CRAFTED_ALIKE, "craft.split": "attack", "craft.batch_norm": "train"},
        "crafted with batch norm in train mode",
    ),
    Arm("no_clamp", {"craft.beta": 1e6}, "loss not clamped"),
    Arm("small_step", {"craft.step": 0.05}, "steps of eps / 20"),
    Arm(
        "large_step",
        {"craft.step": 0.8, "craft.beta": 12.0},
        "steps of 0.8 eps, clamp 12 (their later code)",
    ),
    Arm("unit_masks", {"train.pp_granularity": "unit"}, "PP masks single activations"),
    Arm("sfp_from_full", {"train.sfp_start": "full"}, "SFP goes on from Full"),
    Arm("resnet20", {"arch": "resnet20"}, "ResNet-20"),
    Arm("not_augmented", {"train.crop_padding": 0}, "trained without crops and flips"),
    Arm("sfp_keep_90", {"train.sfp_keep": 0.9}, "SFP keeps 90 % of the filters"),
    Arm("sfp_keep_10", {"train.sfp_keep": 0.1}, "SFP keeps 10 % of the filters"),
)
"""Those without training first, then by what they tell: a time limit may cut the rest."""


def in_seed(arm: str, offset: int) -> str:
    """The name of an arm's repetition with the audited seed + `offset`; 0 is the arm itself."""
    if offset == 0:
        return arm
    return f"seed{offset}" if arm == BASE else f"{arm}_s{offset}"


def arm_named(name: str) -> Arm:
    """The arm of that name; the audited workspace is one that changes nothing.

    Raises:
        KeyError: there is none.
    """
    named = {arm.name: arm for arm in (Arm(BASE, {}, "as configured"), *ARMS)}
    if name in named:
        return named[name]
    later = _LATER_SEED.fullmatch(name)
    if later is None or later["arm"] == BASE:
        raise KeyError(name)
    repeated, offset = named[later["arm"] or BASE], int(later["offset"])
    what = f"{repeated.what}, seed + {offset}"
    return replace(repeated, name=name, what=what, seed_offset=offset)


def config_of(arm: Arm, audited: Config) -> Config:
    """The arm's configuration.

    Raises:
        UsageError: the change does not go with the rest of the configuration.
    """
    values = tomllib.loads(to_toml(audited))
    values["seed"] += arm.seed_offset
    for key, value in arm.changes.items():
        table, _, name = key.rpartition(".")
        (values[table] if table else values)[name] = value
    return config_from_dict(values, where=f"audit, arm {arm.name}")

"""Which perturbations an experiment has, by name.

Enters: the configuration. Leaves: `UapName`s, which `harness.pipeline.uaps` crafts.
"""

from __future__ import annotations

from dataclasses import replace

from harness.pipeline.context import Context
from harness.records import CONTROLS
from harness.workspace import UapName

GRADIENT_FREE = "spsa"
"""The attack that a gradient attack must beat (docs/adr/0010)."""


def white_box_names(context: Context, source: str) -> list[UapName]:
    """The untargeted UAPs of a source, one per budget of the configuration."""
    craft = context.config.craft
    budgets = sorted({*craft.eps, craft.transfer_eps})
    return [_name(context, source, eps) for eps in budgets]


def transfer_name(context: Context, source: str) -> UapName:
    """The UAP of a source that goes into the transfer matrix."""
    return _name(context, source, context.config.craft.transfer_eps)


def targeted_names(context: Context, source: str) -> list[UapName]:
    """The targeted UAPs of a source, one per target class."""
    eps = context.config.craft.transfer_eps
    return [_name(context, source, eps, target=target) for target in context.targets]


def gradient_free_names(context: Context, source: str) -> list[UapName]:
    """What shows whether the gradients of a source are masked; none where all is crafted so."""
    if context.config.attack == GRADIENT_FREE:
        return []
    name = transfer_name(context, source)
    return [replace(name, attack=GRADIENT_FREE)]


def control_names(context: Context) -> list[UapName]:
    """Random sign and chessboard at every budget."""
    return [name for control in CONTROLS for name in white_box_names(context, control)]


def _name(context: Context, source: str, eps: float, target: int | None = None) -> UapName:
    config = context.config
    return UapName(source, eps, target=target, seed=config.seed)


def attack_of(context: Context, name: UapName) -> str:
    """What a perturbation is crafted with: the workspace's attack unless its name says another."""
    return name.attack or context.config.attack

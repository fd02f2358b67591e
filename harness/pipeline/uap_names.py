"""Which perturbations an experiment has, by name.

Enters: the configuration. Leaves: `UapName`s, which `harness.pipeline.uaps` crafts.
Crafted ones come once for every crafting seed, the workspace's own seed last: what is registered
last is what a report draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.pipeline.context import Context
from harness.records import CONTROLS, PAPER_ORDER
from harness.sources import FLEET, leave_one_out
from harness.workspace import UapName

GRADIENT_FREE = "fourier"
"""The attack that a gradient attack must beat (docs/adr/0010)."""


def white_box_names(context: Context, source: str) -> list[UapName]:
    """The untargeted UAPs of a source, one per budget of the configuration and crafting seed."""
    craft = context.config.craft
    budgets = sorted({*craft.eps, *craft.transfer_budgets})
    return [_name(source, eps, seed) for seed in _seeds(context, source) for eps in budgets]


def transfer_names(context: Context, source: str) -> list[UapName]:
    """The UAPs of a source that go into the transfer matrices."""
    budgets = context.config.craft.transfer_budgets
    return [_name(source, eps, seed) for seed in _seeds(context, source) for eps in budgets]


def transfer_name(context: Context, source: str) -> UapName:
    """The UAP of a source that goes into the transfer matrix a report opens with."""
    return _name(source, context.config.craft.reference_eps, context.config.seed)


def targeted_names(context: Context, source: str) -> list[UapName]:
    """The targeted UAPs of a source, one per target class and crafting seed."""
    eps, seeds = context.config.craft.reference_eps, _seeds(context, source)
    return [_name(source, eps, seed, target=t) for seed in seeds for t in context.targets]


def fleet_names(context: Context) -> list[UapName]:
    """The UAPs of the whole fleet, one per transfer budget and crafting seed; none if it is off."""
    return transfer_names(context, FLEET) if context.config.craft.fleet_epochs else []


def leave_one_out_names(context: Context, victim: str) -> list[UapName]:
    """The UAPs of the fleet without this victim, as `fleet_names`."""
    return transfer_names(context, leave_one_out(victim)) if fleet_names(context) else []


def gradient_free_names(context: Context, source: str) -> list[UapName]:
    """What shows, at every budget, whether gradients were needed; none where all is crafted so."""
    if context.config.attack == GRADIENT_FREE:
        return []
    own_seed = context.config.seed
    names = [name for name in white_box_names(context, source) if name.seed == own_seed]
    return [replace(name, attack=GRADIENT_FREE) for name in names]


def control_names(context: Context) -> list[UapName]:
    """Random sign and chessboard at every budget."""
    return [name for control in CONTROLS for name in white_box_names(context, control)]


def named(
    context: Context, source: str, budgets: Sequence[float], targets: Sequence[int]
) -> list[UapName]:
    """UAPs of a source at these budgets, to these targets (none: untargeted), of every seed."""
    return [
        _name(source, eps, seed, target=target)
        for seed in _seeds(context, source)
        for eps in budgets
        for target in targets or (None,)
    ]


def matrix_names(context: Context, eps: float) -> list[UapName]:
    """The UAPs of a transfer matrix at any budget: of variants, of the fleet, and controls."""
    fleet = (FLEET,) if context.config.craft.fleet_epochs else ()
    sources = (*PAPER_ORDER, *fleet, *CONTROLS)
    return [name for source in sources for name in named(context, source, [eps], ())]


def _seeds(context: Context, source: str) -> list[int]:
    """Crafting seeds, the first last; nobody crafts a control."""
    config = context.config
    seeds = 1 if source in CONTROLS else config.craft.seeds
    return [config.seed + i for i in reversed(range(seeds))]


def _name(source: str, eps: float, seed: int, target: int | None = None) -> UapName:
    return UapName(source, eps, target=target, seed=seed)


def attack_of(context: Context, name: UapName) -> str:
    """What a perturbation is crafted with: the workspace's attack unless its name says another."""
    return name.attack or context.config.attack

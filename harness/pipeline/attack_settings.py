"""Which attack crafts a perturbation, with what settings, on which images.

Enters: the configuration and a perturbation's name. Leaves: frozen settings of one of the attacks
of `harness.crafting`. Adding an attack is an entry in `MAKERS` and a name in `ATTACKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from harness.config import CraftConfig
from harness.crafting.momentum import MomentumSettings
from harness.crafting.selection import selection_images
from harness.crafting.sgd import SgdSettings
from harness.crafting.waves import MOST_PASSES, FourierSettings
from harness.data.dataset import Split
from harness.pipeline.context import Context
from harness.pipeline.uap_names import attack_of
from harness.records import variant_named
from harness.sources import is_ensemble, members
from harness.workspace import UapName

Settings = SgdSettings | MomentumSettings | FourierSettings

FEWEST_PASSES, ENOUGH_PASSES = 512, 2_600
"""Attack `momentum` looks for a wave with a quarter of its budget, until that is enough to try all
frequencies of a small image, and then with a sixteenth; with fewer passes than some it would find
none that is worth its steps (docs/adr/0007)."""


def craft_split(context: Context) -> Split:
    """The images perturbations are crafted on."""
    data, split = context.data, context.config.craft.split
    if split == "protocol":
        split = "evaluation" if context.config.protocol == "paper" else "attack"
    return data.evaluation if split == "evaluation" else data.attack


def settings_of(context: Context, name: UapName) -> Settings:
    """How a perturbation is crafted, of the configuration, the protocol and its name."""
    craft = context.config.craft
    paper = context.config.protocol == "paper"
    # The authors left batch norm in train mode for all quantised, SVHN and targeted runs.
    # They had no ensembles; ours take no statistics of a batch.
    quantised = any(variant_named(member).method == "apot" for member in members(name.source))
    in_train_mode = quantised or context.data.name == "svhn" or name.target is not None
    if craft.batch_norm != "protocol":
        in_train_mode = craft.batch_norm == "train"
    train_mode = paper and in_train_mode and not is_ensemble(name.source)
    if is_ensemble(name.source):
        craft = replace(craft, epochs=craft.fleet_epochs)
    make = MAKERS[attack_of(context, name)]
    return for_target(make(craft, len(craft_split(context)), paper, train_mode), name.target)


def for_target(settings: Settings, target: int | None) -> Settings:
    """Towards a class a wave hardly leads: the steps are worth more."""
    if isinstance(settings, MomentumSettings) and target is not None:
        return replace(settings, waves=0)
    return settings


def probed(context: Context, name: UapName) -> bool:
    """Whether the source's gradients are measured beside this perturbation: one of each model."""
    return (
        name.target is None
        and name.eps == context.config.craft.reference_eps
        and name.seed == context.config.seed
        and not is_ensemble(name.source)
        and MAKERS[attack_of(context, name)] is not _fourier_settings
    )


def _sgd_settings(craft: CraftConfig, n: int, paper: bool, batch_statistics: bool) -> SgdSettings:
    return SgdSettings(
        epochs=craft.epochs,
        batch_size=craft.batch_size,
        step=craft.step,
        beta=craft.beta,
        shuffle=not paper,
        batch_statistics=batch_statistics,
        selection=selection_images(n) if craft.restarts > 1 else 0,
        restarts=craft.restarts,
    )


def _momentum_settings(
    craft: CraftConfig, n: int, paper: bool, batch_statistics: bool
) -> MomentumSettings:
    return MomentumSettings(
        epochs=craft.epochs,
        batch_size=craft.inner_batch,
        step=craft.step,
        beta=craft.beta,
        momentum=craft.momentum,
        shuffle=not paper,
        batch_statistics=batch_statistics,
        selection=selection_images(n),
        waves=_wave_passes(craft, n, batch_statistics),
        restarts=craft.restarts,
    )


def _wave_passes(craft: CraftConfig, n: int, batch_statistics: bool) -> int:
    # By the statistics of a batch, waves beside each other would change each other's results.
    budget = 0 if batch_statistics else 2 * craft.epochs * n
    passes = max(budget // 16, min(budget // 4, ENOUGH_PASSES))
    return min(MOST_PASSES, passes) if passes >= FEWEST_PASSES else 0


def _fourier_settings(
    craft: CraftConfig, n: int, _paper: bool, _statistics: bool
) -> FourierSettings:
    # A gradient evaluation counts as two forward passes.
    return FourierSettings(passes=min(MOST_PASSES, 2 * craft.epochs * n))


MAKERS: dict[str, Callable[[CraftConfig, int, bool, bool], Settings]] = {
    "sgd": _sgd_settings,
    "momentum": _momentum_settings,
    "fourier": _fourier_settings,
}
"""(configuration, attack images, protocol `paper`, batch statistics) -> the attack's settings."""


def evaluations(settings: Settings, n: int) -> int:
    """Gradient evaluations one perturbation is worth, over n images."""
    if isinstance(settings, FourierSettings):
        return max(1, settings.passes // 2)
    return settings.epochs * settings.restarts * n


def settings_key(settings: Settings) -> dict[str, object]:
    """What is crafted from one start, or without a wave, is what it was before there were more."""
    values = asdict(settings)
    if not isinstance(settings, FourierSettings) and settings.restarts == 1:
        del values["restarts"]
        if isinstance(settings, SgdSettings):
            del values["selection"]
    if isinstance(settings, MomentumSettings) and not settings.waves:
        del values["waves"]
    return values

"""What a perturbation's file must be: what can be asked for, and whether the file there is that.

Enters: a context and a `UapName`. Leaves: a digest of all it depends on; whether the file on disk
has it; one clear error for names that nothing can be crafted for.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from harness.artefacts import cache_key
from harness.config_rules import ATTACKS, MAX_EPS_255, MIN_EPS_255
from harness.crafting.perturbation import load_perturbation
from harness.pipeline.attack_settings import craft_split, probed, settings_key, settings_of
from harness.pipeline.checkpoints import checkpoint_key, valid_checkpoint
from harness.pipeline.context import Context
from harness.pipeline.tasks import note
from harness.pipeline.uap_names import attack_of
from harness.records import CONTROLS, UsageError, variant_named
from harness.sources import is_ensemble, members
from harness.workspace import UapName

VERSION = 1
PROBE_VERSION = 1
MAX_SEED = 2**31
"""As in harness.toml."""


def uap_key(context: Context, name: UapName) -> str:
    """Digest of everything the perturbation depends on."""
    shape, config = context.image_shape, context.config
    labels = [context.data.name, config.protocol]
    if name.source in CONTROLS:
        return cache_key("control", VERSION, name=name.stem, shape=shape, labels=labels)
    role = "attack" if craft_split(context) is context.data.attack else "evaluation"
    # Written only where there is one: other perturbations stay valid.
    more: dict[str, object] = {"probe": PROBE_VERSION} if probed(context, name) else {}
    return cache_key(
        "craft",
        VERSION,
        attack=attack_of(context, name),
        eps=name.eps,
        target=name.target,
        seed=name.seed,
        settings=settings_key(settings_of(context, name)),
        labels=labels,
        source=_source_key(context, name.source),
        images=context.data.digests[role],
        **more,
    )


def _source_key(context: Context, source: str) -> str | dict[str, str]:
    keys = {name: checkpoint_key(context, variant_named(name)) for name in members(source)}
    return keys if is_ensemble(source) else keys[source]


def checkpoints_sha256(context: Context, source: str) -> str:
    """Digest of the checkpoint a source is crafted on; of an ensemble, of all of them."""
    found = [context.sha256(context.workspace.checkpoint(name)) for name in members(source)]
    if not is_ensemble(source):
        return found[0]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def valid_uap(context: Context, name: UapName) -> bool:
    """Whether the perturbation on disk is what the configuration asks for, and whole."""
    path = context.workspace.uap(name)
    if not path.exists():
        return False
    try:
        perturbation = load_perturbation(path, own=True)
    except UsageError:  # damaged: made again
        return False
    if perturbation.meta.get("key") != uap_key(context, name):
        return False
    if name.source in CONTROLS:
        return True
    variants = [variant_named(member) for member in members(name.source)]
    if not all(valid_checkpoint(context, variant) for variant in variants):
        return False
    return perturbation.meta.get("checkpoint_sha256") == checkpoints_sha256(context, name.source)


def say_if_damaged(context: Context, name: UapName) -> None:
    """A perturbation that cannot be read is made again; its owner should know."""
    path = context.workspace.uap(name)
    if path.exists():
        try:
            load_perturbation(path, own=True)
        except UsageError as error:
            note(context.reporter, f"crafting {name.stem} again: {error}".partition(": delete")[0])


def check_request(context: Context, name: UapName) -> None:
    """Refuse a budget, a seed or a target class that there is not, of whatever source.

    Raises:
        UsageError: naming the perturbation and the limit.
    """
    if not MIN_EPS_255 <= name.eps <= MAX_EPS_255:
        raise UsageError(
            f"{name.stem}: eps {name.eps:g} must be from {MIN_EPS_255:g} to {MAX_EPS_255:g} "
            "(1/255 units)"
        )
    if name.seed >= MAX_SEED:
        raise UsageError(f"{name.stem}: seed {name.seed} must be below 2^31")
    if name.target is not None and name.target >= len(context.data.classes):
        n_classes = len(context.data.classes)
        raise UsageError(
            f"{name.stem}: target {name.target}, but there are {n_classes} classes,"
            f" 0 to {n_classes - 1}"
        )


def check_name(context: Context, name: UapName) -> None:
    """Refuse what cannot be crafted.

    Raises:
        UsageError: a source, target, attack, budget or seed that does not exist.
    """
    if name.source in CONTROLS and name.target is not None:
        raise UsageError(f"{name.stem}: a control has no target class")
    check_request(context, name)
    if name.source in CONTROLS:
        return
    members(name.source)
    if is_ensemble(name.source) and not context.config.craft.fleet_epochs:
        raise UsageError(
            f"{name.stem}: craft.fleet_epochs is 0 in harness.toml: set it to craft on the fleet"
        )
    if name.attack == context.config.attack:
        plain = replace(name, attack="").stem
        raise UsageError(f"{name.stem}: {name.attack} is this workspace's attack: name it {plain}")
    if attack_of(context, name) not in ATTACKS:
        known = ", ".join(ATTACKS)
        raise UsageError(f"{name.stem}: unknown attack {name.attack!r}; this version has {known}")

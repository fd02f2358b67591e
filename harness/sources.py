"""What a perturbation was crafted on: a variant, the fleet, the fleet without one, or nothing.

The fleet is all variants of a workspace at once. `fleet_without_q4` is crafted on all but `q4`
and applied to `q4`: the leave-one-out ensemble of the transfer literature (Liu et al. 2017,
"Delving into Transferable Adversarial Examples", section 5), what an attacker achieves who has
the rest of the fleet but not the deployed model.

Standard library only, and names only: nothing here reads or writes a file.
"""

from __future__ import annotations

from harness.records import CONTROLS, DEPLOYABLE, PAPER_ORDER, deployable_named, variant_named

FLEET = "fleet"
LEAVE_ONE_OUT = "fleet_without"
"""The kind of all `fleet_without_VARIANT`, where each victim has its own."""


def leave_one_out(variant: str) -> str:
    """The source that is the fleet without one variant."""
    return f"{LEAVE_ONE_OUT}_{variant}"


def left_out(source: str) -> str | None:
    """The variant a source leaves out of the fleet; None for every other source."""
    variant = source.removeprefix(f"{LEAVE_ONE_OUT}_")
    return variant if variant != source else None


def is_ensemble(source: str) -> bool:
    """Whether it is crafted on several variants at once."""
    return source == FLEET or left_out(source) is not None


def is_source(source: str) -> bool:
    """Whether this version can make the perturbations of that name."""
    variant = left_out(source)
    known = source if variant is None else variant
    return known in PAPER_ORDER or (variant is None and source in (FLEET, *CONTROLS))


def members(source: str) -> tuple[str, ...]:
    """The variants a source's perturbations are crafted on, in the paper's order; none: a control.

    Raises:
        UsageError: a variant that does not exist or is not trained; the message lists those that
            are.
    """
    if source in CONTROLS:
        return ()
    without = left_out(source)
    if source != FLEET:
        variant_named(source if without is None else without)
    if not is_ensemble(source):
        return (source,)
    return tuple(name for name in PAPER_ORDER if name != without)


def source_label(source: str) -> str:
    """How the report prints a model or a UAP's source: its label, or what it is."""
    if source in DEPLOYABLE:
        return deployable_named(source).label
    if (variant := left_out(source)) is not None and variant in PAPER_ORDER:
        return f"fleet without {deployable_named(variant).label}"
    return {"random": "random sign", LEAVE_ONE_OUT: "leave-one-out"}.get(source, source)

"""What the report is about, of all that a store may hold: device, crafting run, budgets, baseline.

Enters: result rows. Leaves: the choice; `reports.selection` gathers what belongs to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from harness.records import CONTROLS, DEPLOYABLE, ResultRow, UsageError
from harness.sources import is_source
from harness.store import Store
from reports.view import GRADIENT_FREE, Craft, DeviceId, VariantView

REFERENCE_EPS = 10.0


def device_of(row: ResultRow) -> DeviceId:
    return DeviceId(row.device, row.emulated)


def headline_device(rows: list[ResultRow], device: str | None) -> DeviceId:
    places = Counter(device_of(row) for row in rows)
    if device is not None:
        matching = [place for place in places if place.name == device]
        if not matching:
            known = ", ".join(sorted({place.name for place in places}))
            raise UsageError(
                f"no results from device {device!r}: choose from {known}, or run"
                f" `harness attack-device --device {device}`"
            )
        return min(matching)  # a real board before its emulation
    local = DeviceId("local", emulated=False)
    if local in places:
        return local
    return min(places, key=lambda place: (-places[place], place))


def headline_craft(rows: list[ResultRow]) -> Craft | None:
    """The (protocol, attack, seed) with most untargeted rows; the newest where they tie.

    Not that of searches alone, which stand beside what they check: on one model they are as many.
    """
    campaigns = {
        craft_of(row) for row in rows if row.target is not None or row.uap_source != row.variant
    }
    main = [row for row in rows if row.attack not in GRADIENT_FREE or craft_of(row) in campaigns]
    rows = main if any(craft_of(row) is not None for row in main) else rows
    crafts = [c for row in rows if row.target is None and (c := craft_of(row)) is not None]
    crafts = crafts or [c for row in rows if (c := craft_of(row)) is not None]
    counts, newest = Counter(crafts), {craft: rank for rank, craft in enumerate(crafts)}
    return max(counts, key=lambda c: (counts[c], newest[c]), default=None)


def craft_of(row: ResultRow) -> Craft | None:
    if row.uap_source is None or row.uap_source in CONTROLS:
        return None
    return row.protocol or "", row.attack or "", row.seed or 0


def in_headline(row: ResultRow, craft: Craft | None) -> bool:
    own = craft_of(row)
    return own is None or own == craft


def choose_reference_eps(rows: list[ResultRow], craft: Craft | None) -> float | None:
    """The budget of the transfer matrix; without one 10/255, else the largest there is."""
    untargeted = [row for row in rows if row.target is None and row.eps is not None]
    crafted = [row for row in untargeted if craft_of(row) == craft and craft is not None]
    budgets = {row.eps for row in crafted or untargeted if row.eps is not None}
    transfers = Counter(row.eps for row in crafted if row.uap_source != row.variant)
    return max(budgets, key=lambda eps: (transfers[eps], eps == REFERENCE_EPS, eps), default=None)


def choose_targeted_eps(
    rows: list[ResultRow], craft: Craft | None, reference: float | None
) -> float | None:
    budgets = Counter(
        row.eps
        for row in rows
        if row.target is not None and row.uap_source == row.variant and in_headline(row, craft)
    )
    return max(
        (eps for eps in budgets if eps is not None),
        key=lambda eps: (budgets[eps], eps == reference, eps),
        default=None,
    )


def is_search(row: ResultRow, craft: Craft | None) -> bool:
    """A search on the victim itself, beside a headline attack that uses gradients."""
    return (
        row.attack in GRADIENT_FREE
        and craft is not None
        and craft[:1] == (row.protocol or "",)
        and craft[1] not in GRADIENT_FREE
        and (row.uap_source, row.target) == (row.variant, None)
    )


def choose_baseline(store: Store, variants: tuple[VariantView, ...], wanted: str | None) -> str:
    """The name of the model that others are compared with, as `build_view` has it.

    Raises:
        UsageError: the one wanted was not measured.
    """
    names = [variant.name for variant in variants]
    if wanted is not None:
        if wanted not in names:
            raise UsageError(
                f"no results of {wanted!r} to compare with: choose from {', '.join(names)}"
            )
        return wanted
    if any(name in DEPLOYABLE for name in names):
        return "full"
    return next((name for name in store.first_measured() if name in names), "full")


def over_what_all_met(variants: tuple[VariantView, ...]) -> tuple[VariantView, ...]:
    """The same models, with worst cases that compare.

    One more perturbation on one of the user's own models must not set it apart, nor one of theirs
    on one variant. The experiment's variants meet what the experiment has; where they do not, that
    is said of them.
    """
    of_the_experiment = any(v.name in DEPLOYABLE for v in variants)
    judged = [v for v in variants if (v.attacked if of_the_experiment else v.white_box)]
    if len(judged) < 2:
        return variants
    met = frozenset.intersection(*(frozenset(v.attacked) for v in judged))
    if of_the_experiment:
        met |= {source for v in variants for source in v.attacked if is_source(source)}
    return tuple(replace(v, met_by_all=met) for v in variants)

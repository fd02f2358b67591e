"""Which rows of a store the report talks about: decided here, once.

Enters: an open `Store`. Leaves: a `View`. A store may hold several devices, evaluation sets,
attacks and seeds; what is set aside is kept in `View.notes` so that the report can say so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from harness.latencies import latest_latencies
from harness.metrics import Classes, Latency
from harness.records import (
    CONTROLS,
    DEPLOYABLE,
    DERIVED,
    HarnessError,
    Machine,
    ModelRecord,
    ResultRow,
)
from harness.results import current_runs, result_rows
from harness.seeds import SeedGroup, key_of, seed_groups
from harness.sources import left_out
from harness.store import Store
from reports.estimates import estimated
from reports.view import GRADIENT_FREE, Craft, DeviceId, RunKey, SeedKey, VariantView, View
from reports.words import label_of, listed, paper_rank, plural

REFERENCE_EPS = 10.0
DEPLOYED = "onnxruntime"


def build_view(store: Store, *, device: str | None = None, baseline: str | None = None) -> View:
    """Choose the headline device, evaluation set and crafting run, and gather their numbers.

    Args:
        store: what was measured.
        device: what the headline is about; by default `local`, else that with most rows.
        baseline: the model that others are compared with; by default `full`, or, where there are
            only models that the user brought, the one measured first.

    Raises:
        HarnessError: no deployed results at all, or none on `device` or of `baseline`.
    """
    rows = result_rows(store)
    deployed = [row for row in rows if row.runtime == DEPLOYED]
    if not deployed:
        raise HarnessError(
            "no results of exported models in the store: run `harness attack-device --device"
            " local` (or `harness run`) first"
        )
    chosen = _headline_device(deployed, device)
    here = [row for row in deployed if _device(row) == chosen]
    measured = {row.evaluation_sha256 for row in here}
    evaluation_sha = next(s for s in reversed(store.evaluation_sets()) if s in measured)
    on_set = [row for row in deployed if row.evaluation_sha256 == evaluation_sha]
    here = [row for row in on_set if _device(row) == chosen]
    uaps = store.uaps()
    recency = {sha256: rank for rank, sha256 in enumerate(uaps)}
    here.sort(key=lambda row: recency.get(row.uap_sha256 or "", -1))
    craft = _headline_craft(here)
    reference = _reference_eps(here, craft)
    targeted_eps = _targeted_eps(here, craft, reference)
    on_set.sort(key=lambda row: recency.get(row.uap_sha256 or "", -1))
    predicted: dict[RunKey, Classes] = {}
    machines: dict[tuple[DeviceId, str], Machine] = {}
    for known, run in current_runs(store).items():
        if known.evaluation == evaluation_sha:
            key = (known.model, known.uap, known.device, known.emulated, known.runtime)
            predicted[key] = run.predictions
            machines[DeviceId(known.device, known.emulated), known.runtime] = run.machine
    evaluation = store.evaluation_sets()[evaluation_sha]
    labels = np.asarray(evaluation.labels, dtype=np.int64)
    groups = seed_groups(on_set, uaps=uaps, predicted=predicted, labels=labels)
    seeds = {key_of(row): group for group in groups for row in group.rows}

    def shown(row: ResultRow) -> ResultRow:
        return _averaged(estimated(row, predicted=predicted, labels=labels), seeds)

    kept = [shown(row) for row in on_set if _in_headline(row, craft)]
    free = [shown(row) for row in on_set if _is_gradient_free(row, craft)]
    models, timings = store.models(), latest_latencies(store)
    devices = (chosen, *sorted({_device(row) for row in on_set} - {chosen}))
    by_device = {
        place: _variants(
            [row for row in kept if _device(row) == place],
            models,
            {} if place.emulated else timings,
            searches=[row for row in free if _device(row) == place],
            reference=reference,
            targeted_eps=targeted_eps,
        )
        for place in devices
    }
    base = _baseline_name(store, by_device[chosen], baseline)
    by_device = {
        place: tuple(sorted(variants, key=lambda v: v.name != base))
        for place, variants in by_device.items()
    }
    return View(
        baseline_name=base,
        device=chosen,
        devices=devices,
        evaluation=evaluation,
        variants=by_device[chosen],
        by_device=by_device,
        reference_eps=reference,
        targeted_eps=targeted_eps,
        craft=craft,
        rows=tuple(rows),
        uaps=uaps,
        predicted=predicted,
        machines=tuple((*key, machine) for key, machine in sorted(machines.items(), key=_first)),
        seeds=seeds,
        notes=_notes(deployed, on_set, [*kept, *free], seeds, here) + _outdated(by_device[chosen]),
    )


def _baseline_name(store: Store, variants: tuple[VariantView, ...], wanted: str | None) -> str:
    names = [variant.name for variant in variants]
    if wanted is not None:
        if wanted not in names:
            raise HarnessError(
                f"no results of {wanted!r} to compare with: choose from {', '.join(names)}"
            )
        return wanted
    if any(name in DEPLOYABLE for name in names):
        return "full"
    return next((name for name in store.first_measured() if name in names), "full")


def _variants(
    rows: list[ResultRow],
    models: dict[str, ModelRecord],
    timings: dict[tuple[str, str, str], tuple[str, Latency]],
    *,
    searches: list[ResultRow],
    reference: float | None,
    targeted_eps: float | None,
) -> tuple[VariantView, ...]:
    views = []
    for name in sorted({row.variant for row in rows}, key=paper_rank):
        own = [row for row in rows if row.variant == name]
        unique: dict[tuple[str, float], ResultRow] = {}
        for row in own:
            if row.uap_source is not None and row.target is None:
                # Rows come by recency: of several perturbations of one name the newest is drawn.
                unique[row.uap_source, row.eps or 0.0] = row
        attacks = sorted(
            unique.values(), key=lambda row: (paper_rank(row.uap_source or ""), row.eps or 0.0)
        )
        by_eps: dict[float, dict[str, ResultRow]] = {}
        for row in attacks:
            if left_out(row.uap_source or "") is None:
                by_eps.setdefault(row.eps or 0.0, {})[row.uap_source or ""] = row
        agreements = [row.torch_agreement for row in own if row.torch_agreement is not None]
        first = own[0]
        views.append(
            VariantView(
                name=name,
                model=models[first.model_sha256],
                clean=next((row for row in own if row.uap_sha256 is None), None),
                curve=tuple(row for row in attacks if row.uap_source == name),
                controls={
                    control: tuple(row for row in attacks if row.uap_source == control)
                    for control in CONTROLS
                },
                attacked=by_eps.get(reference or 0.0, {}),
                by_eps=by_eps,
                left_out={
                    row.eps or 0.0: row for row in attacks if left_out(row.uap_source or "") == name
                },
                targeted={
                    row.target: row
                    for row in sorted(own, key=lambda row: row.target or 0)  # stable: newest last
                    if row.target is not None and row.uap_source == name and row.eps == targeted_eps
                },
                any_row=first,
                timing=timings.get((first.model_sha256, first.device, DEPLOYED)),
                lowest_agreement=min(agreements, default=None),
                searches=_by_eps([row for row in searches if row.variant == name]),
                reference_eps=reference,
            )
        )
    return tuple(views)


def _headline_device(rows: list[ResultRow], device: str | None) -> DeviceId:
    places = Counter(_device(row) for row in rows)
    if device is not None:
        matching = [place for place in places if place.name == device]
        if not matching:
            known = ", ".join(sorted({place.name for place in places}))
            raise HarnessError(
                f"no results from device {device!r}: choose from {known}, or run"
                f" `harness attack-device --device {device}`"
            )
        return min(matching)  # a real board before its emulation
    local = DeviceId("local", emulated=False)
    if local in places:
        return local
    return min(places, key=lambda place: (-places[place], place))


def _headline_craft(rows: list[ResultRow]) -> Craft | None:
    """The (protocol, attack, seed) with most untargeted rows; the newest where they tie.

    Not that of searches alone, which stand beside what they check: on one model they are as many.
    """
    campaigns = {
        _craft(row) for row in rows if row.target is not None or row.uap_source != row.variant
    }
    main = [row for row in rows if row.attack not in GRADIENT_FREE or _craft(row) in campaigns]
    rows = main if any(_craft(row) is not None for row in main) else rows
    crafts = [c for row in rows if row.target is None and (c := _craft(row)) is not None]
    crafts = crafts or [c for row in rows if (c := _craft(row)) is not None]
    counts, newest = Counter(crafts), {craft: rank for rank, craft in enumerate(crafts)}
    return max(counts, key=lambda c: (counts[c], newest[c]), default=None)


def _craft(row: ResultRow) -> Craft | None:
    if row.uap_source is None or row.uap_source in CONTROLS:
        return None
    return row.protocol or "", row.attack or "", row.seed or 0


def _in_headline(row: ResultRow, craft: Craft | None) -> bool:
    own = _craft(row)
    return own is None or own == craft


def _reference_eps(rows: list[ResultRow], craft: Craft | None) -> float | None:
    """The budget of the transfer matrix; without one 10/255, else the largest there is."""
    untargeted = [row for row in rows if row.target is None and row.eps is not None]
    crafted = [row for row in untargeted if _craft(row) == craft and craft is not None]
    budgets = {row.eps for row in crafted or untargeted if row.eps is not None}
    transfers = Counter(row.eps for row in crafted if row.uap_source != row.variant)
    return max(budgets, key=lambda eps: (transfers[eps], eps == REFERENCE_EPS, eps), default=None)


def _targeted_eps(
    rows: list[ResultRow], craft: Craft | None, reference: float | None
) -> float | None:
    budgets = Counter(
        row.eps
        for row in rows
        if row.target is not None and row.uap_source == row.variant and _in_headline(row, craft)
    )
    return max(
        (eps for eps in budgets if eps is not None),
        key=lambda eps: (budgets[eps], eps == reference, eps),
        default=None,
    )


def _by_eps(rows: list[ResultRow]) -> tuple[ResultRow, ...]:
    """One row a budget, ascending; rows come by recency, and the newest is kept."""
    newest = {row.eps or 0.0: row for row in rows}
    return tuple(newest[eps] for eps in sorted(newest))


def _is_gradient_free(row: ResultRow, craft: Craft | None) -> bool:
    """A search on the victim itself, beside a headline attack that uses gradients."""
    return (
        row.attack in GRADIENT_FREE
        and craft is not None
        and craft[:1] == (row.protocol or "",)
        and craft[1] not in GRADIENT_FREE
        and (row.uap_source, row.target) == (row.variant, None)
    )


def _averaged(row: ResultRow, seeds: dict[SeedKey, SeedGroup]) -> ResultRow:
    """The row as a mean over its crafting seeds, with their interval, where there are several."""
    group = seeds.get(key_of(row))
    if group is None:
        return row

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return replace(
        row,
        n=group.uer.n,
        uer=group.uer.value,
        uer_low=group.uer.low,
        uer_high=group.uer.high,
        uer_corrected=None,
        uer_corrected_low=None,
        uer_corrected_high=None,
        evasion_on_correct=mean([r.evasion_on_correct for r in group.rows]),
        fooling_rate=mean([r.fooling_rate for r in group.rows]),
        tsr=group.tsr.value if group.tsr else None,
        tsr_low=group.tsr.low if group.tsr else None,
        tsr_high=group.tsr.high if group.tsr else None,
        tsr_excl_target=mean([r.tsr_excl_target for r in group.rows]),
    )


def _notes(
    deployed: list[ResultRow],
    on_set: list[ResultRow],
    kept: list[ResultRow],
    seeds: dict[SeedKey, SeedGroup],
    here: list[ResultRow],
) -> tuple[str, ...]:
    notes = []
    if other := len(deployed) - len(on_set):
        notes.append(f"{plural(other, 'row')} of other evaluation sets")
    drawn = {key_of(row) for row in kept}
    drawn |= {key_of(r) for key in drawn if key in seeds for r in seeds[key].rows}
    if other := len({key_of(row) for row in on_set} - drawn):
        notes.append(f"{plural(other, 'row')} of other protocols, attacks or crafting seeds")
    said = [f"{listed(notes)} are in results.csv and are not drawn here."] if notes else []
    presets = sorted({f"{row.dataset}/{row.preset}" for row in here})
    if len(presets) > 1:
        said.append(
            f"The models come from different experiments ({listed(presets)}): compare with care."
        )
    return tuple(said)


def _outdated(variants: tuple[VariantView, ...]) -> tuple[str, ...]:
    """Where a derived model was made from another parent than the one shown beside it."""
    made_from = {v.name: _checkpoint(v.model) for v in variants}
    return tuple(
        f"{label_of(d.name)} was made from another {label_of(d.parent)} than the one beside it:"
        f" attack it again with --model {d.name}."
        for d in DERIVED
        if None not in (made_from.get(d.name), made_from.get(d.parent))
        and made_from[d.name] != made_from[d.parent]
    )


def _checkpoint(model: ModelRecord) -> str | None:
    metadata = model.manifest.get("metadata")
    value = metadata.get("checkpoint_sha256") if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else None


def _device(row: ResultRow) -> DeviceId:
    return DeviceId(row.device, row.emulated)


def _first(item: tuple[tuple[DeviceId, str], Machine]) -> tuple[DeviceId, str]:
    return item[0]

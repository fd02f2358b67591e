"""Which rows of a store the report talks about: decided here, once.

Enters: an open `Store`. Leaves: a `View`. A store may hold several devices, evaluation sets,
attacks and seeds; what is set aside is kept in `View.notes` so that the report can say so.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from harness.latencies import latest_latencies
from harness.metrics import Classes, Latency
from harness.records import (
    CONTROLS,
    DERIVED,
    HarnessError,
    Machine,
    ModelRecord,
    ResultRow,
    UapRecord,
)
from harness.results import current_runs, result_rows
from harness.seeds import SeedGroup, key_of, seed_groups
from harness.sources import left_out
from harness.store import Store
from reports.agreed import agreed
from reports.estimates import estimated
from reports.subject import (
    choose_baseline,
    choose_reference_eps,
    choose_targeted_eps,
    device_of,
    headline_craft,
    headline_device,
    in_headline,
    is_search,
    over_what_all_met,
)
from reports.view import DeviceId, RunKey, SeedKey, VariantView, View
from reports.words import label_of, listed, paper_rank, plural

BUDGET_KEYS = ("epochs", "batch_size", "step", "beta", "momentum", "passes")
"""Of an attack's settings. Train mode, as the authors had it for some, is no other budget."""
DEPLOYED = "onnxruntime"


def build_view(store: Store, *, device: str | None = None, baseline: str | None = None) -> View:
    """Choose the headline device, evaluation set and crafting run, and gather their numbers.

    Args:
        store: what was measured.
        device: what the headline is about; by default `local`, else that with most rows.
        baseline: the model that others are compared with; by default `full`, or, where there are
            only models that the user brought, the one measured first.

    Raises:
        HarnessError: no deployed results at all.
        UsageError: none on `device`, or of `baseline`.
    """
    rows = result_rows(store)
    deployed = [row for row in rows if row.runtime == DEPLOYED]
    if not deployed:
        raise HarnessError(
            "no results of exported models in the store: run `harness attack-device --device"
            " local` (or `harness run`) first"
        )
    chosen = headline_device(deployed, device)
    here = [row for row in deployed if device_of(row) == chosen]
    measured = {row.evaluation_sha256 for row in here}
    evaluation_sha = next(s for s in reversed(store.evaluation_sets()) if s in measured)
    on_set = [row for row in deployed if row.evaluation_sha256 == evaluation_sha]
    here = [row for row in on_set if device_of(row) == chosen]
    uaps = store.uaps()
    recency = {sha256: rank for rank, sha256 in enumerate(uaps)}
    here.sort(key=lambda row: recency.get(row.uap_sha256 or "", -1))
    craft = headline_craft(here)
    reference = choose_reference_eps(here, craft)
    targeted_eps = choose_targeted_eps(here, craft, reference)
    on_set.sort(key=lambda row: recency.get(row.uap_sha256 or "", -1))
    answers: dict[RunKey, Classes] = {}
    machines: dict[tuple[DeviceId, str], Machine] = {}
    for known, run in current_runs(store).items():
        if known.evaluation == evaluation_sha:
            key = (known.model, known.uap, known.device, known.emulated, known.runtime)
            answers[key] = run.predictions
            machines[DeviceId(known.device, known.emulated), known.runtime] = run.machine
    evaluation = store.evaluation_sets()[evaluation_sha]
    labels = np.asarray(evaluation.labels, dtype=np.int64)
    judged = agreed(answers)
    groups = seed_groups(on_set, uaps=uaps, predicted=judged, labels=labels)
    seeds = {key_of(row): group for group in groups for row in group.rows}

    def shown(row: ResultRow) -> ResultRow:
        return _averaged(estimated(row, answers=answers, labels=labels), seeds)

    kept = [shown(row) for row in on_set if in_headline(row, craft)]
    free = [shown(row) for row in on_set if is_search(row, craft)]
    models, timings = store.models(), latest_latencies(store)
    devices = (chosen, *sorted({device_of(row) for row in on_set} - {chosen}))
    by_device = {
        place: _variants(
            [row for row in kept if device_of(row) == place],
            models,
            {} if place.emulated else timings,
            searches=[row for row in free if device_of(row) == place],
            reference=reference,
            targeted_eps=targeted_eps,
        )
        for place in devices
    }
    by_device = {place: over_what_all_met(variants) for place, variants in by_device.items()}
    base = choose_baseline(store, by_device[chosen], baseline)
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
        answers=answers,
        judged=judged,
        machines=tuple((*key, machine) for key, machine in sorted(machines.items(), key=_first)),
        seeds=seeds,
        notes=(
            *_notes(deployed, on_set, [*kept, *free], seeds, here),
            *_outdated(by_device[chosen]),
            *_crafted_otherwise(by_device[chosen], uaps),
            *_not_met_by_all(by_device[chosen]),
        ),
    )


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


def _by_eps(rows: list[ResultRow]) -> tuple[ResultRow, ...]:
    """One row a budget, ascending; rows come by recency, and the newest is kept."""
    newest = {row.eps or 0.0: row for row in rows}
    return tuple(newest[eps] for eps in sorted(newest))


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
        n=min(group.uer.n, *(r.n for r in group.rows)),
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


def _not_met_by_all(variants: tuple[VariantView, ...]) -> tuple[str, ...]:
    """Which perturbations count in no worst case, because not every model faced them."""
    met = next((v.met_by_all for v in variants if v.met_by_all is not None), None)
    if met is None:
        return ()
    others = {source for v in variants for source in v.attacked if source != v.name} - met
    if not others:
        return ()
    return (
        f"Worst cases leave out {listed([label_of(source) for source in sorted(others)])}, which"
        " not every model faced.",
    )


def _crafted_otherwise(
    variants: tuple[VariantView, ...], uaps: dict[str, UapRecord]
) -> tuple[str, ...]:
    """Where the models' own perturbations were not crafted with the same budget of gradients."""
    groups: dict[str, list[str]] = {}
    for variant in variants:
        own = uaps.get((variant.white_box.uap_sha256 or "") if variant.white_box else "")
        settings = own.meta.get("settings") if own is not None else None
        if own is not None and isinstance(settings, dict):
            kept = [settings.get(key) for key in BUDGET_KEYS]
            kept += [settings.get("restarts", 1), own.meta.get("images")]
            groups.setdefault(json.dumps(kept, default=str), []).append(variant.label)
    if len(groups) < 2:
        return ()
    named = "; ".join(listed(labels) for labels in groups.values())
    return (
        f"Not crafted with the same settings ({named}): their white-box numbers do not compare"
        " until all are crafted anew.",
    )


def _checkpoint(model: ModelRecord) -> str | None:
    metadata = model.manifest.get("metadata")
    value = metadata.get("checkpoint_sha256") if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else None


def _first(item: tuple[tuple[DeviceId, str], Machine]) -> tuple[DeviceId, str]:
    return item[0]

"""Result rows, derived from the store: what `harness results` prints and the report draws.

Enters: an open `Store`. Leaves: `ResultRow`s, one per (variant, device, emulated, runtime, UAP or
clean, evaluation set). Where the same was measured more than once, the latest complete run wins;
a sample is put together from its parts, and is compared on the images it holds.
Only models that are current (registered last for their variant) appear: an older export's
numbers stay in the store, but do not describe the file that would be shipped now. The same holds
for perturbations: of those that this workspace made under one name the last, and none that was
crafted on another model than its source is now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from harness import metrics
from harness.latencies import latest_latencies
from harness.metrics import Classes, Corrected, Latency
from harness.records import (
    DEPLOYABLE,
    EvaluationSet,
    ModelRecord,
    ResultRow,
    UapRecord,
)
from harness.sampling import Indices, Merged, RunKey, by_machine, same_machine
from harness.sources import is_ensemble, members
from harness.store import Store


def result_rows(store: Store) -> list[ResultRow]:
    """Every current result, ordered by variant as in the paper, then device, runtime and UAP."""
    models, uaps = store.models(), store.uaps()
    known = _known(store)
    evaluation_sets = store.evaluation_sets()
    latencies, instructions = latest_latencies(store), store.instruction_counts()
    rows = [
        _row(
            runs[0],
            known=known,
            model=models[key.model],
            uap=uaps[key.uap] if key.uap is not None else None,
            evaluation=evaluation_sets[key.evaluation],
            latency=(None if key.emulated else latencies.get((key.model, key.device, key.runtime))),
            instructions=(
                instructions.get((key.model, key.device, runs[0].machine.runtime_version))
                if key.emulated
                else None
            ),
        )
        for key, runs in known.items()
    ]
    return sorted(rows, key=_order)


def current_runs(store: Store) -> dict[RunKey, Merged]:
    """What is known of every measurement of the current models: complete, or a sample."""
    return {key: runs[0] for key, runs in _known(store).items()}


def superseded(store: Store, *, deployed: Mapping[str, str] | None = None) -> dict[str, int]:
    """Variant -> stored runs of files that it no longer is.

    Args:
        store: the results.
        deployed: variant -> sha256 of its file now; by default those registered last.
    """
    every = store.models(current_only=False)
    if deployed is None:
        deployed = {model.variant: sha256 for sha256, model in store.models().items()}
    found: dict[str, int] = {}
    for sha256, runs in store.run_counts().items():
        variant = every[sha256].variant
        if variant in deployed and deployed[variant] != sha256:
            found[variant] = found.get(variant, 0) + runs
    return found


def replaced_uaps(store: Store) -> dict[str, str]:
    """Sha256 -> source of perturbations that this workspace made, and that are no longer its own.

    Another was made under the same name, or the model they were crafted on is another now.
    """
    crafted_on = {model.variant: _identity(model) for model in store.models().values()}
    newest: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for sha256, uap in store.uaps().items():  # newest last
        if not uap.own:
            continue
        name = (uap.source, uap.attack, uap.protocol, uap.dataset, uap.eps, uap.target, uap.seed)
        if name in newest:
            found[newest[name]] = uap.source
        newest[name] = sha256
        known, own = _identity_of(uap.source, crafted_on), uap.meta.get("checkpoint_sha256")
        if known is not None and own is not None and known != own:
            found[sha256] = uap.source
    return found


def _identity_of(source: str, known: Mapping[str, object]) -> object:
    """Of the models a source is now, as `harness.pipeline.uap_files` has it; None: not known."""
    if not is_ensemble(source):
        return known.get(source)
    identities = [known.get(member) for member in members(source)]
    if not all(isinstance(identity, str) for identity in identities):
        return None
    return hashlib.sha256(" ".join(map(str, identities)).encode()).hexdigest()


def _identity(model: ModelRecord) -> object:
    """What says whether a perturbation was crafted on it; None of a file that a user brought."""
    metadata = model.manifest.get("metadata")
    if not isinstance(metadata, dict):
        return None
    return metadata.get("identity") or metadata.get("checkpoint_sha256")


def _known(store: Store) -> dict[RunKey, list[Merged]]:
    models, replaced = store.models(), replaced_uaps(store)
    return by_machine(
        (
            stored
            for stored in store.predictions()
            if stored.run.model_sha256 in models and stored.run.uap_sha256 not in replaced
        ),
        images={sha256: len(record.labels) for sha256, record in store.evaluation_sets().items()},
    )


def as_json(row: ResultRow) -> dict[str, Any]:
    """The row as plain JSON values."""
    return asdict(row)


def _row(
    run: Merged,
    *,
    known: dict[RunKey, list[Merged]],
    model: ModelRecord,
    uap: UapRecord | None,
    evaluation: EvaluationSet,
    latency: tuple[str, Latency] | None,
    instructions: int | None,
) -> ResultRow:
    key, seen = run.key, run.seen
    all_labels = np.asarray(evaluation.labels, dtype=np.int64)
    labels, predicted = all_labels[seen], run.predictions[seen]
    accuracy = on_correct = fooling = None
    # The same machine's, where it has one: a pair tells of the perturbation, not of two machines.
    clean_runs = known.get(replace(key, uap=None), [])
    paired = [clean for clean in clean_runs if same_machine(clean.machine, run.machine)]
    clean_run = next(iter(paired or clean_runs), None)
    if (both := _both(run, clean_run)) is not None and clean_run is not None:
        here, clean, attacked = all_labels[both], clean_run.predictions[both], run.predictions[both]
        accuracy = metrics.accuracy(here, clean)
        if uap is not None:
            on_correct = metrics.evasion_on_correct(here, clean, attacked).value
            fooling = metrics.fooling_rate(clean, attacked).value
    uer = metrics.uer(labels, predicted) if uap is not None else None
    tsr = excluding = None
    if uap is not None and uap.target is not None:
        tsr = metrics.tsr(predicted, uap.target)
        excluding = metrics.tsr_excluding_target(labels, predicted, uap.target).value
    agreement = gap = corrected = None
    torch_runs = known.get(replace(key, runtime="torch", device="local", emulated=False), [])
    torch_run = next(iter(torch_runs), None)
    both = _both(run, torch_run)
    if both is not None and torch_run is not None and key.runtime != "torch":
        here, ours, torch = all_labels[both], run.predictions[both], torch_run.predictions[both]
        agreement = metrics.agreement(torch, ours).value
        if uap is not None:
            gap = float(np.mean(ours != here) - np.mean(torch != here))
            corrected = corrected_uer(run, torch_run, all_labels)
    accuracy_low, accuracy_high = accuracy.interval if accuracy else (None, None)
    uer_low, uer_high = uer.interval if uer else (None, None)
    tsr_low, tsr_high = tsr.interval if tsr else (None, None)
    # The card counts what the ONNX file executes; it says nothing about the PyTorch model.
    cost = model.cost if key.runtime == "onnxruntime" else None
    mode, timing = latency if latency is not None else (None, None)
    # A part of the products is no count: it would pass for the cheapest.
    counted = cost is not None and all(layer["macs"] is not None for layer in cost.layers)
    return ResultRow(
        variant=model.variant,
        method=model.method,
        dataset=evaluation.dataset,
        preset=model.preset,
        width=model.width,
        protocol=uap.protocol if uap else None,
        device=key.device,
        emulated=key.emulated,
        runtime=key.runtime,
        machine=run.machine.arch,
        uap_source=uap.source if uap else None,
        uap_sha256=key.uap,
        attack=uap.attack if uap else None,
        seed=uap.seed if uap else model.seed,
        eps=uap.eps if uap else None,
        target=uap.target if uap else None,
        evaluation_sha256=key.evaluation,
        n=labels.size,
        n_of=all_labels.size,
        clean_accuracy=accuracy.value if accuracy else None,
        clean_accuracy_low=accuracy_low,
        clean_accuracy_high=accuracy_high,
        uer=uer.value if uer else None,
        uer_low=uer_low,
        uer_high=uer_high,
        uer_corrected=corrected.value if corrected else None,
        uer_corrected_low=corrected.low if corrected else None,
        uer_corrected_high=corrected.high if corrected else None,
        evasion_on_correct=on_correct,
        fooling_rate=fooling,
        tsr=tsr.value if tsr else None,
        tsr_low=tsr_low,
        tsr_high=tsr_high,
        tsr_excl_target=excluding,
        latency_p50_ms=timing.p50_ms if timing else None,
        latency_p90_ms=timing.p90_ms if timing else None,
        latency_verdict=timing.verdict if timing else None,
        latency_mode=mode,
        energy_mj=timing.energy_mj if timing else None,
        instructions=instructions,
        file_bytes=cost.file_bytes if cost else None,
        params=cost.params if cost else None,
        macs=cost.macs if cost and counted else None,
        flops=2 * cost.macs if cost and counted else None,
        bops=cost.bops_executed if cost and counted else None,
        peak_rss_bytes=timing.rss_peak_bytes if timing else None,
        torch_agreement=agreement,
        uer_gap=gap,
        model_sha256=key.model,
        created_at=run.created_at,
        git_commit=run.git_commit,
    )


def corrected_uer(run: Merged, torch_run: Merged | None, labels: Classes) -> Corrected | None:
    """The UER on the whole set that a sample and PyTorch's complete run imply; else None."""
    seen = run.seen
    if torch_run is None or not 0 < seen.size < labels.size:
        return None
    if torch_run.seen.size < labels.size:
        return None
    return metrics.corrected_rate(
        torch_run.predictions != labels, run.predictions[seen] != labels[seen], seen
    )


def _both(first: Merged, second: Merged | None) -> Indices | None:
    """The images that both saw; None where there are none."""
    if second is None:
        return None
    common = np.intersect1d(first.seen, second.seen, assume_unique=True)
    return common if common.size else None


def _order(row: ResultRow) -> tuple[Any, ...]:
    ours = row.variant in DEPLOYABLE
    rank = DEPLOYABLE.index(row.variant) if ours else len(DEPLOYABLE)
    return (
        rank,
        row.variant,
        row.device,
        row.runtime,
        row.uap_source is not None,
        row.target is not None,
        row.target or 0,
        row.uap_source or "",
        row.eps or 0.0,
        row.attack or "",
        row.seed or 0,
    )

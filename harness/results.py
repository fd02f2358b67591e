"""Result rows, derived from the store: what `harness results` prints and the report draws.

Enters: an open `Store`. Leaves: `ResultRow`s, one per (variant, device, emulated, runtime, UAP or
clean, evaluation set). Where the same was measured more than once, the latest complete run wins.
Only models that are current (registered last for their variant) appear: an older export's
numbers stay in the store, but do not describe the file that would be shipped now.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from harness import metrics
from harness.metrics import Classes, Latency
from harness.records import (
    DEPLOYABLE,
    EvaluationSet,
    LatencyProcess,
    ModelRecord,
    ResultRow,
    UapRecord,
)
from harness.store import Store
from harness.store_rows import StoredPrediction


@dataclass(frozen=True)
class _Key:
    """What makes two prediction runs the same measurement."""

    model: str
    device: str
    emulated: bool
    runtime: str
    uap: str | None
    evaluation: str


def result_rows(store: Store) -> list[ResultRow]:
    """Every current result, ordered by variant as in the paper, then device, runtime and UAP."""
    models, uaps = store.models(), store.uaps()
    evaluation_sets = store.evaluation_sets()
    latest: dict[_Key, StoredPrediction] = {}
    for stored in store.predictions():
        if stored.run.model_sha256 in models:
            latest[_key(stored)] = stored
    latencies = latest_latencies(store)
    rows = [
        _row(
            key,
            stored,
            latest=latest,
            model=models[key.model],
            uap=uaps[key.uap] if key.uap is not None else None,
            evaluation=evaluation_sets[key.evaluation],
            latency=(None if key.emulated else latencies.get((key.model, key.device, key.runtime))),
        )
        for key, stored in latest.items()
    ]
    return sorted(rows, key=_order)


def latest_latencies(store: Store) -> dict[tuple[str, str, str], tuple[str, Latency]]:
    """(mode, summary) of the last latency run of each (model sha256, device, runtime).

    Emulated devices have no latency: an emulator's time says nothing about the board.
    """
    processes: dict[tuple[object, ...], list[LatencyProcess]] = {}
    newest: dict[tuple[str, str, str], tuple[str, list[LatencyProcess], int]] = {}
    for stored in store.latencies():
        run = stored.run
        if run.emulated:
            continue
        identity = (run.model_sha256, run.device, run.runtime)
        # A measurement is stored process by process, so that a kill loses one of them at most.
        same = processes.setdefault((*identity, run.mode, run.threads, repr(run.machine)), [])
        same.extend(run.processes)
        newest[identity] = (run.mode, same, run.machine.cores)
    return {
        identity: (mode, metrics.summarise_latency(same, cores=cores))
        for identity, (mode, same, cores) in newest.items()
    }


def as_json(row: ResultRow) -> dict[str, Any]:
    """The row as plain JSON values."""
    return asdict(row)


def _key(stored: StoredPrediction) -> _Key:
    run = stored.run
    return _Key(
        run.model_sha256,
        run.device,
        run.emulated,
        run.runtime,
        run.uap_sha256,
        run.evaluation_sha256,
    )


def _row(
    key: _Key,
    stored: StoredPrediction,
    *,
    latest: dict[_Key, StoredPrediction],
    model: ModelRecord,
    uap: UapRecord | None,
    evaluation: EvaluationSet,
    latency: tuple[str, Latency] | None,
) -> ResultRow:
    run = stored.run
    labels = np.asarray(evaluation.labels, dtype=np.int64)
    predicted = np.asarray(run.predictions, dtype=np.int64)
    clean = _predictions(latest, key, clean=True)
    torch = _predictions(latest, key, runtime="torch", device="local", emulated=False)
    accuracy = metrics.accuracy(labels, clean) if clean is not None else None
    uer = metrics.uer(labels, predicted) if uap is not None else None
    on_correct = fooling = None
    if uap is not None and clean is not None:
        on_correct = metrics.evasion_on_correct(labels, clean, predicted).value
        fooling = metrics.fooling_rate(clean, predicted).value
    tsr = excluding = None
    if uap is not None and uap.target is not None:
        tsr = metrics.tsr(predicted, uap.target)
        excluding = metrics.tsr_excluding_target(labels, predicted, uap.target).value
    agreement = gap = None
    if torch is not None and run.runtime != "torch":
        agreement = metrics.agreement(torch, predicted).value
        if uap is not None:
            gap = float(np.mean(predicted != labels) - np.mean(torch != labels))
    accuracy_low, accuracy_high = accuracy.interval if accuracy else (None, None)
    uer_low, uer_high = uer.interval if uer else (None, None)
    tsr_low, tsr_high = tsr.interval if tsr else (None, None)
    # The card counts what the ONNX file executes; it says nothing about the PyTorch model.
    cost = model.cost if run.runtime == "onnxruntime" else None
    mode, timing = latency if latency is not None else (None, None)
    return ResultRow(
        variant=model.variant,
        method=model.method,
        dataset=evaluation.dataset,
        preset=model.preset,
        width=model.width,
        protocol=uap.protocol if uap else None,
        device=run.device,
        emulated=run.emulated,
        runtime=run.runtime,
        machine=run.machine.arch,
        uap_source=uap.source if uap else None,
        uap_sha256=run.uap_sha256,
        attack=uap.attack if uap else None,
        seed=uap.seed if uap else model.seed,
        eps=uap.eps if uap else None,
        target=uap.target if uap else None,
        evaluation_sha256=run.evaluation_sha256,
        n=labels.size,
        clean_accuracy=accuracy.value if accuracy else None,
        clean_accuracy_low=accuracy_low,
        clean_accuracy_high=accuracy_high,
        uer=uer.value if uer else None,
        uer_low=uer_low,
        uer_high=uer_high,
        uer_corrected=None,
        uer_corrected_low=None,
        uer_corrected_high=None,
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
        file_bytes=cost.file_bytes if cost else None,
        params=cost.params if cost else None,
        macs=cost.macs if cost else None,
        flops=2 * cost.macs if cost else None,
        bops=cost.bops_executed if cost else None,
        peak_rss_bytes=timing.rss_peak_bytes if timing else None,
        torch_agreement=agreement,
        uer_gap=gap,
        model_sha256=key.model,
        created_at=stored.created_at,
        git_commit=stored.git_commit,
    )


def _predictions(
    latest: dict[_Key, StoredPrediction],
    key: _Key,
    *,
    clean: bool = False,
    runtime: str | None = None,
    device: str | None = None,
    emulated: bool | None = None,
) -> Classes | None:
    """Predictions of the run that differs from `key` only in what is given."""
    other = _Key(
        model=key.model,
        device=device if device is not None else key.device,
        emulated=emulated if emulated is not None else key.emulated,
        runtime=runtime if runtime is not None else key.runtime,
        uap=None if clean else key.uap,
        evaluation=key.evaluation,
    )
    stored = latest.get(other)
    return np.asarray(stored.run.predictions, dtype=np.int64) if stored is not None else None


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

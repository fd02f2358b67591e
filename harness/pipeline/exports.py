"""Stage `export`: checkpoint -> model.onnx + manifest, checked to be the same function.

Enters: a variant's checkpoint and the calibration split. Leaves: `cache/<variant>.onnx` and
`cache/<variant>.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.cost import cost_card, uncounted_operators
from export.exporter import export_model, load_manifest, manifest_cost
from harness.artefacts import cache_key
from harness.models.checkpoint import load_checkpoint
from harness.models.folded import FoldedResNet
from harness.models.integer import IntegerResNet
from harness.pipeline.checkpoints import (
    checkpoint_key,
    deployed_form,
    reference_form,
    valid_checkpoint,
    with_parents,
)
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress, Task
from harness.records import PAPER_ORDER, HarnessError, ModelRecord, Variant

VERSION = 2
EXPORT_FORWARDS = 1500.0
"""Rough cost of an export in forward passes of one image: building, checking, compressing."""


def export_key(context: Context, variant: Variant) -> str:
    """Digest of everything the exported file depends on."""
    return cache_key(
        "export",
        VERSION,
        align=context.config.export.align,
        checkpoint=checkpoint_key(context, variant),
        labels=_labels(context, variant),
        calibration=context.data.digests["calibration"],
    )


def _labels(context: Context, variant: Variant) -> dict[str, str]:
    """What the file says of itself."""
    config = context.config
    return {
        "variant": variant.name,
        "method": variant.method,
        "dataset": context.data.name,
        "preset": config.preset,
        "arch": config.arch,
        "width": str(config.width),
        "seed": str(config.seed),
    }


def valid_export(context: Context, variant: Variant) -> dict[str, Any] | None:
    """The manifest of the variant's export if file and manifest are what is asked for."""
    path = context.workspace.onnx(variant.name)
    if not path.exists() or not valid_checkpoint(context, variant):
        return None
    try:
        manifest = load_manifest(path)
    except HarnessError:
        return None  # killed between model and manifest, or changed by hand: export again
    metadata = manifest["metadata"]
    checkpoint_sha256 = context.sha256(context.workspace.checkpoint(variant.name))
    if metadata.get("key") != export_key(context, variant):
        return None
    if metadata.get("checkpoint_sha256") != checkpoint_sha256:
        return None
    return manifest


def export_tasks(context: Context, names: list[str]) -> list[Task]:
    """Export the variants. Their checkpoints are made by tasks before these."""
    return [_export_task(context, v) for v in with_parents(names) if v.name in names]


def _export_task(context: Context, variant: Variant) -> Task:
    return Task(
        stage="export",
        name=f"export {variant.name}",
        work=EXPORT_FORWARDS,
        is_done=lambda: valid_export(context, variant) is not None,
        run=lambda progress: _export(context, variant, progress),
    )


def _export(context: Context, variant: Variant, progress: Progress) -> None:
    use_cpu_threads(CPU_THREADS)
    checkpoint_path = context.workspace.checkpoint(variant.name)
    trained = load_checkpoint(checkpoint_path).build()
    model = deployed_form(trained)
    assert isinstance(model, FoldedResNet | IntegerResNet)
    config = context.config
    export_model(
        model,
        # The integer network is its own reference; the float one answers to the trained model.
        model if isinstance(model, IntegerResNet) else reference_form(trained),
        out=context.workspace.onnx(variant.name),
        calibration=context.data.calibration.images,
        classes=context.data.classes,
        align=config.export.align,
        metadata={
            **_labels(context, variant),
            "key": export_key(context, variant),
            "checkpoint_sha256": context.sha256(checkpoint_path),
        },
    )
    progress(1.0, "")


def model_record(context: Context, name: str, path: Path) -> ModelRecord:
    """The store's record of an ONNX file: a variant with its manifest, or one a user brought.

    A manifest beside a user's file is not read: it could claim any cost.
    """
    if name not in PAPER_ORDER:
        return _foreign_record(context, name, path)
    manifest = load_manifest(path)
    metadata = manifest["metadata"]
    return ModelRecord(
        sha256=manifest["sha256"],
        variant=name,
        method=metadata["method"],
        dataset=metadata["dataset"],
        preset=metadata["preset"],
        arch=metadata["arch"],
        width=int(metadata["width"]),
        seed=int(metadata["seed"]),
        cost=manifest_cost(manifest),
        manifest=manifest,
    )


def _foreign_record(context: Context, name: str, path: Path) -> ModelRecord:
    cost = cost_card(path.read_bytes(), image_shape=context.image_shape)
    notes = ["brought by the user; no PyTorch model to compare with"]
    if uncounted := uncounted_operators(cost):
        notes.append(f"MACs and BOPs leave out what cannot be counted: {', '.join(uncounted)}")
    return ModelRecord(
        sha256=context.sha256(path),
        variant=name,
        method="user",
        dataset=context.data.name,
        preset="user",
        arch="user",
        width=None,
        seed=None,
        cost=cost,
        manifest={"notes": notes},
    )

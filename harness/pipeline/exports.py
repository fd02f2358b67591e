"""Stage `export`: checkpoint -> model.onnx + manifest, checked to be the same function.

Enters: a variant's checkpoint and the calibration split. Leaves: `cache/<variant>.onnx` and
`cache/<variant>.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime

from devices.local import LocalDevice
from export.cost import cost_card, uncounted_operators
from export.exporter import (
    EXPORT_SETTINGS,
    Exported,
    add_memory,
    export_model,
    load_manifest,
    manifest_cost,
)
from export.integer_layers import Kernel
from export.static_int8 import export_static_int8
from harness.artefacts import cache_key
from harness.compression.variants import planned_epochs
from harness.models.checkpoint import load_checkpoint
from harness.models.folded import FoldedResNet
from harness.models.integer import IntegerResNet
from harness.pipeline.checkpoints import (
    checkpoint_key,
    deployed_form,
    reference_form,
    task_name,
    valid_checkpoint,
)
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress, Task, note
from harness.pipeline.tuning import chosen_kernels
from harness.records import (
    DEPLOYABLE,
    DERIVED,
    VARIANTS,
    Derived,
    HarnessError,
    ModelRecord,
    Variant,
    deployable_named,
    trained_for,
)

VERSION = 5
DERIVED_EXPORTS: dict[str, Callable[..., Exported]] = {"int8": export_static_int8}
"""Method of a derived model -> what makes its file of the folded and the trained parent."""
EXPORT_FORWARDS = 1500.0
"""Rough cost of an export in forward passes of one image: building, checking, compressing."""


def export_key(context: Context, variant: Variant | Derived, *, compat: bool = False) -> str:
    """Digest of everything the exported file depends on."""
    return cache_key(
        "export",
        VERSION,
        **_form(context, variant, compat=compat),
        checkpoint=checkpoint_key(context, trained_for(variant.name)),
        labels=_labels(context, variant),
        calibration=context.data.digests["calibration"],
    )


def _form(context: Context, variant: Variant | Derived, *, compat: bool) -> dict[str, Any]:
    """What decides the form of the file, beside weights and images."""
    if isinstance(variant, Derived):
        return {"onnxruntime": onnxruntime.__version__}
    return {
        "compat": compat,
        "kernels": _kernels(context, variant, compat=compat),
        "align": context.config.export.align,
    }


def _labels(context: Context, variant: Variant | Derived) -> dict[str, str]:
    """What the file says of itself."""
    config = context.config
    coupling = config.train.sfp_coupling
    return {
        "variant": variant.name,
        "method": variant.method,
        "dataset": context.data.name,
        "preset": config.preset,
        "arch": config.arch,
        "width": str(config.width),
        "seed": str(config.seed),
        # The paper's algorithm goes without saying; another must not pass for it.
        **({"sfp_coupling": coupling} if variant.method == "sfp" and coupling != "layer" else {}),
    }


def _kernels(context: Context, variant: Variant, *, compat: bool) -> dict[str, Kernel]:
    """The measured choice of kernels; empty where nothing was measured."""
    return {} if compat or variant.method != "apot" else chosen_kernels(context, variant)


def _path(context: Context, variant: Variant | Derived, *, compat: bool) -> Path:
    workspace = context.workspace
    return workspace.compat_onnx(variant.name) if compat else workspace.onnx(variant.name)


def valid_export(
    context: Context, variant: Variant | Derived, *, compat: bool = False
) -> dict[str, Any] | None:
    """The manifest of the variant's export if file and manifest are what is asked for.

    Raises:
        UsageError: the measurements that choose kernels are damaged.
    """
    path, trained = _path(context, variant, compat=compat), trained_for(variant.name)
    if not path.exists() or not valid_checkpoint(context, trained):
        return None
    try:
        manifest = load_manifest(path)
    except HarnessError:
        return None  # killed between model and manifest, or changed by hand: export again
    metadata = manifest["metadata"]
    checkpoint_sha256 = context.sha256(context.workspace.checkpoint(trained.name))
    if metadata.get("key") != export_key(context, variant, compat=compat):
        return None
    if "memory" not in manifest:  # killed before the last line of the cost card
        return None
    if metadata.get("checkpoint_sha256") != checkpoint_sha256:
        return None
    return manifest


def export_tasks(context: Context, names: list[str], *, compat: bool = False) -> list[Task]:
    """Export the variants. Their checkpoints are made by tasks before these.

    `compat`: beside the experiment's files, in the encoding that any runtime reads: one weight to
    a byte, integer operators of opset 13.
    """
    wanted = {deployable_named(name) for name in names}
    variants = [v for v in (*VARIANTS, *DERIVED) if v in wanted]
    lacking = sum(valid_export(context, variant, compat=compat) is None for variant in variants)
    return [_export_task(context, v, compat=compat, beside=max(1, lacking)) for v in variants]


def _export_task(
    context: Context, variant: Variant | Derived, *, compat: bool, beside: int
) -> Task:
    return Task(
        stage="export",
        name=f"export {_path(context, variant, compat=compat).stem}",
        work=0.0,
        core_work=EXPORT_FORWARDS / (context.threads_of_each(beside) or 1),
        is_done=lambda: valid_export(context, variant, compat=compat) is not None,
        run=lambda progress: _export(context, variant, progress, compat=compat, beside=beside),
        beside="cores",
        after=(task_name(trained_for(variant.name).name),),
        uses=context.uses("cores"),
    )


def _export(
    context: Context, variant: Variant | Derived, progress: Progress, *, compat: bool, beside: int
) -> None:
    use_cpu_threads(context.threads_of_each(beside) or CPU_THREADS)
    _say_if_damaged(context, _path(context, variant, compat=compat))
    checkpoint_path = context.workspace.checkpoint(trained_for(variant.name).name)
    trained = load_checkpoint(checkpoint_path).build()
    model = deployed_form(trained)
    assert isinstance(model, FoldedResNet | IntegerResNet)
    request: dict[str, Any] = {
        "out": _path(context, variant, compat=compat),
        "calibration": context.data.calibration.images,
        "classes": context.data.classes,
        "metadata": {
            **_labels(context, variant),
            "key": export_key(context, variant, compat=compat),
            "checkpoint_sha256": context.sha256(checkpoint_path),
        },
    }
    if isinstance(variant, Derived):
        DERIVED_EXPORTS[variant.method](model, reference_form(trained), **request)
    else:
        compared, total = 0, len(EXPORT_SETTINGS) * len(context.data.calibration)

        def advance(images: int) -> None:
            nonlocal compared
            compared += images
            progress(0.9 * min(1.0, compared / total), "")

        export_model(
            model,
            # The integer network is its own reference; the float one answers to the trained model.
            model if isinstance(model, IntegerResNet) else reference_form(trained),
            align=context.config.export.align,
            packed=not compat,
            kernels=_kernels(context, variant, compat=compat),
            progress=advance,
            **request,
        )
    progress(0.9, "memory")
    measure_memory(context, request["out"])
    progress(1.0, "")


def _say_if_damaged(context: Context, path: Path) -> None:
    """A file that is not what its manifest describes is built anew; its owner should know."""
    if path.exists() and path.with_suffix(".json").exists():
        try:
            load_manifest(path)
        except HarnessError as error:
            note(context.reporter, f"exporting {path.stem} again: {error}")


def measure_memory(context: Context, path: Path) -> None:
    """Load and run the file once in a process of its own."""
    with LocalDevice().open() as session:
        loaded = session.load(path, threads=1)
        session.set_images(context.data.calibration.images[:1])
        once = session.measure(warmup_runs=0, warmup_seconds=0, min_runs=1, min_seconds=0)
        add_memory(
            path,
            load_bytes=loaded.rss_load_bytes,
            peak_bytes=once.rss_peak_bytes,
            runtime=session.machine.runtime_version,
        )


def model_record(context: Context, name: str, path: Path, *, of_code: bool = False) -> ModelRecord:
    """The store's record of an ONNX file: a variant with its manifest, or one a user brought.

    `of_code`: it was exported here from a user's own code. The manifest beside any other file of
    theirs is not read: it could claim any cost.
    """
    if name not in DEPLOYABLE:
        return _foreign_record(context, name, path, brought_manifest(path) if of_code else None)
    manifest, train = load_manifest(path), context.config.train
    metadata = manifest["metadata"]
    epochs = planned_epochs(trained_for(name), train)
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
        manifest={**manifest, "training": f"{epochs} epoch{'s' * (epochs != 1)}, {train.schedule}"},
    )


def brought_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a file exported from a user's own code; None where it is none."""
    try:
        manifest = load_manifest(path)
    except HarnessError:
        return None
    metadata, agreement = manifest["metadata"], manifest.get("agreement")
    texts = isinstance(metadata, dict) and all(
        isinstance(metadata.get(key), str) for key in ("factory", "key", "identity")
    )
    compared = isinstance(agreement, dict) and isinstance(agreement.get("images"), int)
    return manifest if texts and compared and "batch" in manifest else None


def _foreign_record(
    context: Context, name: str, path: Path, manifest: dict[str, Any] | None
) -> ModelRecord:
    cost = cost_card(path.read_bytes(), image_shape=context.image_shape)
    notes = ["brought by the user; no PyTorch model to compare with"]
    if manifest is not None:
        images = manifest["agreement"]["images"]
        notes = [
            f"exported from {manifest['metadata']['factory']}, compared with PyTorch on"
            f" {images:,} images"
        ]
        if manifest["batch"] == 1:
            notes.append("takes one image at a time: its code makes a constant of the batch's size")
        if uncounted_operators(cost):  # of a file that leaves shapes open the exporter knew more
            cost = manifest_cost(manifest)
    if uncounted := uncounted_operators(cost):
        notes.append(f"no MACs and BOPs: these operators cannot be counted: {', '.join(uncounted)}")
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
        manifest={
            "notes": notes,
            **({"metadata": {"identity": manifest["metadata"]["identity"]}} if manifest else {}),
        },
    )

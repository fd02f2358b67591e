"""Stage `export` for a model that the user brings: their code -> model.onnx + manifest.

Enters: a `Brought` and the calibration split. Leaves: `cache/NAME.onnx` and `cache/NAME.json`,
checked to be the same function. A file says of which model it is, so that it, and what was crafted
on the same model, can be used again without running their code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.brought import export_brought
from export.exporter import Exported
from harness.artefacts import cache_key
from harness.models.brought import theirs
from harness.pipeline.brought import Brought, crafted_on
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.exports import EXPORT_FORWARDS, brought_manifest, measure_memory
from harness.pipeline.tasks import Progress, Task, note
from harness.pipeline.uap_names import transfer_names

VERSION = 2


def brought_export_task(brought: Brought) -> Task:
    """Export the model to `cache/NAME.onnx`, checked to be the same function."""
    return Task(
        stage="export",
        name=f"export {brought.recipe.name}",
        work=0.0,
        core_work=EXPORT_FORWARDS,
        is_done=lambda: _is_valid(brought),
        run=lambda progress: _export(brought, progress),
    )


@dataclass(frozen=True)
class Earlier:
    """A model that was brought, exported and crafted on in this workspace before."""

    name: str
    lacks: str
    """Why it cannot be met now; empty where it can."""
    command: str
    """What measures it anew, but for its checkpoint."""


def earlier_models(context: Context, *, but: str) -> list[Earlier]:
    """Every model that was brought here before, others than `but`."""
    found = []
    for name in context.workspace.own_models():
        if name == but:
            continue
        path = context.workspace.onnx(name)
        manifest = brought_manifest(path)
        if manifest is not None:
            metadata = manifest["metadata"]
            options = f"--factory {metadata['factory']} {metadata.get('convention', '')}".strip()
            lacks = _lacks(context, path, metadata)
            found.append(Earlier(name, lacks, f"harness run {options} --name {name}"))
        else:
            command = f"harness run --factory PKG:FN --name {name}"
            found.append(Earlier(name, "its file, or the manifest beside it, is damaged", command))
    return found


def _lacks(context: Context, path: Path, metadata: dict[str, str]) -> str:
    """What keeps a model from being met: another one, other settings, other images than now."""
    identity, names = metadata["identity"], transfer_names(context, path.stem)
    if metadata["key"] != _key(context, identity, _labels_of(metadata)) or any(
        crafted_on(context, name) != identity for name in names
    ):
        return "it was exported, or crafted on, with other settings, images or weights than now"
    uaps = {context.sha256(context.workspace.uap(name)) for name in names}
    if not context.workspace.results.exists():
        return "it was not measured yet"
    with context.open_store() as store:
        runs = store.predictions_of(
            model_sha256=context.sha256(path),
            evaluation_sha256=context.data.digests["evaluation"],
        )
        measured = {stored.run.uap_sha256 for stored in runs}
    return "" if uaps <= measured else "it was not measured on the present evaluation images"


def _key(context: Context, identity: str, labels: dict[str, str]) -> str:
    """Digest of everything the exported file depends on."""
    return cache_key(
        "export_brought",
        VERSION,
        source=identity,
        labels=labels,
        images=context.data.digests["calibration"],
    )


def _labels(brought: Brought) -> dict[str, str]:
    """What the manifest says of the file."""
    recipe = brought.recipe
    return {
        "variant": recipe.name,
        "method": "user",
        "dataset": brought.context.data.name,
        "factory": recipe.factory,
        "convention": recipe.convention.options(),
    }


def _labels_of(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in ("key", "identity")}


def _is_valid(brought: Brought) -> bool:
    manifest = brought_manifest(brought.context.workspace.onnx(brought.recipe.name))
    if manifest is None or "memory" not in manifest:
        return False
    key = _key(brought.context, brought.identity, _labels(brought))
    valid: bool = manifest["metadata"]["key"] == key
    return valid


def _export(brought: Brought, progress: Progress) -> None:
    use_cpu_threads(CPU_THREADS)
    context, recipe, labels = brought.context, brought.recipe, _labels(brought)
    identity = brought.identity
    with theirs(f"--factory {recipe.factory}: exporting its model"):
        exported: Exported = export_brought(
            brought.model.cpu(),
            out=context.workspace.onnx(recipe.name),
            calibration=context.data.calibration.images,
            classes=context.data.classes,
            metadata={**labels, "identity": identity, "key": _key(context, identity, labels)},
        )
    if decisions := exported.manifest["decided_on_tensors"]:
        note(
            context.reporter,
            f"warning: {recipe.name} decides in Python on tensors ({', '.join(decisions[:3])}): if "
            "that hangs on the image, the file has one side of it; it agrees with PyTorch on "
            f"{exported.agreement.images} images and others made of them",
        )
    progress(0.9, "memory")
    measure_memory(context, exported.path)
    progress(1.0, "")

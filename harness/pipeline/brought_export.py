"""Stage `export` for a model that the user brings: their code -> model.onnx + manifest.

Enters: a `Brought` and the calibration split. Leaves: `cache/NAME.onnx` and `cache/NAME.json`,
checked to be the same function. A file says of which model it is, so that it, and what was crafted
on the same model, can be used again without running their code.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.brought import export_brought
from export.exporter import Exported
from harness.artefacts import cache_key
from harness.models.brought import theirs
from harness.pipeline.brought import Brought, crafted_on
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.exports import EXPORT_FORWARDS, brought_manifest, measure_memory
from harness.pipeline.tasks import Progress, Task, note
from harness.pipeline.uap_names import transfer_names
from harness.records import DEPLOYABLE

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
    factory: str
    usable: bool
    """Its file and its perturbations are of one model, and of the present configuration."""


def earlier_models(context: Context, *, but: str) -> list[Earlier]:
    """Every model that was brought here before, others than `but`; of a damaged one the name."""
    found = []
    for path in sorted(context.workspace.cache.glob("*.onnx")):
        if path.stem == but or path.stem.removesuffix("_compat") in DEPLOYABLE:
            continue
        manifest = brought_manifest(path)
        if manifest is None and not path.with_suffix(".json").exists():
            continue  # a file that the user put there
        if manifest is None:
            found.append(Earlier(path.stem, "PKG:FN", usable=False))
            continue
        metadata = manifest["metadata"]
        identity, labels = metadata["identity"], _labels_of(metadata)
        names = transfer_names(context, path.stem)
        usable = metadata["key"] == _key(context, identity, labels) and all(
            crafted_on(context, name) == identity for name in names
        )
        found.append(Earlier(path.stem, metadata["factory"], usable))
    return found


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

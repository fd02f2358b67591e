"""A model that the user brings as code: exported, attacked and timed like a variant.

Enters: a `Brought`, a device. Leaves: `cache/NAME.onnx` and its manifest, perturbations, and rows
of the results store, PyTorch's beside the file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from devices.local import LocalDevice
from devices.session import Device
from export.brought import export_brought
from export.exporter import load_manifest
from harness.artefacts import cache_key
from harness.models.brought import theirs
from harness.pipeline.brought import Brought, brought_tasks
from harness.pipeline.context import CPU_THREADS, use_cpu_threads
from harness.pipeline.evaluation import Victim, budget_for, evaluate_task
from harness.pipeline.exports import EXPORT_FORWARDS, exported_here, measure_memory
from harness.pipeline.latency import latency_task
from harness.pipeline.tasks import Progress, Task
from harness.pipeline.uap_names import (
    control_names,
    gradient_free_names,
    targeted_names,
    transfer_name,
    transfer_names,
    white_box_names,
)
from harness.pipeline.uaps import craft_tasks
from harness.records import HarnessError
from harness.sampling import Budget
from harness.workspace import UapName

VERSION = 1


def brought_victim(brought: Brought) -> Victim:
    """The model as it is attacked: the file that was exported from it."""
    name = brought.recipe.name
    return Victim(name, brought.context.workspace.onnx(name), reference=lambda: brought.model)


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


def brought_evaluation(
    brought: Brought, uap_paths: Sequence[Path], device: Device, budget: Budget
) -> Task:
    """Evaluate the model as `evaluate_task` does; what its code raises is said to be its own."""
    task = evaluate_task(brought.context, brought_victim(brought), uap_paths, device, budget)

    def run(progress: Progress) -> None:
        with theirs(f"--factory {brought.recipe.factory}: evaluating its model"):
            task.run(progress)

    return replace(task, run=run)


def brought_uap_names(brought: Brought) -> list[UapName]:
    """What an experiment attacks a model with: controls, its own perturbations and searches."""
    context, name = brought.context, brought.recipe.name
    return [
        *control_names(context),
        *white_box_names(context, name),
        *targeted_names(context, name),
        *gradient_free_names(context, name),
    ]


def other_models(brought: Brought) -> list[str]:
    """Names of models that were brought, exported and crafted on here before, others than this."""
    workspace = brought.context.workspace
    found = []
    for path in sorted(workspace.cache.glob("*.onnx")):
        own = [workspace.uap(name) for name in transfer_names(brought.context, path.stem)]
        exported = exported_here(brought.context, path.stem, path) is not None
        if exported and path.stem != brought.recipe.name and all(uap.exists() for uap in own):
            found.append(path.stem)
    return found


def brought_experiment(
    brought: Brought, device: Device
) -> tuple[list[Task], list[Victim], list[Path]]:
    """(export, craft, attack and time the model; victims; UAP files): `run` for one's own model.

    Models that were brought before and this one meet each other's perturbations at the transfer
    budgets, the others without PyTorch beside them: their code is not run again. On an emulated
    device the model meets clean images and its own perturbation at the reference budget, as
    variants do; the rest, and latency, is measured on this machine.
    """
    context = brought.context
    names = brought_uap_names(brought)
    controls = control_names(context)
    tasks = [brought_export_task(brought)]
    tasks += craft_tasks(context, controls)
    tasks += brought_tasks(brought, [name for name in names if name not in controls])
    main = LocalDevice() if device.emulated else device
    others = other_models(brought)
    names += [name for other in others for name in transfer_names(context, other)]
    paths = [context.workspace.uap(name) for name in names]
    own = context.workspace.uap(transfer_name(context, brought.recipe.name))
    images = context.config.eval.device_images or None
    tasks.append(brought_evaluation(brought, paths, main, budget_for(main, 1, images=images)))
    crossing = [context.workspace.uap(n) for n in transfer_names(context, brought.recipe.name)]
    victims = [Victim(name, context.workspace.onnx(name), None) for name in others]
    for victim in victims:
        tasks.append(evaluate_task(context, victim, crossing, main, budget_for(main, 1)))
    victims.append(brought_victim(brought))
    if device.emulated:
        budget = budget_for(device, 1, images=images)
        tasks.append(brought_evaluation(brought, [own], device, budget))
    if context.config.latency.mode != "off":
        tasks.append(latency_task(context, [brought_victim(brought)], main, uap=own))
    return tasks, victims, paths


def _key(brought: Brought) -> str:
    """Digest of everything the exported file depends on."""
    data = brought.context.data
    return cache_key(
        "export_brought",
        VERSION,
        source=brought.identity,
        labels=_labels(brought),
        images=data.digests["calibration"],
    )


def _labels(brought: Brought) -> dict[str, str]:
    """What the file says of itself."""
    recipe = brought.recipe
    return {
        "variant": recipe.name,
        "method": "user",
        "dataset": brought.context.data.name,
        "factory": recipe.factory,
        "convention": recipe.convention.options(),
    }


def _is_valid(brought: Brought) -> bool:
    path = brought.context.workspace.onnx(brought.recipe.name)
    if not path.exists():
        return False
    try:
        manifest = load_manifest(path)
    except HarnessError:
        return False  # killed between model and manifest, or changed by hand: export again
    return manifest["metadata"].get("key") == _key(brought) and "memory" in manifest


def _export(brought: Brought, progress: Progress) -> None:
    use_cpu_threads(CPU_THREADS)
    context, recipe = brought.context, brought.recipe
    with theirs(f"--factory {recipe.factory}: exporting its model"):
        exported = export_brought(
            brought.model.cpu(),
            out=context.workspace.onnx(recipe.name),
            calibration=context.data.calibration.images,
            classes=context.data.classes,
            metadata={**_labels(brought), "key": _key(brought)},
        )
    progress(0.9, "memory")
    measure_memory(context, exported.path)
    progress(1.0, "")

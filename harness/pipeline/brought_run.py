"""A model that the user brings as code, attacked and timed like a variant.

Enters: a `Brought`, a device. Leaves: `cache/NAME.onnx`, perturbations, and rows of the results
store, PyTorch's beside the file's.
"""

from __future__ import annotations

from devices.local import LocalDevice
from devices.session import Device
from harness.models.brought import Blamed
from harness.pipeline.brought import Brought, brought_tasks
from harness.pipeline.brought_export import brought_export_task, earlier_models
from harness.pipeline.context import Context
from harness.pipeline.evaluation import Victim, budget_for, evaluate_task
from harness.pipeline.exports import brought_manifest
from harness.pipeline.latency import latency_task
from harness.pipeline.tasks import Task, note
from harness.pipeline.uap_names import (
    control_names,
    gradient_free_names,
    targeted_names,
    transfer_name,
    transfer_names,
    white_box_names,
)
from harness.pipeline.uaps import craft_tasks
from harness.workspace import UapName


def brought_victim(brought: Brought) -> Victim:
    """The model as it is attacked: the file that was exported from it, PyTorch beside it."""
    recipe = brought.recipe
    doing = f"--factory {recipe.factory}: evaluating its model"
    path = brought.context.workspace.onnx(recipe.name)

    def reference() -> Blamed:
        manifest = brought_manifest(path)
        # A file that takes one image at a time has the model that is given one at a time.
        alone = manifest is not None and manifest["batch"] == 1
        return Blamed(brought.model, doing, alone=alone)

    return Victim(recipe.name, path, reference=reference, of_code=True)


def brought_uap_names(brought: Brought) -> list[UapName]:
    """What an experiment attacks a model with: controls, its own perturbations and searches."""
    context, name = brought.context, brought.recipe.name
    return [
        *control_names(context),
        *white_box_names(context, name),
        *targeted_names(context, name),
        *gradient_free_names(context, name),
    ]


def brought_experiment(
    brought: Brought, device: Device
) -> tuple[list[Task], list[Victim], list[UapName]]:
    """(export, craft, attack and time the model; victims; perturbations): `run` for one's own.

    Models that were brought before and this one meet each other's perturbations at the transfer
    budgets, the others without PyTorch beside them: their code is not run again. All are timed
    together, since latencies of different hours do not compare. On an emulated device the model
    meets clean images and its own perturbation at the reference budget, as variants do; the rest,
    and latency, is measured on this machine.
    """
    context, name = brought.context, brought.recipe.name
    names, controls = brought_uap_names(brought), control_names(context)
    tasks = [brought_export_task(brought), *craft_tasks(context, controls)]
    tasks += brought_tasks(brought, [n for n in names if n not in controls])
    main = LocalDevice() if device.emulated else device
    others = [Victim(o, context.workspace.onnx(o), None, of_code=True) for o in _others(brought)]
    names += [uap for other in others for uap in transfer_names(context, other.name)]
    victims = [*others, brought_victim(brought)]
    images = context.config.eval.device_images or None

    def attack(victim: Victim, uaps: list[UapName], where: Device, beside: int) -> Task:
        paths = [context.workspace.uap(uap) for uap in uaps]
        return evaluate_task(
            context, victim, paths, where, budget_for(where, 1, images=images), beside=beside
        )

    for victim in others:
        tasks.append(attack(victim, transfer_names(context, name), main, len(victims)))
    tasks.append(attack(victims[-1], names, main, len(victims)))
    own = transfer_name(context, name)
    if device.emulated:
        tasks.append(attack(victims[-1], [own], device, 1))
    if context.config.latency.mode != "off":
        tasks.append(latency_task(context, victims, main, uap=context.workspace.uap(own)))
    return tasks, victims, names


def _others(brought: Brought) -> list[str]:
    """Names of the models that were brought before; says which cannot be met, and why."""
    context: Context = brought.context
    models = earlier_models(context, but=brought.recipe.name)
    for model in models:
        if model.lacks:
            note(
                context.reporter,
                f"{model.name} does not meet this model, {model.lacks}; to have them meet, with "
                f"its checkpoint: {model.command}",
            )
    return [model.name for model in models if not model.lacks]

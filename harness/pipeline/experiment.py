"""The whole experiment as a list of tasks: what `harness run` runs and `harness plan` prints.

Enters: a context. Leaves: tasks in dependency order. Single commands take the part they need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from devices.local import LocalDevice
from devices.model_file import check_model_file
from devices.session import Device
from harness.crafting.perturbation import load_perturbation
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.attacks import crafted_on_another, load_attack
from harness.pipeline.brought import Brought, brought_tasks
from harness.pipeline.brought_export import brought_export_task
from harness.pipeline.brought_run import brought_uap_names, brought_victim
from harness.pipeline.checkpoints import reference_form, train_tasks
from harness.pipeline.context import Context
from harness.pipeline.evaluation import Victim, budget_for, evaluate_task, register
from harness.pipeline.exports import brought_manifest, export_tasks
from harness.pipeline.instructions import instructions_task
from harness.pipeline.latency import latency_task
from harness.pipeline.tasks import Task
from harness.pipeline.uap_names import (
    control_names,
    fleet_names,
    gradient_free_names,
    leave_one_out_names,
    targeted_names,
    transfer_name,
    transfer_names,
    white_box_names,
)
from harness.pipeline.uaps import craft_tasks
from harness.records import (
    DEPLOYABLE,
    PAPER_ORDER,
    UsageError,
    trained_for,
    variant_named,
)
from harness.sources import FLEET, is_source, members
from harness.workspace import UapName, parse_uap_name

LatencyMode = Literal["none", "quick", "full"]


def ordered(names: list[str]) -> list[str]:
    """Variant names without repeats, in the paper's order.

    Raises:
        UsageError: an unknown variant.
    """
    for name in names:
        variant_named(name)
    return [name for name in PAPER_ORDER if name in names]


def all_uap_names(context: Context, variants: list[str]) -> list[UapName]:
    """Every perturbation of the experiment, a source's after one another, controls first.

    The fleet is all ten variants: an experiment with fewer has none.
    """
    names = control_names(context)
    for source in variants:
        names += white_box_names(context, source) + targeted_names(context, source)
        names += gradient_free_names(context, source)
    if _is_fleet(variants):
        names += fleet_names(context)
        for victim in variants:
            names += leave_one_out_names(context, victim)
    return names


def _is_fleet(variants: list[str]) -> bool:
    return set(members(FLEET)) <= set(variants)


def victim_uap_names(context: Context, victim: str, variants: list[str]) -> list[UapName]:
    """What one victim is attacked with.

    Controls, its own UAPs, every other source's at the transfer budgets, the whole fleet's, and
    that of the fleet without it.
    """
    names = control_names(context) + white_box_names(context, victim)
    for source in variants:
        names += transfer_names(context, source) if source != victim else []
    if _is_fleet(variants):
        names += fleet_names(context) + leave_one_out_names(context, victim)
    return names + targeted_names(context, victim) + gradient_free_names(context, victim)


def experiment_tasks(context: Context, variants: list[str], device: Device) -> list[Task]:
    """Train, export, craft, attack and time the variants: everything but the report.

    On an emulated device each variant meets clean images and its own perturbation at the reference
    budget: shared by all conditions, its time would leave a handful of images to each. All of them
    are evaluated, and latency is measured, on this machine.
    """
    tasks = train_tasks(context, variants)
    tasks += export_tasks(context, variants)
    tasks += craft_tasks(context, all_uap_names(context, variants))
    main = LocalDevice() if device.emulated else device
    victims = [variant_victim(context, name) for name in variants]
    images = context.config.eval.device_images or None
    budget = budget_for(main, len(variants), images=images)
    for victim in victims:
        uaps = [context.workspace.uap(u) for u in victim_uap_names(context, victim.name, variants)]
        tasks.append(evaluate_task(context, victim, uaps, main, budget, beside=len(victims)))
    if device.emulated:
        budget = budget_for(device, len(variants), images=images)
        for victim in victims:
            own = context.workspace.uap(transfer_name(context, victim.name))
            tasks.append(evaluate_task(context, victim, [own], device, budget))
    if context.config.latency.mode != "off":
        uap = context.workspace.uap(transfer_name(context, variants[0]))
        tasks.append(latency_task(context, victims, main, uap=uap))
    return tasks


def register_current(context: Context, victims: list[Victim], uap_paths: list[Path]) -> None:
    """Tell the store that these are what the last command was about."""
    with context.open_store() as store:
        register(context, store, victims, [load_attack(context, path) for path in uap_paths])


def experiment_files(context: Context, variants: list[str]) -> tuple[list[Victim], list[Path]]:
    """(victims, UAP files) of the whole experiment."""
    victims = [variant_victim(context, name) for name in variants]
    return victims, [context.workspace.uap(name) for name in all_uap_names(context, variants)]


def attack_tasks(
    context: Context,
    *,
    variants: list[str],
    onnx_files: list[Path],
    brought: Brought | None = None,
    uaps: list[str],
    device: Device,
    budget_s: float | None = None,
    until_ci: float | None = None,
    latency: LatencyMode = "none",
    instructions: bool = False,
    device_images: int | None = None,
) -> tuple[list[Task], list[Victim], list[Path]]:
    """Attack some victims on a device with the UAPs the user named, building what is missing.

    Args:
        context: the workspace.
        variants: victims of the workspace.
        onnx_files: victims that the user brought as files.
        brought: one that the user brought as code; with no `uaps`, it meets all that an experiment
            has for a model.
        uaps: as the user named them.
        device: where to attack.
        budget_s: seconds for all victims together; None with no `until_ci`: the device's own.
        until_ci: half-width in percentage points of the UER's interval that is enough.
        latency: whether, and how long, to time the victims afterwards.
        instructions: whether to count those of one inference, on an emulated device.
        device_images: how many images to run on the device where nothing limits it; 0: all; None:
            as configured.

    Returns:
        (tasks, victims, UAP files in the order given).

    Raises:
        UsageError: a UAP that is missing and whose name is none of ours, or does not fit; a
            model file that is not what the harness runs; latency of an emulated device.
    """
    if latency != "none" and device.emulated:
        raise UsageError(
            f"{device.name} is emulated: it has predictions, but no latency; with a board of your "
            f"own: harness devices add {device.name} --host USER@BOARD"
        )
    if brought is not None and not uaps:
        uaps = [str(context.workspace.uap(n).resolve()) for n in brought_uap_names(brought)]
    own = brought.recipe.name if brought is not None else None
    located = [locate_uap(context, text, own=own) for text in uaps]
    # One perturbation named twice is one: by its file, wherever it was named from.
    by_file = {path.resolve(): (name, path) for name, path in reversed(located)}
    located = list(by_file.values())[::-1]
    names = [name for name, _ in located if name is not None]
    for name, path in located:
        if name is None:
            attack = load_attack(context, path)  # bad input is refused before anything is built
            if crafted_on_another(context, attack.perturbation):
                context.reporter.note(
                    f"{path} was crafted on another model than cache/{attack.perturbation.source}"
                    f".onnx is of: rows call it {attack.record.source!r}; harness craft --factory "
                    "makes it anew"
                )
    stems = [*(path.stem for path in onnx_files), *([own] if own is not None else [])]
    if len(set(stems)) < len(stems):
        raise UsageError("two models have the same name: rename one, so that rows stay apart")
    for path in onnx_files:
        _check_onnx(context, path)
    files = [context.sha256(path) for path in onnx_files]
    if len(set(files)) < len(files):
        raise UsageError("two --onnx files are the same file: name one of them")
    on_own = [name for name in names if name.source == own]
    names = [name for name in names if name.source != own]
    sources = [member for name in names for member in members(name.source)]
    tasks = train_tasks(context, [*variants, *sources])
    tasks += export_tasks(context, variants) + craft_tasks(context, names)
    victims = [variant_victim(context, name) for name in variants]
    victims += [_file_victim(context, path) for path in onnx_files]
    paths = [path for _, path in located]
    images = context.config.eval.device_images if device_images is None else device_images
    if brought is not None:
        tasks += [brought_export_task(brought), *brought_tasks(brought, on_own)]
        victims.append(brought_victim(brought))
    budget = budget_for(
        device, len(victims), images=images or None, seconds=budget_s, until_ci=until_ci
    )
    tasks += [
        evaluate_task(context, victim, paths, device, budget, beside=len(victims))
        for victim in victims
    ]
    if latency != "none":
        tasks.append(latency_task(context, victims, device, uap=paths[0], mode=latency))
    if instructions:
        tasks.append(instructions_task(context, victims, device))
    return tasks, victims, paths


def locate_uap(
    context: Context, text: str, *, own: str | None = None
) -> tuple[UapName | None, Path]:
    """Where a `--uap` is: the current folder, then the workspace; else what is to be crafted.

    Args:
        context: the workspace.
        text: as the user named it.
        own: what a model of the user's own is called, which can be crafted on too.

    Returns:
        (name to craft, path), name None for a file that is taken as it is.

    Raises:
        UsageError: no such file, and not a name like cache/full_eps10.pt.
    """
    path = Path(text)
    in_workspace = context.workspace.root / path
    name = parse_uap_name(path)
    # Only the canonical name, in this workspace, is ours to build.
    ours = (
        name is not None
        and (is_source(name.source) or name.source == own)
        and in_workspace.resolve() == context.workspace.uap(name).resolve()
    )
    if path.exists() and path.resolve() != in_workspace.resolve():
        return None, path
    if ours and name is not None and not _foreign(in_workspace):
        return name, in_workspace
    if in_workspace.exists():
        return None, in_workspace
    raise UsageError(
        f"no UAP file {text}, here or in {context.workspace.root}: a missing file is crafted when "
        "it is called like cache/full_eps10.pt or cache/q4_eps10_t3.pt; on a model of your own, "
        "harness craft --factory makes it"
    )


def _file_victim(context: Context, path: Path) -> Victim:
    """A file as a victim; one that was exported here from a user's code stays what it is."""
    exported = context.workspace.onnx(path.stem)
    here = path.resolve() == exported.resolve() and brought_manifest(exported) is not None
    return Victim(path.stem, path, None, of_code=here)


def _foreign(path: Path) -> bool:
    """Whether a file under one of our names was made elsewhere: used as it is, not rebuilt."""
    return path.exists() and "key" not in load_perturbation(path, own=True).meta


def variant_victim(context: Context, name: str) -> Victim:
    """A variant, or what is derived from one, as a victim."""
    checkpoint = context.workspace.checkpoint(trained_for(name).name)
    return Victim(
        name,
        context.workspace.onnx(name),
        reference=lambda: reference_form(load_checkpoint(checkpoint).build()),
    )


def _check_onnx(context: Context, path: Path) -> None:
    if path.stem in DEPLOYABLE:
        raise UsageError(f"{path} is called like a variant: rename it, so that rows stay apart")
    model = check_model_file(path)
    for name in DEPLOYABLE:
        exported = context.workspace.onnx(name)
        if exported.exists() and context.sha256(exported) == model.sha256:
            raise UsageError(f"{path} is the workspace's own {name}: use --model {name}")
    _check_known(context, path, model.sha256)
    if model.image_shape != context.image_shape or model.classes != len(context.data.classes):
        raise UsageError(
            f"{path} takes images {list(model.image_shape)} of {model.classes} classes; "
            f"{context.data.name} has {list(context.image_shape)} of {len(context.data.classes)}"
        )


def _check_known(context: Context, path: Path, sha256: str) -> None:
    """Results belong to a file, and a file has one name: neither may be taken from another."""
    exported = context.workspace.onnx(path.stem)
    if exported.resolve() != path.resolve() and brought_manifest(exported) is not None:
        raise UsageError(
            f"{path} is called like your model {path.stem} (--factory): rename it, so that rows "
            "stay apart"
        )
    if not context.workspace.results.exists():
        return
    with context.open_store() as store:
        known = store.models(current_only=False).get(sha256)
    if known is not None and known.variant != path.stem:
        raise UsageError(
            f"{path} is the file that was measured here as {known.variant}: call it "
            f"{known.variant}.onnx, or use its results"
        )

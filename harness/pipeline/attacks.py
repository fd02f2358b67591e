"""Perturbation files as a workspace sees them: its own, a copy, of a model that was, a stranger's.

Enters: a path. Leaves: the perturbation and the record that rows are labelled by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.config_rules import ATTACKS
from harness.crafting.perturbation import Perturbation, check_fits, load_perturbation, uap_record
from harness.models.brought import NAME
from harness.pipeline.context import Context
from harness.pipeline.exports import brought_manifest
from harness.records import UapRecord
from harness.workspace import UapName, parse_uap_name


@dataclass(frozen=True)
class Attack:
    """A perturbation with its file's identity."""

    perturbation: Perturbation
    record: UapRecord


def load_attack(context: Context, path: Path) -> Attack:
    """Read a UAP file and check that it fits this workspace.

    Raises:
        UsageError: unreadable, damaged, over budget, or made for other images.
    """
    perturbation = load_perturbation(path)
    check_fits(
        perturbation,
        path,
        dataset=context.data.name,
        image_shape=context.image_shape,
        classes=len(context.data.classes),
    )
    record = uap_record(path, perturbation, own=_is_own(context, path, perturbation))
    if crafted_on_another(context, perturbation):
        record = replace(record, own=False, source=f"{record.source} (other model)")
    elif not record.own and _is_taken(context, record):
        record = replace(record, source=f"{record.source} (elsewhere)")
    return Attack(perturbation, record)


def crafted_on_another(context: Context, perturbation: Perturbation) -> bool:
    """Whether it was crafted on another model of the user's than is exported under its name."""
    manifest = _exported_as(context, perturbation.source)
    of = perturbation.meta.get("checkpoint_sha256")
    return manifest is not None and of is not None and manifest["metadata"]["identity"] != of


def _is_own(context: Context, path: Path, perturbation: Perturbation) -> bool:
    """Whether the workspace made it and would look for it there: a copy is somebody's file."""
    name = parse_uap_name(path)
    where = context.workspace.uap(name).resolve() if name is not None else None
    return where == path.resolve() and "key" in perturbation.meta


def _is_taken(context: Context, record: UapRecord) -> bool:
    """Whether a file says that it is what the workspace has another file of.

    Of a model of the user's everything that was not crafted here is another's.
    """
    if not NAME.fullmatch(record.source):  # whatever a stranger wrote
        return False
    name = UapName(record.source, record.eps, target=record.target, seed=record.seed)
    if record.attack in ATTACKS and record.attack != context.config.attack:
        name = replace(name, attack=record.attack)
    ours = context.workspace.uap(name)
    if ours.exists():
        return context.sha256(ours) != record.sha256
    return _exported_as(context, record.source) is not None


def _exported_as(context: Context, source: str) -> dict[str, Any] | None:
    """The manifest of the user's model of that name; the name is whatever a stranger wrote."""
    return brought_manifest(context.workspace.onnx(source)) if NAME.fullmatch(source) else None

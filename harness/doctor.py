"""What a machine has and lacks for the harness: findings, each with what to do about it.

Enters: a folder. Leaves: findings; nothing is changed, nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.records import HarnessError

PACKAGES = (
    "torch", "torchvision", "onnx", "onnxruntime", "numpy", "click", "rich", "scipy",
    "scikit-learn", "matplotlib", "jinja2",
)  # fmt: skip
MIN_FREE_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    subject: str
    level: Literal["ok", "note", "problem"]
    text: str


def examine(root: Path) -> list[Finding]:
    """Examine this machine and the workspace in `root`."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for part in (_packages, _torch, _torchvision, _scikit_learn_data, _devices):
        findings += part()
    return findings + list(_folder(root)) + list(_workspace(root))


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "problem", f"not installed: {sys.executable} -m pip install {name}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding("torch import", "problem", f"{type(error).__name__}: {error}")
        return
    if torch.cuda.is_available():
        yield Finding("accelerator", "ok", f"CUDA: {torch.cuda.get_device_name(0)}")
    else:
        text = f"no GPU; CPU with {os.cpu_count()} cores: fine for quickstart, days for paper scale"
        yield Finding("accelerator", "note", text)


def _torchvision() -> Iterator[Finding]:
    try:
        from harness.data.official import default_data_dir
        from harness.data.torchvision_shim import import_torchvision

        import_torchvision()
    except Exception as error:
        yield Finding("torchvision import", "problem", f"{type(error).__name__}: {error}")
        return
    folder = default_data_dir()
    for name, file in (("cifar10", "cifar-10-batches-py"), ("svhn", "train_32x32.mat")):
        there = (folder / file).exists()
        text = f"in {folder}" if there else "not downloaded; done on first use, or --data-dir DIR"
        yield Finding(f"data {name}", "ok" if there else "note", text)


def _scikit_learn_data() -> Iterator[Finding]:
    try:
        from sklearn.datasets import load_digits

        yield Finding("data digits", "ok", f"embedded, {len(load_digits().target):,} originals")
    except Exception as error:
        yield Finding("data digits", "problem", f"{type(error).__name__}: {error}")


def _devices() -> Iterator[Finding]:
    from devices.local import LocalDevice
    from devices.profiles import own_settings, profiles, user_file
    from devices.registry import how_it_runs

    try:
        with LocalDevice().open() as session:
            machine = session.machine
        text = f"{machine.cpu}, {machine.arch}, onnxruntime {machine.runtime_version}"
        yield Finding("device local", "ok", text)
    except HarnessError as error:
        yield Finding("device local", "problem", str(error))
    try:
        known, own = profiles(user_file()), own_settings(user_file())
    except HarnessError as error:
        yield Finding("devices", "problem", str(error))
        return
    for profile in known.values():
        # Boards are not called, and nothing is set up, to diagnose this machine.
        if profile.name in own or profile.emulated:
            text = f"{how_it_runs(profile)}; try it: harness devices probe {profile.name}"
            yield Finding(f"device {profile.name}", "note", text)


def _folder(root: Path) -> Iterator[Finding]:
    existing = root.resolve()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        yield Finding("folder", "problem", f"{existing} cannot be written: use --workspace DIR")
    free = shutil.disk_usage(existing).free
    enough = free >= MIN_FREE_BYTES
    yield Finding("disk", "ok" if enough else "problem", f"{free / 2**30:.1f} GiB free there")


def _workspace(root: Path) -> Iterator[Finding]:
    from harness.workspace import CONFIG_NAME, open_workspace

    if not (root / CONFIG_NAME).exists():
        yield Finding("workspace", "note", f"none in {root}: `harness run` makes one")
        return
    try:
        config = open_workspace(root).config
        yield Finding("workspace", "ok", f"{config.preset}, {config.dataset}, width {config.width}")
    except HarnessError as error:
        yield Finding("workspace", "problem", str(error))

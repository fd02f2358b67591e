"""A workspace: one folder, one experiment. Names of files, and who may write there.

Enters: a folder. Leaves: paths, and the configuration its `harness.toml` holds.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.artefacts import write_atomic
from harness.config import Config
from harness.config_file import load_config, to_toml
from harness.records import CONTROLS, DEPLOYABLE, PAPER_ORDER, HarnessError, UsageError

CONFIG_NAME = "harness.toml"
DEFAULT_ATTACK = ""
"""The workspace's own, as `harness.toml` says: its files carry no attack in their names."""
DEFAULT_SEED = 0

_UAP_NAME = re.compile(
    r"(?P<source>[A-Za-z][A-Za-z0-9_-]{0,63})_eps(?P<eps>\d+(?:\.\d+)?)"
    r"(?:_t(?P<target>\d+))?(?:_(?P<attack>[a-z]+))?(?:_s(?P<seed>\d+))?\.pt"
)


@dataclass(frozen=True)
class UapName:
    """What a perturbation's file name says: `cache/full_eps10_t4.pt`."""

    source: str
    eps: float
    target: int | None = None
    attack: str = DEFAULT_ATTACK
    seed: int = DEFAULT_SEED

    @property
    def stem(self) -> str:
        """The file name without `.pt`; what is the default is left out."""
        # Every digit: two budgets must not share a file.
        eps = np.format_float_positional(self.eps, trim="-")
        parts = [f"{self.source}_eps{eps}"]
        if self.target is not None:
            parts.append(f"t{self.target}")
        if self.attack != DEFAULT_ATTACK and self.source not in CONTROLS:
            parts.append(self.attack)
        if self.seed != DEFAULT_SEED:
            parts.append(f"s{self.seed}")
        return "_".join(parts)


def parse_uap_name(path: Path) -> UapName | None:
    """The name behind a path like `cache/full_eps10.pt`; None when it is none of ours."""
    match = _UAP_NAME.fullmatch(path.name)
    if match is None or path.parent.name != "cache":
        return None
    target, seed = match["target"], match["seed"]
    return UapName(
        source=match["source"],
        eps=float(match["eps"]),
        target=int(target) if target is not None else None,
        attack=match["attack"] or DEFAULT_ATTACK,
        seed=int(seed) if seed is not None else DEFAULT_SEED,
    )


@dataclass(frozen=True)
class Workspace:
    """Where everything of one experiment lives."""

    root: Path
    config: Config

    @property
    def cache(self) -> Path:
        """The folder of checkpoints, exported models and perturbations."""
        return self.root / "cache"

    @property
    def results(self) -> Path:
        """The results store."""
        return self.root / "results.db"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.root / "report"

    def checkpoint(self, variant: str) -> Path:
        """The trained or compressed model."""
        return self.cache / f"{variant}.pt"

    def onnx(self, variant: str) -> Path:
        """The exported model; its manifest is beside it, as .json."""
        return self.cache / f"{variant}.onnx"

    def compat_onnx(self, variant: str) -> Path:
        """The same model in the encoding every runtime reads (`harness export --compat`)."""
        return self.cache / f"{variant}_compat.onnx"

    @property
    def tuning(self) -> Path:
        """Measured times of both forms of every quantised layer (`harness export --tune`)."""
        return self.cache / "tuning.json"

    def uap(self, name: UapName) -> Path:
        """The perturbation of that name."""
        return self.cache / f"{name.stem}.pt"

    def own_models(self) -> list[str]:
        """Names of a user's models that were exported here: with a manifest beside the file."""
        names = [path.stem for path in sorted(self.cache.glob("*.onnx"))]
        own = [name for name in names if name.removesuffix("_compat") not in DEPLOYABLE]
        return [name for name in own if self.onnx(name).with_suffix(".json").exists()]

    def of_ones_own(self) -> list[str]:
        """The same, where none of the ten variants was trained beside them."""
        trained = any(self.checkpoint(name).exists() for name in PAPER_ORDER)
        return [] if trained else self.own_models()

    def partial(self, name: str) -> Path:
        """State of unfinished work."""
        return self.cache / ".partial" / f"{name}.pt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace for writing; released when the process ends, however it ends.

        Raises:
            HarnessError: another harness is working here, or the folder cannot be written.
        """
        path = self.root / ".lock"
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise HarnessError(f"cannot write in {self.root} ({error.strerror})") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HarnessError(
                    f"another harness is working in {self.root}: wait for it, or use --workspace"
                ) from None
            yield
        finally:
            os.close(handle)


def holds_work(root: Path) -> bool:
    """Whether a folder has what an experiment built or measured."""
    made = ("*.pt", "*.onnx", ".partial/*.pt")
    found = any(any((root / "cache").glob(pattern)) for pattern in made)
    return found or (root / "results.db").exists()


def create_workspace(root: Path, config: Config) -> Workspace:
    """Write `harness.toml` into a folder that has none.

    Raises:
        UsageError: there is one already.
        HarnessError: the folder cannot be written.
    """
    path = root / CONFIG_NAME
    if path.exists():
        raise UsageError(f"{path} exists: edit it, or choose another folder with --workspace")
    write_atomic(path, to_toml(config).encode())
    return Workspace(root, config)


def open_workspace(root: Path) -> Workspace:
    """The workspace in a folder with a `harness.toml`.

    Raises:
        UsageError: there is none, or it is malformed.
    """
    path = root / CONFIG_NAME
    if not path.exists():
        raise UsageError(f"no {CONFIG_NAME} in {root}: run `harness init` or `harness run` there")
    return Workspace(root, load_config(path))

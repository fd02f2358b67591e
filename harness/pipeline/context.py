"""What every stage works with: the workspace, the data, the accelerator, the user's ear.

Enters: a workspace and the command line's choices. Leaves: nothing on disk.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from harness.artefacts import sha256_file
from harness.config import Config
from harness.data.dataset import Dataset, load_dataset
from harness.models.checkpoint import load_checkpoint
from harness.pipeline.running import run_tasks
from harness.pipeline.tasks import EVERYTHING, Deadline, Reporter, Shared, Silent, Task
from harness.records import EvaluationSet, UsageError
from harness.store import Store, open_store
from harness.streams import stdout_spared
from harness.workspace import Workspace

EXAMPLE_IMAGES = 8
"""Evaluation images kept in the store for the report's pictures."""
CPU_THREADS = 2
"""PyTorch threads unless OMP_NUM_THREADS says otherwise: the same number gives the same bits."""
TRAIN_THREADS = 1
"""The same for training: small models train faster side by side than over several cores."""
MAX_JOBS = 4
"""Models trained side by side at most: each takes memory."""
GPU_JOBS = 2
"""The same on a GPU, which one leaves idle while it prepares its next step (ResNet-18 of width 64
on an H200: 1.03 and 1.24 times the images a second of one alone, in two runs)."""
GPU_BYTES = 24 * 2**30
"""Memory from which a GPU is large: one of these trainings takes some 6 to 10 GiB."""
MAX_EVALUATIONS = 10
"""Models exported, or exported models evaluated, side by side at most: as many as there are
variants."""


@dataclass
class Context:
    """One command's view of one workspace."""

    workspace: Workspace
    accelerator: torch.device
    data_dir: Path | None = None
    reporter: Reporter = field(default_factory=Silent)
    deadline: Deadline = field(default_factory=Deadline)
    """When `build` stops; by default never."""
    planning: bool = False
    """Nothing is built, and nothing downloaded to be counted: see `load_dataset`."""
    loaded: Dataset | None = None
    """The data set, where it is in memory already."""
    _hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)
    _headers: dict[tuple[str, int, int], tuple[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The workspace's configuration."""
        return self.workspace.config

    @cached_property
    def data(self) -> Dataset:
        """The data set in its roles, loaded once."""
        if self.loaded is not None:
            return self.loaded
        config = self.config
        return load_dataset(
            self._dataset_name(),
            data_dir=self.data_dir,
            attack_images=config.craft.attack_images,
            evaluation_images=config.eval.images or None,
            seed=config.seed,
            planning=self.planning,
            progress=self.reporter.note,
        )

    def _dataset_name(self) -> str:
        """A path in harness.toml is of the folder one works in, as any; or beside harness.toml."""
        name, root = self.config.dataset, self.workspace.root
        if Path(name).exists():
            return name
        if (root / name).exists():
            return str(root / name)
        if name.lower().endswith(".npz") and not name.startswith(("/", "~")):
            folders = dict.fromkeys((str(Path.cwd()), str(root.resolve())))
            raise UsageError(
                f"{name} does not exist in {' or in '.join(folders)}: put it there, or correct"
                f" dataset in {root / 'harness.toml'}"
            )
        return name

    def build(self, tasks: Sequence[Task]) -> int:
        """Run what is not done yet, side by side where that pays. Returns how many were run."""
        assert not self.planning  # its images may be zeros
        with stdout_spared():
            return run_tasks(tasks, self.reporter, jobs=self.jobs, deadline=self.deadline)

    @property
    def jobs(self) -> dict[Shared, int]:
        """How many tasks run side by side, by what they share."""
        return {
            "accelerator": jobs_for(self.accelerator),
            "cores": max(1, min(MAX_EVALUATIONS, _lanes())),
        }

    def uses(self, shared: Shared) -> frozenset[Shared]:
        """What a task that runs there takes of the machine; without a GPU both are the cores."""
        return EVERYTHING if self.accelerator.type == "cpu" else frozenset((shared,))

    @property
    def speedups(self) -> dict[Shared, int]:
        """How many times as much gets done side by side: on a GPU models fill each other's gaps."""
        return self.jobs if self.accelerator.type == "cpu" else {**self.jobs, "accelerator": 1}

    def threads_of_each(self, tasks: int, *, staggered: bool = False) -> int | None:
        """Threads of each of several tasks side by side on the cores; None: they come in turn.

        Their equal share, rounded down. Tasks that come to the cores one after the other are not
        all there at once: theirs is rounded up.
        """
        jobs = self.jobs["cores"]
        if jobs == 1:
            return None
        side_by_side = min(jobs, tasks)
        share = -(-_cores() // side_by_side) if staggered else _cores() // side_by_side
        return _omp_num_threads() or max(1, share)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every image."""
        channels, height, width = self.data.evaluation.images.shape[1:]
        return (channels, height, width)

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """Target classes of the targeted UAPs.

        Raises:
            UsageError: the configuration names a class that does not exist.
        """
        n_classes = len(self.data.classes)
        wanted = self.config.craft.targets
        if isinstance(wanted, str):
            return tuple(range(n_classes))
        for target in wanted:
            if target >= n_classes:
                raise UsageError(
                    f"craft.targets names class {target}, but the classes of {self.data.name} are "
                    f"0 to {n_classes - 1}"
                )
        return wanted

    def open_store(self) -> Store:
        """The results store of the workspace, created if need be."""
        return open_store(self.workspace.results, git_commit=git_commit())

    def sha256(self, path: Path) -> str:
        """Digest of a file, remembered until the file changes."""
        identity = _identity(path)
        if identity not in self._hashes:
            self._hashes[identity] = sha256_file(path)
        return self._hashes[identity]

    def checkpoint_header(self, path: Path) -> tuple[str, dict[str, Any]]:
        """(key, metadata) of a checkpoint that was checked whole, remembered until it changes.

        Raises:
            UsageError: the checkpoint is damaged.
        """
        identity = _identity(path)
        if identity not in self._headers:
            checkpoint = load_checkpoint(path)
            self._headers[identity] = (checkpoint.key, checkpoint.meta)
        return self._headers[identity]

    def evaluation_set(self) -> EvaluationSet:
        """The record of what metrics are computed on."""
        data = self.data
        images = data.evaluation.images[:EXAMPLE_IMAGES]
        return EvaluationSet(
            sha256=data.digests["evaluation"],
            dataset=data.name,
            classes=data.classes,
            labels=tuple(int(label) for label in data.evaluation.labels),
            image_shape=self.image_shape,
            examples=images.tobytes(),
            note=data.note,
        )


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return (str(path), stat.st_mtime_ns, stat.st_size)


def choose_accelerator(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a torch device; sets the number of CPU threads.

    Raises:
        UsageError: cuda was asked for and is not there.
    """
    use_cpu_threads(CPU_THREADS)
    torch.backends.cudnn.deterministic = True
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("no CUDA device here: use --accelerator cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def use_cpu_threads(threads: int) -> None:
    """Let this thread's PyTorch work take so many cores, or OMP_NUM_THREADS where that is set.

    Every stage says so when it starts: PyTorch keeps the number partly per thread and partly per
    process, so that the stage before may have left another.
    """
    torch.set_num_threads(_omp_num_threads() or threads)


def jobs_for(accelerator: torch.device) -> int:
    """How many models are trained side by side: two on a large GPU, else what the cores allow."""
    if accelerator.type != "cpu":
        memory = torch.cuda.get_device_properties(accelerator).total_memory
        return GPU_JOBS if memory >= GPU_BYTES else 1
    return max(1, min(MAX_JOBS, _lanes()))


def _lanes() -> int:
    """How many models the cores have room for, each with its threads."""
    return _cores() // (_omp_num_threads() or TRAIN_THREADS)


def _cores() -> int:
    # Linux says which cores are ours; elsewhere all are.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def _omp_num_threads() -> int:
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() else 0


def processor_name() -> str:
    """The model of the CPU, as the system calls it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this source tree, with `+` when it has changes; None outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],  # noqa: S607
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None

"""What runs side by side on machines that are not at hand."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.config import Config
from harness.pipeline import context
from harness.pipeline.context import Context
from harness.pipeline.tasks import EVERYTHING
from harness.workspace import create_workspace


@pytest.mark.parametrize(("gib", "jobs"), [(8, 1), (23.6, 1), (24, 2), (139, 2)])
def test_two_models_are_trained_side_by_side_on_a_large_gpu_only(
    gib: float, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert context.jobs_for(torch.device("cuda")) == jobs


@pytest.mark.parametrize(
    ("cores", "omp", "tasks", "threads"),
    [
        (1, "", 3, None),
        (2, "", 10, 1),
        (2, "", 1, 2),
        (16, "", 4, 4),
        (16, "", 10, 1),
        (16, "2", 4, 2),
        (16, "8", 1, 8),
    ],
)
def test_tasks_side_by_side_share_the_cores(
    cores: int,
    omp: str,
    tasks: int,
    threads: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    here = Context(create_workspace(tmp_path, Config()), torch.device("cpu"))
    assert here.threads_of_each(tasks) == threads


@pytest.mark.parametrize(
    ("cores", "omp", "tasks", "threads"),
    [(16, "", 10, 2), (16, "", 1, 16), (16, "2", 10, 2), (2, "", 10, 1), (1, "", 3, None)],
)
def test_what_comes_to_the_cores_in_turn_takes_more_of_them(
    cores: int,
    omp: str,
    tasks: int,
    threads: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    here = Context(create_workspace(tmp_path, Config()), torch.device("cpu"))
    assert here.threads_of_each(tasks, staggered=True) == threads


def test_only_beside_a_gpu_do_the_cores_do_something_else(tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path, Config())
    assert Context(workspace, torch.device("cuda")).uses("cores") == {"cores"}
    assert Context(workspace, torch.device("cpu")).uses("cores") == EVERYTHING


def test_a_gpu_is_planned_as_if_models_were_trained_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    here = Context(create_workspace(tmp_path, Config()), torch.device("cuda"))
    assert (here.jobs["accelerator"], here.speedups["accelerator"]) == (2, 1)

"""What a GPU's memory allows, told without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from harness.pipeline import context


@pytest.mark.parametrize(("gib", "jobs"), [(8, 1), (23.6, 1), (24, 2), (139, 2)])
def test_two_models_are_trained_side_by_side_on_a_large_gpu_only(
    gib: float, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert context.jobs_for(torch.device("cuda")) == jobs

"""What a whole experiment does on which device, and that a kill loses one search at most."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import split, trained

from harness.crafting.perturbation import load_perturbation
from harness.crafting.waves import FourierSettings
from harness.models.folded import fold
from harness.pipeline import craft_pass as craft_pass_module
from harness.pipeline.context import Context
from harness.pipeline.craft_pass import craft_pass
from harness.pipeline.experiment import experiment_tasks
from harness.presets import preset_named
from harness.records import PAPER_ORDER, UsageError
from harness.workspace import UapName, Workspace


def context(root: Path) -> Context:
    return Context(Workspace(root, preset_named("quickstart")), torch.device("cpu"))


def test_a_data_file_that_is_missing_is_told_with_where_it_was_looked_for(tmp_path: Path) -> None:
    config = preset_named("quickstart", dataset="photos.npz")
    here = Context(Workspace(tmp_path, config), torch.device("cpu"))
    with pytest.raises(UsageError) as missing:
        _ = here.data
    assert f"photos.npz does not exist in {Path.cwd()} or in {tmp_path}: " in str(missing.value)


def measured(root: Path, **device: Any) -> tuple[list[str], list[str]]:
    """(what evaluates, what times) of the experiment on such a device."""
    fake: Any = SimpleNamespace(**device)
    tasks = experiment_tasks(context(root), list(PAPER_ORDER), fake)
    return tuple([t.name for t in tasks if t.stage == s] for s in ("evaluate", "latency"))


def test_a_board_with_a_time_budget_is_measured_itself(tmp_path: Path) -> None:
    evaluated, timed = measured(tmp_path, name="porch", emulated=False, default_budget_s=600.0)
    assert evaluated == [f"attack {name} on porch" for name in PAPER_ORDER]
    assert timed == ["latency on porch (quick)"]


def test_an_emulated_one_has_a_sample_beside_everything_here(tmp_path: Path) -> None:
    evaluated, timed = measured(tmp_path, name="rpi4", emulated=True, default_budget_s=300.0)
    here = [f"attack {name} on local" for name in PAPER_ORDER]
    assert evaluated == here + [f"attack {name} on rpi4" for name in PAPER_ORDER]
    assert timed == ["latency on local (quick)"]


def test_a_kill_loses_one_search_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, real = context(tmp_path), craft_pass_module.craft_fourier
    names = [UapName("full", eps, attack="fourier") for eps in (4.0, 8.0, 10.0)]
    begun: list[str] = []

    def killed_in_the_third(*arguments: Any, key: str, **options: Any) -> Any:
        begun.append(key)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(*arguments, key=key, **options)

    monkeypatch.setattr(craft_pass_module, "craft_fourier", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        craft_pass(
            ours,
            [fold(trained())],
            names,
            members=[(0,)] * 3,
            keys=["a", "b", "c"],
            identities=["id"] * 3,
            settings=FourierSettings(passes=64),
            split=split(32),
            probe=[False] * 3,
            partial=tmp_path / "partial.pt",
            progress=lambda _done, _note: None,
        )
    there = [ours.workspace.uap(name).exists() for name in names]
    assert there == [True, True, False]


def test_the_fleet_is_searched_without_gradients_too(tmp_path: Path) -> None:
    ours = context(tmp_path)
    name = UapName("fleet", 10.0, attack="fourier")
    craft_pass(
        ours,
        [fold(trained()), fold(trained(steps=40))],
        [name],
        members=[(0, 1)],
        keys=["a"],
        identities=["id"],
        settings=FourierSettings(passes=200),
        split=split(32),
        probe=[False],
        partial=tmp_path / "partial.pt",
        progress=lambda _done, _note: None,
    )
    made = load_perturbation(ours.workspace.uap(name))
    assert made.attack == "fourier"
    assert set(np.unique(made.delta_255)) == {-10, 10}
    assert made.meta["forwards"] <= 200
    assert set(made.meta["wave"]) == {"across", "down", "phase", "sign"}

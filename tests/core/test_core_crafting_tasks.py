"""Which perturbations are crafted together, with which attack, and what their files are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.config import Config
from harness.config_file import config_from_dict
from harness.crafting.perturbation import Perturbation, save_perturbation
from harness.pipeline.attack_settings import settings_of
from harness.pipeline.attacks import load_attack
from harness.pipeline.checkpoints import valid_checkpoint
from harness.pipeline.context import Context
from harness.pipeline.experiment import locate_uap
from harness.pipeline.uap_files import uap_key, valid_uap
from harness.pipeline.uap_names import attack_of, control_names, targeted_names, white_box_names
from harness.pipeline.uaps import craft_tasks
from harness.presets import preset_named
from harness.records import UsageError, variant_named
from harness.workspace import UapName, Workspace


def context(root: Path, config: Config | None = None) -> Context:
    return Context(Workspace(root, config or preset_named("quickstart")), torch.device("cpu"))


def test_the_authors_attack_is_the_default_of_the_authors_protocol() -> None:
    assert preset_named("quickstart").attack == "momentum"
    assert preset_named("paper").attack == "sgd"
    assert config_from_dict({"protocol": "paper"}).attack == "sgd"
    assert config_from_dict({"protocol": "paper", "attack": "momentum"}).attack == "momentum"
    assert config_from_dict({"attack": "sgd"}).attack == "sgd"
    for bad in ({"craft": {"inner_batch": 0}}, {"craft": {"momentum": 1.0}}, {"attack": "sga"}):
        with pytest.raises(UsageError):
            config_from_dict(bad)


def test_a_name_without_an_attack_is_the_workspaces_own(tmp_path: Path) -> None:
    ours = context(tmp_path)
    assert attack_of(ours, UapName("full", 10.0)) == "momentum"
    assert attack_of(ours, UapName("full", 10.0, attack="sgd")) == "sgd"
    paths = [task.name for task in craft_tasks(ours, [UapName("full", 10.0, attack="sgd")])]
    assert paths == ["craft full_eps10_sgd"]
    old = context(tmp_path, replace(preset_named("quickstart"), attack="sgd"))
    plain, other = UapName("full", 10.0), UapName("full", 10.0, attack="sgd")
    assert plain.stem == "full_eps10"
    assert uap_key(old, plain) == uap_key(ours, other) != uap_key(ours, plain)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (UapName("full", 10.0, attack="momentum"), "workspace's attack: name it full_eps10"),
        (UapName("full", 10.0, attack="sga"), "unknown attack 'sga'; this version has momentum, s"),
    ],
)
def test_an_attack_that_cannot_be_named_is_refused(
    name: UapName, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        craft_tasks(context(tmp_path), [name])


def test_a_namesake_of_the_workspaces_own_is_told_apart(tmp_path: Path) -> None:
    ours = context(tmp_path)

    def made(attack: str, level: float, source: str = "full") -> Perturbation:
        delta = np.full((3, 32, 32), level / 255, dtype=np.float32)
        meta = {"attack": attack, "key": "k"}
        return Perturbation(delta, 10.0, source, None, "digits", "clean", 0, meta)

    own = {
        UapName("full", 10.0): made("momentum", 3.0),
        UapName("full", 10.0, attack="fourier"): made("fourier", 5.0),
    }
    ours.workspace.cache.mkdir(parents=True)
    for name, perturbation in own.items():
        save_perturbation(ours.workspace.uap(name), perturbation)
        copy = tmp_path / f"{name.stem}.pt"
        save_perturbation(copy, perturbation)
        assert load_attack(ours, copy).record.source == "full"
    for stranger, label in [
        (made("momentum", 7.0), "full (elsewhere)"),
        (made("fourier", 7.0), "full (elsewhere)"),
        (made("momentum", 7.0, "pp2"), "pp2"),  # the workspace has none of it
        (made("momentum", 7.0, "../" + "x" * 300), "../" + "x" * 300),
    ]:
        save_perturbation(tmp_path / "mine.pt", stranger)
        assert load_attack(ours, tmp_path / "mine.pt").record.source == label


def test_the_perturbations_of_a_source_are_one_pass(tmp_path: Path) -> None:
    ours = context(tmp_path)
    names = control_names(ours)
    for source in ("full", "q4"):
        names += white_box_names(ours, source) + targeted_names(ours, source)
    tasks = craft_tasks(ours, names)
    assert {task.name for task in tasks} == {f"craft {name.stem}" for name in names}
    assert all(task.beside == "accelerator" for task in tasks)
    for source in ("full", "q4"):
        first, *others = [task for task in tasks if task.name.startswith(f"craft {source}_")]
        assert first.after == (f"train {source}",)
        assert {task.after for task in others} == {(f"train {source}", first.name)}
        assert [task.work for task in others] == [0.0] * 15  # the first does it for all
        assert first.work > 0


def test_runs_with_batch_statistics_have_a_pass_of_their_own(tmp_path: Path) -> None:
    paper = context(tmp_path, replace(preset_named("quickstart"), protocol="paper", attack="sgd"))
    names = white_box_names(paper, "full") + targeted_names(paper, "full")
    leaders = [task.name for task in craft_tasks(paper, names) if len(task.after) == 1]
    assert leaders == ["craft full_eps2", "craft full_eps10_t0"]


def test_the_default_attack_spends_what_the_paper_would(tmp_path: Path) -> None:
    ours = context(tmp_path)
    settings = settings_of(ours, UapName("full", 10.0))
    assert settings.rule.selection == 64
    assert settings.rule.batch_size == ours.config.craft.inner_batch == 8
    theirs = settings_of(ours, UapName("full", 10.0, attack="sgd"))
    assert theirs.rule.batch_size == 64
    assert theirs.epochs == settings.epochs


def test_a_damaged_file_of_our_own_says_how_it_is_made_again(tmp_path: Path) -> None:
    """A checkpoint or UAP that was cut off: the way out is to delete it."""
    here = context(tmp_path)
    name = UapName("full", 10)
    for path in (here.workspace.checkpoint("full"), here.workspace.uap(name)):
        path.parent.mkdir(exist_ok=True)
        torch.save({"weights": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-40])
    for look in (
        lambda: valid_checkpoint(here, variant_named("full")),
        lambda: locate_uap(here, "cache/full_eps10.pt"),
    ):
        with pytest.raises(
            UsageError, match=r"cut off: delete it, and `harness \w+` makes it again"
        ):
            look()
    assert not valid_uap(here, name)  # minutes, not hours: made again without being asked

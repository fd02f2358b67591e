"""One perturbation for many models: whose turn it is, that none dominates, its names, restarts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import CPU, IMAGE_SHAPE, split, trained
from torch import Tensor, nn

from harness import unfinished
from harness.config import Config
from harness.config_file import config_from_dict
from harness.crafting import together
from harness.crafting.momentum import MomentumSettings
from harness.crafting.perturbation import chessboard, random_sign, to_levels
from harness.crafting.sgd import SgdSettings
from harness.crafting.together import Crafted, Job, Request, Rule, craft_together
from harness.data.dataset import Dataset
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.pipeline.attack_settings import settings_of
from harness.pipeline.context import Context
from harness.pipeline.experiment import all_uap_names, victim_uap_names
from harness.pipeline.uap_files import uap_key
from harness.pipeline.uaps import craft_tasks
from harness.presets import preset_named
from harness.records import CONTROLS, PAPER_ORDER, UsageError
from harness.sources import FLEET, is_source, leave_one_out, left_out, members, source_label
from harness.workspace import UapName, Workspace, parse_uap_name

MOMENTUM = MomentumSettings(
    epochs=2,
    batch_size=4,
    step=0.2,
    beta=8.0,
    momentum=0.8,
    shuffle=True,
    batch_statistics=False,
    selection=16,
)
SGD = SgdSettings(epochs=2, batch_size=12, step=0.2, beta=8.0, shuffle=True, batch_statistics=False)
JOBS = [Job(Request(10.0), 1), Job(Request(40.0, 2), 2, (0, 2)), Job(Request(10.0), 3, (1,))]


def craft(models: list[nn.Module], jobs: list[Job], rule: Rule, partial: Path) -> list[Crafted]:
    return craft_together(
        nn.ModuleList(models),
        split(40),
        jobs,
        rule,
        key="k",
        partial=partial,
        device=CPU,
        progress=lambda _n: None,
    )


@pytest.fixture(autouse=True)
def one_thread_and_nothing_saved(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", 1e9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def networks() -> list[nn.Module]:
    return [fold(trained()), integerise(trained(bits=4)), fold(trained(width=6, steps=9))]


# --- crafting ----------------------------------------------------------------------------------


def test_in_a_round_every_model_has_one_turn() -> None:
    jobs = [Job(Request(10.0), 0), Job(Request(10.0), 1, (0, 1, 3, 4)), Job(Request(10.0), 2, (2,))]
    orders, left_one_out = set(), []
    for this_round in range(20):
        of_job: list[list[int]] = [[], [], []]
        for t in range(5 * this_round, 5 * this_round + 5):
            turns = together._turns(jobs, 5, t)
            assert sorted(k for of in turns.values() for k in of) == [0, 1, 2]  # one model each
            for network, of in turns.items():
                for k in of:
                    of_job[k].append(network)
        assert sorted(of_job[0]) == [0, 1, 2, 3, 4]
        assert set(of_job[1]) <= {0, 1, 3, 4}
        left_one_out += of_job[1]
        assert of_job[2] == [2] * 5
        orders.add(tuple(of_job[0]))
    assert len(orders) > 10
    for first in range(0, 100, 4):  # rounds of four
        assert sorted(left_one_out[first : first + 4]) == [0, 1, 3, 4]


def test_what_it_is_does_not_depend_on_the_networks_beside_it(tmp_path: Path) -> None:
    """As when the fleet is there already and only a leave-one-out is missing."""
    models, job = networks(), Job(Request(10.0), 3, (0, 2))
    (among_all,) = craft(models, [job], MOMENTUM.rule, tmp_path / "p.pt")
    fewer = [models[0], models[2]]
    (alone,) = craft(fewer, [replace(job, members=(0, 1))], MOMENTUM.rule, tmp_path / "q.pt")
    assert np.array_equal(among_all.delta_255, alone.delta_255)


@pytest.mark.parametrize("rule", [SGD.rule, MOMENTUM.rule], ids=["sgd", "momentum"])
def test_each_is_what_it_would_be_alone(rule: Rule, tmp_path: Path) -> None:
    models = networks()
    for job, found in zip(JOBS, craft(models, JOBS, rule, tmp_path / "p.pt"), strict=True):
        (alone,) = craft(models, [job], rule, tmp_path / "p.pt")
        assert np.array_equal(found.delta_255, alone.delta_255)
        assert (found.chosen, found.start_scores) == (alone.chosen, alone.start_scores)


def test_of_one_member_it_is_that_models_own(tmp_path: Path) -> None:
    """Straight-through gradients of an integer network included."""
    models, job = networks(), Job(Request(10.0), 3, (1,))
    (of_many,) = craft(models, [job], MOMENTUM.rule, tmp_path / "p.pt")
    (own,) = craft([models[1]], [replace(job, members=())], MOMENTUM.rule, tmp_path / "p.pt")
    assert np.array_equal(of_many.delta_255, own.delta_255)
    assert of_many.loss == pytest.approx(own.loss)


class _Loud(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, pixels: Tensor) -> Tensor:
        return pixels.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient * 4096


class Loud(nn.Module):
    """The same function, with gradients 4096 times as large."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(_Loud.apply(pixels))
        return logits


def test_a_model_of_large_gradients_does_not_dominate(tmp_path: Path) -> None:
    first, _, third = networks()
    jobs = [Job(Request(10.0), 1)]
    (plain,) = craft([first, third], jobs, MOMENTUM.rule, tmp_path / "p.pt")
    (loud,) = craft([first, Loud(third)], jobs, MOMENTUM.rule, tmp_path / "p.pt")
    assert np.mean(plain.delta_255 == loud.delta_255) > 0.99


def test_it_breaks_models_that_one_models_own_does_not(tmp_path: Path) -> None:
    """The worst case over the fleet: above that of what was crafted on any one, and controls."""
    models, images, eps = networks(), split(200, seed=8), 40.0
    rule = replace(MOMENTUM.rule, epochs=8, selection=40)
    jobs = [Job(Request(eps), seed, of) for seed in range(4) for of in ((), (0,), (1,), (2,))]

    def worst(levels: np.ndarray) -> float:
        return min(
            float((predict(m, images.images, levels, device=CPU) != images.labels).mean())
            for m in models
        )

    found = craft(models, jobs, rule, tmp_path / "p.pt")
    rates = np.array([worst(to_levels(f.delta_255, eps=eps)) for f in found]).reshape(4, 4)
    fleet, *single = rates.mean(axis=0)
    controls = [random_sign(IMAGE_SHAPE, eps=eps, seed=0), chessboard(IMAGE_SHAPE, eps=eps)]
    assert fleet > max(single)
    assert fleet > max(worst(to_levels(control, eps=eps)) for control in controls) + 0.1


def test_the_chessboard_is_judged_on_all_members(tmp_path: Path) -> None:
    """A pattern that gradients do not show, on models that differ: chosen where it wins on all."""

    class Chess(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            board = torch.from_numpy(chessboard(IMAGE_SHAPE, eps=1.0))
            under = ((pixels - pixels.mean()) * board).mean(dim=(1, 2, 3)) > 5
            right = torch.zeros(len(pixels), 4).index_fill(1, torch.tensor([0]), 1.0)
            return torch.where(under[:, None], right.roll(1, 1), right) + 0 * pixels[:, :1, 0, 0]

    (crafted,) = craft(
        [Chess(), Chess()], [Job(Request(10.0, 1), 3)], MOMENTUM.rule, tmp_path / "p"
    )
    assert crafted.chosen == "chessboard"


# --- names and configuration -------------------------------------------------------------------


def test_names_of_ensembles() -> None:
    assert members(FLEET) == PAPER_ORDER
    assert members("full") == ("full",)
    assert members("random") == ()
    for variant in PAPER_ORDER:
        source = leave_one_out(variant)
        assert (left_out(source), left_out(variant)) == (variant, None)
        assert set(members(source)) == set(PAPER_ORDER) - {variant}
        name = UapName(source, 2.5, target=3, attack="sgd", seed=7)
        assert parse_uap_name(Path("cache") / f"{name.stem}.pt") == name
    assert source_label("fleet_without_sfp_mixup") == "fleet without SFP+M"
    assert all(is_source(s) for s in (*PAPER_ORDER, *CONTROLS, FLEET, leave_one_out("q4")))
    for bad in ("int8", "fleet_without_int8", "fleet_without_", "fleet_without_fleet", "navy"):
        assert not is_source(bad)
        with pytest.raises(UsageError):
            members(bad)


@cache
def _digits() -> Dataset:
    return Context(Workspace(Path(), preset_named("quickstart")), CPU).data


def context(root: Path, config: Config | None = None) -> Context:
    made = Context(Workspace(root, config or preset_named("quickstart")), CPU)
    vars(made)["data"] = _digits()  # loaded once for all
    return made


def craft_config(**values: Any) -> Config:
    return config_from_dict({"craft": values})


def test_the_fleet_is_one_pass_after_all_checkpoints(tmp_path: Path) -> None:
    ours = context(tmp_path)
    names = [UapName(FLEET, 10.0), *(UapName(leave_one_out(v), 10.0) for v in PAPER_ORDER)]
    first, *others = craft_tasks(ours, names)
    assert set(first.after) == {f"train {name}" for name in PAPER_ORDER}
    assert all(first.name in task.after and task.work == 0 for task in others)
    epochs = ours.config.craft.fleet_epochs
    assert settings_of(ours, names[0]).epochs == epochs > 0
    forwards = first.work / (11 * epochs * ours.config.craft.attack_images)
    assert 2.2 < forwards < 4.5  # a mean over members of different cost


def test_a_leave_one_out_does_not_depend_on_what_it_leaves_out(tmp_path: Path) -> None:
    ours = context(tmp_path)
    config = ours.config
    other = replace(config, train=replace(config.train, cutout_size=4))  # of sfp_cutout alone
    theirs = context(tmp_path, other)
    for source, same in ((FLEET, False), ("fleet_without_sfp_cutout", True),
                         ("fleet_without_full", False)):  # fmt: skip
        name = UapName(source, 10.0)
        assert (uap_key(ours, name) == uap_key(theirs, name)) == same


def test_what_an_experiment_attacks_each_victim_with(tmp_path: Path) -> None:
    ours = context(tmp_path, craft_config(transfer_eps=[4, 10], targets=[1], seeds=2))
    variants = list(PAPER_ORDER)
    names = {name.stem for name in victim_uap_names(ours, "q4", variants)}
    for seed in ("", "_s1"):
        for eps in (4, 10):
            assert {f"{s}_eps{eps}{seed}" for s in (*variants, FLEET, "fleet_without_q4")} <= names
        assert f"q4_eps10_t1{seed}" in names
        assert f"full_eps2{seed}" not in names
        assert f"fleet_without_full_eps10{seed}" not in names
    assert "random_eps10" in names
    assert "random_eps10_s1" not in names  # nobody crafts a control
    everything = [name.stem for name in all_uap_names(ours, variants)]
    assert len(everything) == len(set(everything)) == 12 + 2 * (10 * (6 + 1) + 2 * 11) + 10 * 6
    assert everything.index("full_eps10_s1") < everything.index("full_eps10")
    off = context(tmp_path, craft_config(fleet_epochs=0))
    assert not any(name.source.startswith(FLEET) for name in all_uap_names(off, variants))
    with pytest.raises(UsageError, match="fleet_epochs is 0"):
        craft_tasks(off, [UapName(FLEET, 10.0)])


@pytest.mark.parametrize(
    ("value", "budgets", "reference"),
    [
        (10, (10.0,), 10.0),
        (4.5, (4.5,), 4.5),
        ([10, 4], (4.0, 10.0), 10.0),
        ([12, 4], (4.0, 12.0), 12.0),
        ("all", (2.0, 4.0, 6.0, 8.0, 10.0, 12.0), 10.0),
    ],
)
def test_budgets_of_the_transfer_matrix(
    value: object, budgets: tuple[float, ...], reference: float
) -> None:
    craft_settings = craft_config(transfer_eps=value).craft
    assert craft_settings.transfer_budgets == budgets
    assert craft_settings.reference_eps == reference


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"craft": {"transfer_eps": []}}, "craft.transfer_eps = [], but it must be at least one"),
        ({"craft": {"transfer_eps": [4, 0.5]}}, "craft.transfer_eps[1] = 0.5"),
        ({"craft": {"transfer_eps": [4, 4]}}, "craft.transfer_eps = [4.0, 4.0]"),
        ({"craft": {"transfer_eps": "some"}}, "craft.transfer_eps = 'some'"),
        ({"craft": {"eps": [], "transfer_eps": "all"}}, "craft.transfer_eps = 'all'"),
        ({"craft": {"restarts": 0}}, "craft.restarts = 0"),
        ({"craft": {"restarts": 2}, "protocol": "paper"}, "must be 1 under protocol paper"),
        ({"craft": {"seeds": 0}}, "craft.seeds = 0"),
        ({"craft": {"seeds": 3}, "seed": 2**31 - 2}, "craft.seeds = 3"),
        ({"craft": {"fleet_epochs": -1}}, "craft.fleet_epochs = -1"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        config_from_dict(values)
    assert said in str(refused.value)


# --- restarts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [MOMENTUM.rule, replace(SGD.rule, selection=16)],
    ids=["momentum", "sgd"],
)
def test_the_best_of_three_starts_is_one_of_them(rule: Rule, tmp_path: Path) -> None:
    models, job = [fold(trained())], Job(Request(10.0), 1)
    three = replace(rule, restarts=3)
    (crafted,) = craft(models, [job], three, tmp_path / "p.pt")
    starts = together._starts([job], three)
    assert starts[0] == job
    assert len({start.seed for start in starts}) == 3
    # As many steps each as the three together take.
    steps = together.planned_steps(three, 40)
    alone = []
    for start in starts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(together, "planned_steps", lambda _rule, _n: steps)
            alone += craft(models, [start], rule, tmp_path / "p.pt")
    scores = tuple(found.start_scores[0] for found in alone if found.start_scores)
    if scores:
        assert crafted.start_scores == scores
    assert len(crafted.start_scores) == 3
    best = alone[crafted.start_scores.index(max(crafted.start_scores))]
    assert crafted.chosen == "last iterate"
    assert np.array_equal(crafted.delta_255, best.delta_255)
    assert crafted.loss == pytest.approx(best.loss)


def test_a_restart_costs_its_share_of_the_selection() -> None:
    one, four = MOMENTUM.rule, replace(MOMENTUM.rule, restarts=4)
    assert together.planned_steps(one, 40) == 20 - 6  # 3 candidates x 16 forwards / 2 / batch of 4
    assert together.planned_steps(four, 40) == 20 - 3  # 6 of them, shared by four


def test_one_start_has_the_key_it_had_before_there_were_restarts(tmp_path: Path) -> None:
    """So that what lies in a cache stays valid."""
    plain = context(tmp_path, craft_config())
    again = context(tmp_path, craft_config(restarts=2))
    for attack in ("", "sgd"):
        name = UapName("full", 10.0, attack=attack)
        assert uap_key(plain, name) != uap_key(again, name)
    with pytest.MonkeyPatch.context() as patch:
        keyed: list[dict[str, Any]] = []
        patch.setattr(
            "harness.pipeline.uap_files.cache_key", lambda *_a, **k: keyed.append(k) or "k"
        )
        uap_key(plain, UapName("full", 10.0))
        uap_key(plain, UapName("full", 10.0, attack="sgd"))
    fields = {"epochs", "batch_size", "step", "beta", "shuffle", "batch_statistics"}
    assert keyed[0]["settings"].keys() == fields | {"momentum", "selection"}
    assert keyed[1]["settings"].keys() == fields

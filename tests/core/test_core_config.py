"""`harness.toml`: read back unchanged, and refused in one line that names the key."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import Config
from harness.config_file import config_from_dict, load_config, to_toml
from harness.presets import PRESETS, preset_named
from harness.records import UsageError


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        config_from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("harness.toml: ")
    return message


def refused_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dataset", [None, "svhn", 'odd "name" \\ ünï.npz'])
def test_a_preset_is_read_back_unchanged(tmp_path: Path, preset: str, dataset: str | None) -> None:
    config = preset_named(preset, dataset=dataset)
    path = tmp_path / "harness.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_keys_are_written_with_what_they_mean() -> None:
    lines = to_toml(preset_named("quickstart")).splitlines()
    assert max(map(len, lines)) <= 100
    for above, line in itertools.pairwise(lines):
        assert above.startswith("# ") or not re.match(r"\w+ = ", line), line
    beta = lines.index("beta = 8.0")
    assert lines[beta - 1] == (
        "# Each sample's loss is clamped here, so that no single image dominates."
    )
    assert lines[lines.index('protocol = "clean"') - 1].startswith("# ")


positive = st.floats(1e-6, 1e6)
numbers = st.lists(st.floats(1, 255), unique=True, max_size=4).map(tuple)
targets = st.one_of(st.just("all"), st.lists(st.integers(0, 99), unique=True).map(tuple))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31 - 1),
    dataset=st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), min_size=1),
    lr=positive,
    decay_epochs=st.lists(st.integers(0, 200)).map(tuple),
    eps=numbers,
    targets=targets,
    beta=positive,
)
def test_any_valid_configuration_is_read_back_unchanged(
    seed: int, dataset: str, lr: float, decay_epochs: Any, eps: Any, targets: Any, beta: float
) -> None:
    base = preset_named("quickstart")
    config = dataclasses.replace(
        base,
        seed=seed,
        dataset=dataset,
        train=dataclasses.replace(base.train, lr=lr, decay_epochs=decay_epochs),
        craft=dataclasses.replace(base.craft, eps=eps, targets=targets, beta=beta),
    )
    assert config_from_dict(tomllib.loads(to_toml(config))) == config


def test_what_a_file_leaves_out_comes_from_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "harness.toml"
    path.write_text('preset = "paper"\ndataset = "svhn"\n[train]\nlr = 0.5\n')
    config = load_config(path)
    expected = preset_named("paper", dataset="svhn")
    assert config == dataclasses.replace(
        expected, train=dataclasses.replace(expected.train, lr=0.5)
    )
    assert config.train.epochs == 20  # svhn trains for 20 epochs, not 160


def tables() -> dict[str, Any]:
    return {
        field.name: getattr(Config(), field.name)
        for field in dataclasses.fields(Config)
        if dataclasses.is_dataclass(getattr(Config(), field.name))
    }


@pytest.mark.parametrize("table", tables())
def test_an_unknown_key_is_named_with_those_there_are(table: str) -> None:
    message = refused({table: {"epochz": 1}})
    assert f"unknown key '{table}.epochz'" in message
    assert all(field.name in message for field in dataclasses.fields(tables()[table]))
    assert "unknown key 'epochz'" in refused({"epochz": 1})


def plain_fields() -> list[tuple[str, str, Any]]:
    top = [("", f.name, getattr(Config(), f.name)) for f in dataclasses.fields(Config)]
    return [item for item in top if not dataclasses.is_dataclass(item[2])] + [
        (name, field.name, getattr(table, field.name))
        for name, table in tables().items()
        for field in dataclasses.fields(table)
    ]


@pytest.mark.parametrize(("table", "key", "default"), plain_fields())
def test_every_key_refuses_a_boolean_a_table_and_a_date(table: str, key: str, default: Any) -> None:
    for wrong in (
        3 if isinstance(default, bool) else True,
        {"a": 1},
        tomllib.loads("d = 2020-01-01")["d"],
    ):
        name = f"{table}.{key}" if table else key
        assert f"{name} must be" in refused({table: {key: wrong}} if table else {key: wrong})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"width": 8.0}, "width must be a whole number, got 8.0"),
        ({"width": "8"}, "width must be a whole number, got '8'"),
        ({"dataset": 3}, "dataset must be text, got 3"),
        ({"preset": 3}, "preset must be text, got 3"),
        ({"train": {"lr": "fast"}}, "train.lr must be a number, got 'fast'"),
        ({"train": {"lr": float("nan")}}, "train.lr must be a number, got nan"),
        ({"train": {"lr": float("inf")}}, "train.lr must be a number, got inf"),
        ({"train": {"lr": 10**400}}, "train.lr must be a number"),
        ({"train": {"decay_epochs": 3}}, "train.decay_epochs must be a list of whole numbers"),
        ({"train": {"decay_epochs": [3, 4.5]}}, "train.decay_epochs[1] must be a whole number"),
        ({"craft": {"eps": 10}}, "craft.eps must be a list of numbers, got 10"),
        ({"craft": {"eps": [1, True]}}, "craft.eps[1] must be a number, got True"),
        ({"craft": {"targets": 4}}, "craft.targets must be text or a list of whole numbers"),
        ({"craft": {"targets": ["4"]}}, "craft.targets[0] must be a whole number, got '4'"),
        ({"train": 5}, "'train' must be a table, [train]"),
        ({"craft": [{"epochs": 1}]}, "'craft' must be a table, [craft]"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(values: dict[str, Any], named: str) -> None:
    assert named in refused(values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"arch": "vgg"}, "arch = 'vgg', but it must be one of ['resnet18', 'resnet20']"),
        ({"protocol": "dirty"}, "protocol = 'dirty'"),
        ({"attack": "deepfool"}, "attack = 'deepfool'"),
        ({"width": 0}, "width = 0"),
        ({"width": 1025}, "width = 1025"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**31}, "seed = 2147483648"),
        ({"train": {"epochs": 0}}, "train.epochs = 0"),
        ({"train": {"batch_size": 0}}, "train.batch_size = 0"),
        ({"train": {"lr": 0}}, "train.lr = 0.0"),
        ({"train": {"momentum": 1}}, "train.momentum = 1.0"),
        ({"train": {"momentum": -0.1}}, "train.momentum = -0.1"),
        ({"train": {"weight_decay": -1}}, "train.weight_decay = -1.0"),
        ({"train": {"schedule": "cosine"}}, "train.schedule = 'cosine'"),
        ({"train": {"crop_padding": -1}}, "train.crop_padding = -1"),
        ({"train": {"sfp_keep": 0}}, "train.sfp_keep = 0.0"),
        ({"train": {"sfp_keep": 1.01}}, "train.sfp_keep = 1.01"),
        ({"train": {"mixup_alpha": 0}}, "train.mixup_alpha = 0.0"),
        ({"train": {"sfp_coupling": "block"}}, "train.sfp_coupling = 'block'"),
        ({"train": {"pp_granularity": "layer"}}, "train.pp_granularity = 'layer'"),
        ({"train": {"pp_epochs": -1}}, "train.pp_epochs = -1"),
        ({"train": {"apot_alpha_lr_weight": -0.1}}, "train.apot_alpha_lr_weight = -0.1"),
        ({"craft": {"eps": [4, 0]}}, "craft.eps[1] = 0.0"),
        ({"craft": {"eps": [255.5]}}, "craft.eps[0] = 255.5"),
        ({"craft": {"eps": [4, 6, 4.0]}}, "craft.eps = [4.0, 6.0, 4.0], but it must be without"),
        ({"craft": {"transfer_eps": 0}}, "craft.transfer_eps = 0.0"),
        ({"craft": {"targets": "some"}}, "craft.targets = 'some'"),
        ({"craft": {"targets": [0, -1]}}, "craft.targets = [0, -1]"),
        ({"craft": {"attack_images": 0}}, "craft.attack_images = 0"),
        ({"craft": {"step": 0}}, "craft.step = 0.0"),
        ({"craft": {"beta": -8}}, "craft.beta = -8.0"),
        ({"export": {"align": 0}}, "export.align = 0"),
        ({"export": {"align": 1025}}, "export.align = 1025"),
        ({"eval": {"images": -1}}, "eval.images = -1"),
        ({"eval": {"device_images": -1}}, "eval.device_images = -1"),
        ({"eval": {"threads": 0}}, "eval.threads = 0"),
        ({"eval": {"batch_size": 0}}, "eval.batch_size = 0"),
        ({"latency": {"threads": 257}}, "latency.threads = 257"),
        ({"latency": {"mode": "slow"}}, "latency.mode = 'slow'"),
    ],
)
def test_an_impossible_value_is_named_with_its_rule(values: dict[str, Any], named: str) -> None:
    message = refused(values)
    assert named in message
    assert "but it must be" in message


def test_a_whole_number_will_do_for_a_fraction() -> None:
    config = config_from_dict({"train": {"lr": 1}, "craft": {"eps": [1, 2]}})
    assert (config.train.lr, config.craft.eps) == (1.0, (1.0, 2.0))
    assert all(type(v) is float for v in (config.train.lr, *config.craft.eps))


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'fast': choose from .*quickstart"):
        config_from_dict({"preset": "fast"})


def test_lists_may_be_empty() -> None:
    config = config_from_dict({"craft": {"eps": [], "targets": []}})
    assert (config.craft.eps, config.craft.targets) == ((), ())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"dataset = '\xff\xfe'", "not UTF-8"),
        (b"dataset = ", "not valid TOML"),
        (b"seed = 1\nseed = 2", "not valid TOML"),
        (b"seed = 1" + b"0" * 5000, "not valid TOML"),
        (b"x = " + b"[" * 20_000, "not valid TOML"),
        (b"[train]\n[train]", "not valid TOML"),
    ],
    ids=["encoding", "syntax", "twice", "too long a number", "too deep", "table twice"],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, named: str) -> None:
    message = refused_file(tmp_path / "harness.toml", content)
    assert named in message
    assert str(tmp_path) in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        load_config(tmp_path / "harness.toml")

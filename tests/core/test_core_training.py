"""The training loop: schedules by hand, and a killed run that ends where it would have."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from core_cases import CPU, spec, split, state_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import unfinished
from harness.compression.sfp import zero_weakest_filters
from harness.models.resnet import ResNet, build_model
from harness.training import loop
from harness.training.loop import Recipe, schedule_factor, train

RECIPE = Recipe(
    epochs=4,
    batch_size=16,
    schedule="one_cycle",
    decay_epochs=(),
    momentum=0.9,
    weight_decay=1e-3,
    learning_rates={"": 0.05},
    crop_padding=1,
    flip=True,
)


class Killed(Exception):
    pass


def kill_in(epoch: int) -> Callable[[int, int, str], None]:
    """A progress function that dies on the first batch of an epoch (1-based)."""

    def progress(done: int, total: int, note: str) -> None:
        if note.startswith(f"epoch {epoch}/"):
            raise Killed

    return progress


def silent(done: int, total: int, note: str) -> None:
    pass


def run(
    model: ResNet, recipe: Recipe, partial: Path, *, key: str = "mine", seed: int = 3, **more: Any
) -> dict[str, bytes]:
    progress = more.get("progress", silent)
    train(
        model,
        split(40),
        recipe,
        seed=seed,
        key=key,
        partial=partial,
        device=CPU,
        progress=progress,
    )
    return state_bytes(model)


@pytest.mark.parametrize(
    ("bits", "changes"),
    [
        (None, {}),
        (None, {"cutout_size": 4, "mixup_alpha": 1.0, "schedule": "step", "decay_epochs": (2,)}),
        (None, {"after_epoch": lambda model: zero_weakest_filters(model, keep=0.5)}),
        (3, {"learning_rates": {"": 0.01, "weight_alpha": 0.02, "activation_alpha": 0.1}}),
    ],
    ids=["plain", "augmented", "pruned", "apot"],
)
def test_a_killed_run_continues_to_the_very_same_weights(
    bits: int | None, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", -1.0)  # save after every epoch
    recipe = replace(RECIPE, **changes)
    expected = run(build_model(spec(bits=bits), seed=1), recipe, tmp_path / "whole.pt")
    partial = tmp_path / "partial.pt"
    for epoch in (2, 4):  # killed twice
        with pytest.raises(Killed):
            run(build_model(spec(bits=bits), seed=1), recipe, partial, progress=kill_in(epoch))
        assert partial.exists()
    epochs: set[str] = set()
    final = run(
        build_model(spec(bits=bits), seed=99),  # its weights are replaced by the saved ones
        recipe,
        partial,
        progress=lambda _done, _total, note: epochs.add(note),
    )
    assert epochs == {"epoch 4/4"}
    assert final == expected


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 11), min_size=1, max_size=3))
def test_killed_within_an_epoch_it_continues_there(kills: list[int]) -> None:
    """However long an epoch is, work in it is not lost: three steps each, mixup and cutout."""
    recipe = replace(RECIPE, cutout_size=4, mixup_alpha=1.0, nesterov=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(unfinished, "SAVE_INTERVAL_SECONDS", -1.0),
    ):
        expected = run(build_model(spec(), seed=1), recipe, Path(folder) / "whole.pt")
        partial, steps = Path(folder) / "partial.pt", 0

        def after(count: int) -> Callable[[int, int, str], None]:
            def progress(_done: int, _total: int, _note: str) -> None:
                nonlocal steps, count
                steps, count = steps + 1, count - 1
                if count == 0:
                    raise Killed

            return progress

        for count in kills:
            try:
                final = run(build_model(spec(), seed=1), recipe, partial, progress=after(count))
            except Killed:
                continue
            break
        else:
            final = run(build_model(spec(), seed=1), recipe, partial, progress=after(-1))
    assert final == expected
    # A step that was saved is not taken again; the last of an epoch is saved after its pruning.
    assert steps <= 12 + len(kills)


def test_stopped_at_every_step_it_gets_done(tmp_path: Path) -> None:
    """However short a slice is: what is told of is saved before the work ends."""
    recipe = replace(RECIPE, cutout_size=4, mixup_alpha=1.0)
    expected = run(build_model(spec(), seed=1), recipe, tmp_path / "whole.pt")
    slices = 0

    def stop(_done: int, _total: int, _note: str) -> None:
        raise Killed

    while slices < 12:
        with pytest.raises(Killed):
            run(build_model(spec(), seed=1), recipe, tmp_path / "p.pt", progress=stop)
        slices += 1
    final = run(build_model(spec(), seed=1), recipe, tmp_path / "p.pt", progress=stop)
    assert final == expected


def test_a_large_model_is_saved_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", 1e-6)
    saves: list[Path] = []

    def slow(path: Path, **_more: object) -> None:
        saves.append(path)
        time.sleep(0.05)

    monkeypatch.setattr(unfinished, "write_partial", slow)
    run(build_model(spec(), seed=1), RECIPE, tmp_path / "p.pt")
    assert len(saves) == 4 * 3 - 1  # after every step but the last
    saves.clear()
    monkeypatch.setattr(unfinished, "CHEAP_SAVE_SECONDS", 1e-12)  # the next is due in half a day
    run(build_model(spec(), seed=1), RECIPE, tmp_path / "p.pt")
    assert len(saves) == 1


def test_mixed_precision_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    plain = run(build_model(spec(), seed=1), RECIPE, tmp_path / "p.pt")
    mixed = replace(RECIPE, precision="bf16")
    assert run(build_model(spec(), seed=1), mixed, tmp_path / "p.pt") == plain


def test_unfinished_work_of_another_key_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", -1.0)
    expected = run(build_model(spec(), seed=1), RECIPE, tmp_path / "whole.pt", key="theirs")
    partial = tmp_path / "partial.pt"
    with pytest.raises(Killed):
        run(build_model(spec(), seed=1), RECIPE, partial, progress=kill_in(3))
    assert run(build_model(spec(), seed=1), RECIPE, partial, key="theirs") == expected


def test_nothing_is_saved_within_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", 1e9)
    run(build_model(spec(), seed=1), RECIPE, tmp_path / "partial.pt")
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_and_the_global_generator_does_not(tmp_path: Path) -> None:
    results = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        results.append(run(build_model(spec(), seed=1), RECIPE, tmp_path / "p.pt", seed=seed))
    assert results[0] == results[1] != results[2]


def test_one_epoch_is_stochastic_gradient_descent(tmp_path: Path) -> None:
    """Without augmentation and in one batch: w <- w - lr (g + decay w), as momentum starts at 0."""
    recipe = replace(RECIPE, epochs=1, batch_size=40, crop_padding=0, schedule="step")
    model, reference = build_model(spec(), seed=1), build_model(spec(), seed=1)
    run(model, recipe, tmp_path / "p.pt")
    images = split(40)
    reference.train()
    F.cross_entropy(
        reference(torch.from_numpy(images.images).float()), torch.from_numpy(images.labels)
    ).backward()
    for (name, trained), before in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert before.grad is not None
        expected = before - 0.05 * (before.grad + 1e-3 * before)
        assert torch.allclose(trained, expected, atol=1e-5), name


def test_training_learns_what_can_be_learnt(tmp_path: Path) -> None:
    model = build_model(spec(), seed=1)
    run(model, replace(RECIPE, epochs=20, batch_size=8), tmp_path / "p.pt")
    images = split(80, seed=9)
    with torch.no_grad():
        predicted = model(torch.from_numpy(images.images).float()).argmax(dim=1)
    assert float((predicted.numpy() == images.labels).mean()) > 0.9


def test_progress_counts_every_image_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    recipe = replace(RECIPE, epochs=2)
    run(build_model(spec(), seed=1), recipe, tmp_path / "p.pt", progress=lambda *a: seen.append(a))
    assert seen == [
        (done + base, 80, f"epoch {epoch}/2")
        for epoch, base in ((1, 0), (2, 40))
        for done in (16, 32, 40)
    ]


def test_a_last_batch_of_one_image_is_left_out(tmp_path: Path) -> None:
    seen: list[int] = []
    recipe = replace(RECIPE, epochs=1, batch_size=13)  # 13, 13, 13, 1
    run(
        build_model(spec(), seed=1),
        recipe,
        tmp_path / "p.pt",
        progress=lambda d, *_: seen.append(d),
    )
    assert seen == [13, 26, 39, 40]  # batch norm has no variance over one; the epoch ends


# --- learning rates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1), (79.99, 1), (80, 0.1), (119.5, 0.1), (120, 0.01), (159, 0.01)],
)
def test_the_step_schedule(epoch: float, factor: float) -> None:
    recipe = replace(RECIPE, schedule="step", epochs=160, decay_epochs=(80, 120))
    assert schedule_factor(recipe, epoch) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 0), (1, 0.5), (2, 1), (4, 0.75), (6, 0.5), (9.5, 0.0625), (10, 0)]
)
def test_the_one_cycle_schedule(epoch: float, factor: float) -> None:
    recipe = replace(RECIPE, schedule="one_cycle", epochs=10)
    assert schedule_factor(recipe, epoch) == pytest.approx(factor)


def test_every_parameter_has_the_learning_rate_of_its_longest_suffix() -> None:
    model = build_model(spec(bits=3), seed=0)
    rates = {"": 0.04, "activation_alpha": 0.1, "weight_alpha": 0.02}
    groups = loop._parameter_groups(model, replace(RECIPE, learning_rates=rates))
    names = {id(p): name for name, p in model.named_parameters()}
    assert [(g["base_lr"], g["weight_decay"]) for g in groups] == [
        (0.04, 1e-3),
        (0.1, 1e-3),
        (0.02, 1e-3),
    ]
    assigned = [sorted(names[id(p)] for p in group["params"]) for group in groups]  # type: ignore[attr-defined]
    assert assigned[1] == sorted(n for n in names.values() if n.endswith("activation_alpha"))
    assert assigned[2] == sorted(n for n in names.values() if n.endswith("weight_alpha"))
    assert sorted(itertools.chain(*assigned)) == sorted(names.values())
    optimiser = torch.optim.SGD(groups)
    loop._set_learning_rate(optimiser, replace(RECIPE, epochs=10), 1.0)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.02, 0.05, 0.01])

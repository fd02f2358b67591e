"""Crafting against a plain transcription of the paper's loop, and perturbation files."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_cases import CLASSES, CPU, IMAGE_SHAPE, split, state_bytes, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness import unfinished
from harness.artefacts import read_partial, sha256_file
from harness.crafting import together
from harness.crafting.perturbation import (
    Perturbation,
    check_fits,
    chessboard,
    from_levels,
    load_perturbation,
    random_sign,
    save_perturbation,
    to_levels,
    uap_record,
)
from harness.crafting.sgd import SgdSettings, craft_sgd
from harness.crafting.together import Crafted, Request, Rule
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.records import UsageError

SETTINGS = SgdSettings(
    epochs=3, batch_size=12, step=0.2, beta=8.0, shuffle=False, batch_statistics=False
)


@pytest.fixture(autouse=True)
def nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a run would continue the one before it, which has the same key."""
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", 1e9)


class Linear(nn.Module):
    """logits = W x / 255 + b: small enough that its gradient can be written down."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        features = int(np.prod(IMAGE_SHAPE))
        self.weight = torch.from_numpy(rng.normal(0, 1, (CLASSES, features)).astype(np.float32))
        self.bias = torch.from_numpy(rng.normal(0, 1, CLASSES).astype(np.float32))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weight.T / 255 + self.bias


class Recorder(nn.Module):
    """Passes pixels on and keeps them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.detach().clone())
        logits: Tensor = self.model(pixels)
        return logits


def craft(
    model: nn.Module,
    partial: Path,
    request: Request = Request(10.0),  # noqa: B008 - frozen
    settings: SgdSettings = SETTINGS,
    *,
    n: int = 40,
    seed: int = 5,
    key: str = "mine",
    progress: Callable[[int], None] = lambda _n: None,
) -> Crafted:
    return craft_sgd(
        model,
        split(n),
        request,
        settings,
        seed=seed,
        key=key,
        partial=partial,
        device=CPU,
        progress=progress,
    )


def transcription(
    model: Linear, start: np.ndarray, request: Request, settings: SgdSettings, *, n: int
) -> tuple[np.ndarray, list[float], int]:
    """The paper's loop in numpy float64: (delta, mean clamped loss an epoch, saturated samples)."""
    weight, bias = model.weight.double().numpy(), model.bias.double().numpy()
    images, labels = split(n).images.reshape(n, -1).astype(np.float64), split(n).labels
    targeted = request.target is not None
    delta, losses, saturated = start.astype(np.float64).flatten(), [], 0
    for _ in range(settings.epochs):
        total, saturated = 0.0, 0
        for first in range(0, n, settings.batch_size):
            x = images[first : first + settings.batch_size]
            y = labels[first : first + settings.batch_size]
            y = np.full_like(y, request.target) if targeted else y
            shifted = x + delta
            logits = np.clip(shifted, 0, 255) @ weight.T / 255 + bias
            exp = np.exp(logits - logits.max(axis=1, keepdims=True))
            probability = exp / exp.sum(axis=1, keepdims=True)
            loss = -np.log(probability[np.arange(len(y)), y])
            one_hot = np.eye(CLASSES)[y]
            free = (loss <= settings.beta)[:, None]
            inside = (shifted >= 0) & (shifted <= 255)
            gradient = ((probability - one_hot) * free @ weight / 255 * inside).mean(axis=0)
            direction = -1 if targeted else 1
            delta = delta + direction * settings.step * request.eps * np.sign(gradient)
            delta = np.clip(delta, -request.eps, request.eps)
            total += np.minimum(loss, settings.beta).sum()
            saturated += int((loss > settings.beta).sum())
        losses.append(total / n)
    return delta.reshape(IMAGE_SHAPE), losses, saturated


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("beta", [1000.0, 1.0], ids=["loose", "saturating"])
@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_crafting_is_the_papers_loop(
    target: int | None, beta: float, epochs: int, tmp_path: Path
) -> None:
    request = Request(9.0, target)
    settings = replace(SETTINGS, epochs=epochs, beta=beta)
    crafted = craft(Linear(), tmp_path / "p.pt", request, settings)
    start = np.random.default_rng(5).choice([-1.0, 1.0], size=IMAGE_SHAPE) * 4.5
    delta, losses, saturated = transcription(Linear(), start, request, settings, n=40)
    assert np.mean(np.abs(crafted.delta_255 - delta) < 1e-4) > 0.99  # but for sign(almost 0)
    assert crafted.loss == pytest.approx(losses, rel=1e-3)
    assert crafted.saturated_fraction == pytest.approx(saturated / 40, abs=1 / 40)
    assert (crafted.saturated_fraction > 0) == (beta == 1.0)
    assert crafted.delta_255.dtype == np.float32
    rising = np.diff(crafted.loss) * (1 if target is None else -1)
    assert beta == 1.0 or (rising > 0).all()  # untargeted climbs, targeted descends


@pytest.mark.parametrize("eps", [10.0, 2.4, 0.3])
@pytest.mark.parametrize("step", [0.2, 1.7])
def test_every_iterate_stays_within_the_budget(eps: float, step: float, tmp_path: Path) -> None:
    deltas: list[Tensor] = []
    original = together._gradients

    def recording(
        model: nn.Module, images: Tensor, batch: Tensor, y: Tensor, delta: Tensor, rule: Rule
    ) -> Any:
        deltas.append(delta.detach()[0].clone())
        return original(model, images, batch, y, delta, rule)

    settings = replace(SETTINGS, step=step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_gradients", recording)
        crafted = craft(Linear(), tmp_path / "p.pt", Request(eps), settings)
    iterates = [*deltas, torch.from_numpy(crafted.delta_255)]
    assert len(iterates) == 3 * 4 + 1
    budget = float(np.float32(eps))  # what float32 has for eps; exactly eps where eps is whole
    assert max(float(delta.abs().max()) for delta in iterates) <= budget
    assert iterates[0].abs().unique().tolist() == [np.float32(eps / 2)]
    assert {float(delta.abs().max()) for delta in iterates[-3:]} == {budget}


def test_the_model_sees_images_clipped_to_pixel_values(tmp_path: Path) -> None:
    recorder = Recorder(Linear())
    craft(recorder, tmp_path / "p.pt", Request(200.0))
    lowest = min(float(pixels.min()) for pixels in recorder.seen)
    highest = max(float(pixels.max()) for pixels in recorder.seen)
    assert (lowest, highest) == (0.0, 255.0)


def test_images_come_in_their_order_unless_shuffled(tmp_path: Path) -> None:
    orders = {}
    for shuffle in (False, True):
        recorder, seen = Recorder(Linear()), []
        settings = replace(SETTINGS, shuffle=shuffle, step=1e-9)
        craft(recorder, tmp_path / "p.pt", Request(1e-3), settings)
        images = torch.from_numpy(split(40).images).float()
        for pixels in recorder.seen:
            distances = torch.cdist(pixels.flatten(1), images.flatten(1))
            seen += distances.argmin(dim=1).tolist()
        orders[shuffle] = [seen[i : i + 40] for i in (0, 40, 80)]
    assert orders[False] == [list(range(40))] * 3
    assert all(sorted(epoch) == list(range(40)) for epoch in orders[True])
    assert orders[True][0] != orders[True][1] != list(range(40))  # anew every epoch


def test_progress_counts_every_image_of_every_epoch(tmp_path: Path) -> None:
    counts: list[int] = []
    craft(Linear(), tmp_path / "p.pt", progress=counts.append)
    assert counts == [12, 12, 12, 4] * 3


def test_a_model_without_gradient_is_reported(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.eye(CLASSES)[0].expand(len(pixels), -1) + 0 * pixels.flatten(1)[:, :1]

    crafted = craft(Constant(), tmp_path / "p.pt")
    assert crafted.zero_gradient_fraction == 1.0
    start = np.random.default_rng(5).choice([-1.0, 1.0], size=IMAGE_SHAPE) * 5
    assert np.array_equal(crafted.delta_255, start)


# --- on a trained model -------------------------------------------------------------------------


@pytest.mark.parametrize("deploy", [fold, integerise], ids=["float", "integer"])
def test_a_crafted_perturbation_beats_random_signs(
    deploy: Callable[[Any], nn.Module], tmp_path: Path
) -> None:
    model = deploy(trained(bits=4 if deploy is integerise else None, steps=40))
    images = split(120, seed=8)
    eps, settings = 40.0, replace(SETTINGS, epochs=10, batch_size=16, step=0.1)

    def uer(delta: np.ndarray | None) -> float:
        levels = None if delta is None else to_levels(delta, eps=eps)
        return float((predict(model, images.images, levels, device=CPU) != images.labels).mean())

    crafted = craft(model, tmp_path / "p.pt", Request(eps), settings, n=64)
    controls = [uer(random_sign(IMAGE_SHAPE, eps=eps, seed=s)) for s in range(10)]
    assert uer(crafted.delta_255) > max(controls) + 0.3
    targeted = craft(model, tmp_path / "p.pt", Request(eps, 1), settings, n=64)
    predicted = predict(model, images.images, to_levels(targeted.delta_255, eps=eps), device=CPU)
    clean = predict(model, images.images, None, device=CPU)
    assert np.mean(predicted == 1) > np.mean(clean == 1) + 0.2
    assert targeted.loss[-1] < targeted.loss[0]


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_the_model_is_left_as_it_was(batch_statistics: bool, tmp_path: Path) -> None:
    model = trained()
    before, modes = state_bytes(model), [m.training for m in model.modules()]
    options = copy.deepcopy([vars(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    settings = replace(SETTINGS, batch_statistics=batch_statistics)
    crafted = craft(model, tmp_path / "p.pt", settings=settings)
    assert state_bytes(model) == before
    assert [m.training for m in model.modules()] == modes
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, option in zip(norms, options, strict=True):
        kept = ("momentum", "track_running_stats", "eps", "training")
        assert [getattr(norm, k) for k in kept] == [option[k] for k in kept]
    assert all(p.grad is None for p in model.parameters())
    again = craft(model, tmp_path / "p.pt", settings=settings)
    assert np.array_equal(again.delta_255, crafted.delta_255)


def test_batch_statistics_are_those_of_the_attacked_batch(tmp_path: Path) -> None:
    model, settings = trained(), replace(SETTINGS, batch_statistics=True, epochs=1, batch_size=40)
    crafted = craft(model, tmp_path / "p.pt", settings=settings)
    reference = trained().train()
    start = np.random.default_rng(5).choice([-1.0, 1.0], size=IMAGE_SHAPE).astype(np.float32) * 5
    attacked = torch.from_numpy(split(40).images).float() + torch.from_numpy(start)
    with torch.no_grad():
        logits = reference(attacked.clamp(0, 255))
    loss = F.cross_entropy(logits, torch.from_numpy(split(40).labels), reduction="none")
    assert crafted.loss[0] == pytest.approx(float(loss.clamp(max=8).mean()), rel=1e-4)
    in_eval_mode = craft(
        model, tmp_path / "p.pt", settings=replace(settings, batch_statistics=False)
    )
    assert abs(in_eval_mode.loss[0] - crafted.loss[0]) > 1e-3


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    settings = replace(SETTINGS, shuffle=True)
    files = []
    for i, (global_seed, seed) in enumerate(((0, 5), (1, 5), (0, 6))):
        torch.manual_seed(global_seed)
        crafted = craft(trained(), tmp_path / "p.pt", settings=settings, seed=seed)
        path = tmp_path / f"{i}.pt"
        save_perturbation(path, perturbation(delta=from_levels(crafted.delta_255)))
        files.append(sha256_file(path))
    assert files[0] == files[1] != files[2]


# --- interruptions ------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("target", [None, 3])
def test_killed_crafting_continues_to_the_very_same_perturbation(
    target: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", -1.0)  # save after every step
    request, settings = Request(10.0, target), replace(SETTINGS, epochs=5, shuffle=True)
    model = fold(trained())
    expected = craft(model, tmp_path / "whole.pt", request, settings)
    partial = tmp_path / "partial.pt"
    for batches in (6, 7):  # dies in epoch 2, then in epoch 3
        left = iter(range(batches))

        def progress(_n: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise Killed

        with pytest.raises(Killed):
            craft(model, partial, request, settings, progress=progress)
    state = read_partial(partial, key="mine")
    assert state is not None
    assert state["step"] == 15  # of 20: the step that was told of is not taken again
    counts: list[int] = []
    resumed = craft(model, partial, request, settings, progress=counts.append)
    assert sum(counts) == 5 * 40 - (3 * 40 + 36)
    assert np.array_equal(resumed.delta_255, expected.delta_255)
    assert replace(resumed, delta_255=0) == replace(expected, delta_255=0)  # type: ignore[arg-type]
    other = craft(model, partial, request, settings, key="theirs")
    assert np.array_equal(other.delta_255, expected.delta_255)


# --- levels -------------------------------------------------------------------------------------


def test_every_level_survives_its_file() -> None:
    levels = np.arange(-255, 256, dtype=np.int16).reshape(1, 7, 73)
    for eps in (255.0, 255):
        back = to_levels(from_levels(levels).astype(np.float64) * 255, eps=eps)
        assert np.array_equal(back, levels)
    assert back.dtype == np.int16


@settings(deadline=None)
@given(eps=st.floats(0.01, 255), values=st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_levels_never_exceed_their_budget(eps: float, values: list[float]) -> None:
    delta_255 = np.clip(np.array(values) * eps, -eps, eps)
    levels = to_levels(delta_255, eps=eps)
    assert np.abs(levels).max() <= eps
    inside = np.abs(np.rint(delta_255)) <= math.floor(eps)
    assert np.abs(levels - delta_255)[inside].max(initial=0) <= 0.5
    delta = from_levels(delta_255).reshape(1, 1, -1)
    deployed = perturbation(delta=delta, eps=eps).delta_255
    assert np.abs(deployed).max() <= eps


@pytest.mark.parametrize(("eps", "limit"), [(2.5, 2), (2.0, 2), (1.999, 1), (0.5, 0), (254.6, 254)])
def test_a_budget_that_is_not_whole_is_rounded_down(eps: float, limit: int) -> None:
    edges = np.array([[[-eps, eps, 0.0]]])
    assert to_levels(edges, eps=eps).tolist() == [[[-limit, limit, 0]]]


# --- controls -----------------------------------------------------------------------------------


def test_random_signs_are_the_whole_budget_and_balanced() -> None:
    control = random_sign((3, 32, 32), eps=7.5, seed=1)
    assert control.dtype == np.float32
    assert np.unique(control).tolist() == [-7.5, 7.5]
    assert abs((control > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(3 * 32 * 32)
    assert np.array_equal(control, random_sign((3, 32, 32), eps=7.5, seed=1))
    assert not np.array_equal(control, random_sign((3, 32, 32), eps=7.5, seed=2))


def test_a_chessboard_alternates_and_is_grey() -> None:
    board = chessboard((3, 5, 6), eps=4.0)
    assert board.dtype == np.float32
    for y in range(5):
        for x in range(6):
            assert board[:, y, x].tolist() == [4.0 if (x + y) % 2 else -4.0] * 3


# --- files --------------------------------------------------------------------------------------


def perturbation(**changes: Any) -> Perturbation:
    delta = np.linspace(-10, 10, 3 * 4 * 5).reshape(3, 4, 5)
    values: dict[str, Any] = {
        "delta": from_levels(delta),
        "eps": 10.0,
        "source": "full",
        "target": None,
        "dataset": "digits",
        "protocol": "clean",
        "seed": 0,
        "meta": {"attack": "sgd", "loss": [1.0, 2.0]},
    }
    return Perturbation(**(values | changes))


@pytest.mark.parametrize("changes", [{}, {"target": 0}, {"target": 9, "eps": 10.5, "meta": {}}])
def test_a_perturbation_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    path, saved = tmp_path / "u.pt", perturbation(**changes)
    save_perturbation(path, saved)
    loaded = load_perturbation(path)
    assert np.array_equal(loaded.delta, saved.delta)
    assert replace(loaded, delta=0) == replace(saved, delta=0)  # type: ignore[arg-type]
    content = torch.load(path, weights_only=True)
    assert content["target"] == (-1 if saved.target is None else saved.target)
    assert loaded.attack == ("sgd" if saved.meta else "unknown")
    record = uap_record(path, loaded)
    assert (record.sha256, record.shape) == (sha256_file(path), (3, 4, 5))
    assert np.array_equal(np.frombuffer(record.delta, "<f4").reshape(3, 4, 5), saved.delta)


def file_content() -> dict[str, Any]:
    return {
        "delta": torch.full((3, 4, 4), 0.03),
        "eps": 10.0,
        "source": "full",
        "target": -1,
        "dataset": "digits",
        "protocol": "clean",
        "seed": 0,
        "meta": {},
    }


@pytest.mark.parametrize(
    "field", ["delta", "eps", "source", "target", "dataset", "protocol", "seed"]
)
def test_a_missing_field_is_named_with_those_a_file_holds(field: str, tmp_path: Path) -> None:
    path, content = tmp_path / "u.pt", file_content()
    del content[field]
    torch.save(content, path)
    with pytest.raises(UsageError, match=rf"has no '{field}': a UAP file holds delta, eps"):
        load_perturbation(path)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("delta", [0.0], "delta is a list"),
        ("eps", "10", "eps is a str"),
        ("eps", True, "eps is a bool"),
        ("source", 3, "source is a int"),
        ("target", None, "target is a NoneType"),
        ("target", False, "target is a bool"),
        ("target", 4.0, "target is a float"),
        ("seed", 1.5, "seed is a float"),
        ("eps", 0.0, "eps is 0.0, but must be in (0, 255]"),
        ("eps", -1.0, "eps is -1.0"),
        ("eps", 255.5, "eps is 255.5"),
        ("eps", float("nan"), "eps is nan"),
        ("eps", float("inf"), "eps is inf"),
        ("eps", 10**400, "eps is 1000"),
        ("target", -2, "target -2 is out of range"),
        ("seed", -1, "seed -1"),
        ("seed", 2**63, "seed 9223372036854775808"),
        ("delta", torch.zeros(3, 4, 4, dtype=torch.float64), "torch.float64 [3, 4, 4]"),
        ("delta", torch.zeros(4, 4), "torch.float32 [4, 4], not float32 [C, H, W]"),
        ("delta", torch.zeros(1, 3, 4, 4), "[1, 3, 4, 4]"),
        ("delta", torch.zeros(3, 0, 4), "[3, 0, 4]"),
        ("delta", torch.zeros(1).expand(3, 4096, 4096), "[3, 4096, 4096]"),
        ("delta", torch.zeros(3, 4, 4).to_sparse(), "delta is sparse"),
        ("delta", torch.zeros(3, 4, 4, device="meta"), "has no values"),
        ("delta", torch.full((3, 4, 4), torch.nan), "not finite"),
        ("delta", torch.full((3, 4, 4), -torch.inf), "not finite"),
        ("delta", torch.full((3, 4, 4), -10.01 / 255), "reaches 10.010/255, over its eps of 10"),
    ],
)
def test_a_malformed_field_is_refused_for_its_reason(
    field: str, value: Any, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "u.pt"
    torch.save(file_content() | {field: value}, path)
    with pytest.raises(UsageError) as caught:
        load_perturbation(path)
    message = str(caught.value)
    assert named in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("levels", [10, 2.4, 1 / 3])
def test_the_rounding_of_float32_is_within_the_budget(levels: float, tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    delta = torch.full((3, 4, 4), levels) / 255
    torch.save(file_content() | {"delta": delta, "eps": levels}, path)
    assert load_perturbation(path).eps == levels


@pytest.mark.parametrize(
    "delta",
    [
        torch.full((3, 4, 4), 0.03, requires_grad=True),
        nn.Parameter(torch.full((3, 4, 4), 0.03)),
        torch.full((4, 4, 3), 0.03).permute(2, 0, 1),
        torch.full((3, 4, 8), 0.03)[:, :, ::2],
    ],
    ids=["wants gradients", "parameter", "transposed", "strided"],
)
def test_whatever_kind_of_tensor_a_user_saved_is_read(delta: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    torch.save(file_content() | {"delta": delta}, path)
    loaded = load_perturbation(path)
    assert np.array_equal(loaded.delta, np.full((3, 4, 4), 0.03, np.float32))
    assert loaded.delta.flags.c_contiguous


def test_a_file_without_usable_metadata_is_read(tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    for meta, kept in (
        ([1, 2], {}),
        ({"a": torch.ones(2), "b": [1, "x"], "c": math.nan, "d": [torch.ones(1)]}, {"b": [1, "x"]}),
        ({(1, 2): 3, 4: 5, "e": True}, {"e": True}),
    ):
        torch.save(file_content() | {"meta": meta}, path)
        record = uap_record(path, load_perturbation(path))
        assert json.loads(json.dumps(record.meta)) == kept


@pytest.mark.parametrize(
    ("fits", "named"),
    [
        ({"dataset": "svhn"}, "was crafted on 'digits'; this workspace is 'svhn'"),
        ({"image_shape": (3, 32, 32)}, "is [3, 4, 5]; images here are [3, 32, 32]"),
        ({"classes": 4}, "targets class 4; there are 4"),
        ({}, None),
    ],
)
def test_a_perturbation_for_other_images_is_refused(
    fits: dict[str, Any], named: str | None
) -> None:
    here = {"dataset": "digits", "image_shape": (3, 4, 5), "classes": 5} | fits
    path = Path("cache/u.pt")
    if named is None:
        check_fits(perturbation(target=4), path, **here)
        return
    with pytest.raises(UsageError) as caught:
        check_fits(perturbation(target=4), path, **here)
    assert str(caught.value) == f"UAP {path} {named}"

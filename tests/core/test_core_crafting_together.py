"""Many perturbations in one pass: each is what it would be alone; and the default attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_cases import CPU, IMAGE_SHAPE, split, trained
from torch import Tensor, nn

from harness import unfinished
from harness.artefacts import read_partial
from harness.crafting import arithmetic, together
from harness.crafting.momentum import MomentumSettings
from harness.crafting.perturbation import chessboard, random_sign, to_levels
from harness.crafting.selection import selection_images
from harness.crafting.sgd import SgdSettings, craft_sgd
from harness.crafting.together import Crafted, Job, Request, Rule, craft_together, planned_steps
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise

SGD = SgdSettings(epochs=3, batch_size=12, step=0.2, beta=8.0, shuffle=True, batch_statistics=False)
MOMENTUM = MomentumSettings(
    epochs=3,
    batch_size=4,
    step=0.2,
    beta=8.0,
    momentum=0.8,
    shuffle=True,
    batch_statistics=False,
    selection=16,
)
WAVES = replace(MOMENTUM, epochs=9, waves=160)
JOBS = [
    Job(Request(10.0), 1),
    Job(Request(4.0), 2),
    Job(Request(10.0, 2), 3),
    Job(Request(40.0), 4),
    Job(Request(2.5, 0), 5),
]


def craft(
    model: nn.Module,
    partial: Path,
    jobs: list[Job] = JOBS,
    rule: Rule = MOMENTUM.rule,
    *,
    n: int = 40,
    progress: Callable[[int], None] = lambda _n: None,
) -> list[Crafted]:
    return craft_together(
        model, split(n), jobs, rule, key="k", partial=partial, device=CPU, progress=progress
    )


@pytest.fixture(autouse=True)
def nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a run would continue the one before it, which has the same key."""
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", 1e9)


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("deploy", [fold, integerise], ids=["float", "integer"])
@pytest.mark.parametrize(
    "rule", [SGD.rule, MOMENTUM.rule, WAVES.rule], ids=["sgd", "momentum", "waves"]
)
@pytest.mark.parametrize("at_once", [8, 30, 256])
def test_each_is_what_it_would_be_alone(
    deploy: Callable[[Any], nn.Module],
    rule: Rule,
    at_once: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "IMAGES_AT_ONCE", {"cpu": at_once})
    model = deploy(trained(bits=4 if deploy is integerise else None))
    crafted = craft(model, tmp_path / "p.pt", JOBS, rule)
    for job, found in zip(JOBS, crafted, strict=True):
        (alone,) = craft(model, tmp_path / "p.pt", [job], rule)
        assert np.array_equal(found.delta_255, alone.delta_255)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert replace(found, delta_255=0, loss=()) == replace(alone, delta_255=0, loss=())  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_thread")
def test_with_less_memory_fewer_run_at_once_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = fold(trained()), together._of_chunk
    expected = craft(model, tmp_path / "p.pt", JOBS, SGD.rule)
    tried: list[int] = []

    def small(function: Any, images: Tensor, *rest: Any) -> Any:
        tried.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(function, images, *rest)

    monkeypatch.setattr(together, "_of_chunk", small)
    crafted = craft(model, tmp_path / "p.pt", JOBS, SGD.rule)
    assert max(tried) > 1
    for found, other in zip(crafted, expected, strict=True):
        assert np.array_equal(found.delta_255, other.delta_255)


def test_no_memory_for_one_perturbation_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(together, "_of_chunk", none)
    with pytest.raises(torch.OutOfMemoryError):
        craft(fold(trained()), tmp_path / "p.pt", JOBS, SGD.rule)


def test_batch_statistics_are_never_shared(tmp_path: Path) -> None:
    rule = replace(SGD.rule, batch_statistics=True)
    crafted = craft(trained(), tmp_path / "p.pt", JOBS, rule)
    for job, found in zip(JOBS, crafted, strict=True):
        (alone,) = craft(trained(), tmp_path / "p.pt", [job], rule)
        assert np.array_equal(found.delta_255, alone.delta_255)


def test_the_papers_attack_step_for_step_on_a_network(tmp_path: Path) -> None:
    """The authors' loop as they wrote it: [0, 1] pixels, train mode, every step compared."""
    model, eps, batch_size, beta = trained(), 10 / 255, 12, 8.0
    images, labels = split(40).images, torch.from_numpy(split(40).labels)
    rule = replace(SGD.rule, shuffle=False, batch_statistics=True)
    iterates: list[Tensor] = []
    original = together._gradients

    def recording(*arguments: Any) -> Any:
        iterates.append(arguments[4][0].clone())
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_gradients", recording)
        (crafted,) = craft(model, tmp_path / "p.pt", [Job(Request(10.0), 5)], rule)

    theirs = trained().train()
    signs = np.random.default_rng(5).choice(np.float32([-1, 1]), size=IMAGE_SHAPE)
    delta = torch.from_numpy(signs) * eps / 2
    step = 0
    for _epoch in range(3):
        for first in range(0, 40, batch_size):
            # From our iterate, so that one sign that flips near zero does not grow.
            assert (iterates[step] / 255 - delta).abs().gt(1e-5).float().mean() < 0.01
            delta = (iterates[step] / 255).requires_grad_()
            x = torch.from_numpy(images[first : first + batch_size]).float() / 255
            y = labels[first : first + batch_size]
            logits = theirs(torch.clamp(x + delta, 0, 1) * 255)
            loss = F.cross_entropy(logits, y, reduction="none").clamp(max=beta).mean()
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = torch.clamp(delta.detach() + eps / 5 * gradient.sign(), -eps, eps)
            step += 1
    assert step == len(iterates) == planned_steps(rule, 40)
    last = torch.from_numpy(crafted.delta_255) / 255
    assert (last - delta).abs().gt(1e-5).float().mean() < 0.01


def test_momentum_step_for_step(tmp_path: Path) -> None:
    """Against a plain transcription of the formula in the module's docstring."""
    model, job = fold(trained()), Job(Request(10.0), 7)
    rule = replace(MOMENTUM.rule, selection=0, epochs=2)
    (crafted,) = craft(model, tmp_path / "p.pt", [job], rule)
    pixels, labels = torch.from_numpy(split(40).images).float(), torch.from_numpy(split(40).labels)
    signs = np.random.default_rng(7).choice(np.float32([-1, 1]), size=IMAGE_SHAPE)
    delta, velocity = torch.from_numpy(signs) * 5, torch.zeros(IMAGE_SHAPE)
    for t in range(20):
        order = np.random.default_rng((7, t // 10)).permutation(40)
        batch = order[t % 10 * 4 : t % 10 * 4 + 4]
        delta = delta.detach().requires_grad_()
        logits = model((pixels[batch] + delta).clamp(0, 255))
        loss = F.cross_entropy(logits, labels[batch], reduction="none").clamp(max=8.0).mean()
        (gradient,) = torch.autograd.grad(loss, delta)
        velocity = 0.8 * velocity + gradient / gradient.abs().mean()
        delta = (delta.detach() + 2.0 * (1 - t / 20) * velocity.sign()).clamp(-10, 10)
    difference = np.abs(crafted.delta_255 - delta.numpy())
    assert np.mean(difference < 1e-3) > 0.98  # but for sign(almost 0)


def test_a_selection_costs_no_more_than_the_paper_spends(tmp_path: Path) -> None:
    counts: list[int] = []
    craft(fold(trained()), tmp_path / "p.pt", progress=counts.append)
    gradients = sum(counts) / len(JOBS)
    forwards = 3 * MOMENTUM.selection
    assert gradients + forwards / 2 <= MOMENTUM.epochs * 40
    assert gradients + forwards / 2 > MOMENTUM.epochs * 40 - MOMENTUM.batch_size
    assert [selection_images(n) for n in (10, 64, 256, 2000, 10**6)] == [10, 64, 64, 250, 1024]


class Chess(nn.Module):
    """Wrong exactly under a chessboard, which its gradient does not show."""

    def forward(self, pixels: Tensor) -> Tensor:
        board = torch.from_numpy(chessboard(IMAGE_SHAPE, eps=1.0))
        under = ((pixels - pixels.mean()) * board).mean(dim=(1, 2, 3)) > 5
        right = torch.zeros(len(pixels), 4).index_fill(1, torch.tensor([0]), 1.0)
        return torch.where(under[:, None], right.roll(1, 1), right) + 0 * pixels[:, :1, 0, 0]


def test_it_does_not_lose_to_a_chessboard_that_gradients_do_not_find(tmp_path: Path) -> None:
    (crafted,) = craft(Chess(), tmp_path / "p.pt", [Job(Request(10.0, 1), 3)])
    assert crafted.chosen == "chessboard"
    assert np.array_equal(crafted.delta_255, chessboard(IMAGE_SHAPE, eps=10.0))


@pytest.mark.parametrize("eps", [40.0, 30.5])
def test_the_default_attack_is_whole_levels_and_beats_the_controls(
    eps: float, tmp_path: Path
) -> None:
    model, images = fold(trained(steps=40)), split(120, seed=8)
    jobs = [Job(Request(eps), seed) for seed in range(3)]
    rule = replace(MOMENTUM.rule, epochs=10, selection=64)

    def uer(levels: np.ndarray) -> float:
        return float((predict(model, images.images, levels, device=CPU) != images.labels).mean())

    controls = [random_sign(IMAGE_SHAPE, eps=eps, seed=s) for s in range(5)]
    controls.append(chessboard(IMAGE_SHAPE, eps=eps))
    worst = max(uer(to_levels(control, eps=eps)) for control in controls)
    for crafted in craft(model, tmp_path / "p.pt", jobs, rule, n=64):
        levels = to_levels(crafted.delta_255, eps=eps)
        assert np.array_equal(levels, crafted.delta_255)  # rounding changes nothing
        assert np.abs(levels).max() <= eps
        assert uer(levels) > worst + 0.2


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("settings", "after", "step", "searched"),
    [
        (MOMENTUM, 14, 15, 0),
        # A search of 160 passes tells of its progress five times.
        (replace(WAVES, restarts=2), 3, 0, 0),
        (replace(WAVES, restarts=2), 20, 0, 4),
        (replace(WAVES, restarts=2), 60, 36, 5),
    ],
)
def test_a_killed_pass_continues_to_the_very_same_perturbations(
    settings: MomentumSettings,
    after: int,
    step: int,
    searched: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", -1.0)  # save after every step
    model, partial = fold(trained()), tmp_path / "partial.pt"
    expected = craft(model, tmp_path / "whole.pt", rule=settings.rule)
    left = iter(range(after))

    def progress(_n: int) -> None:
        if next(left, None) is None:
            raise Killed

    with pytest.raises(Killed):
        craft(model, partial, rule=settings.rule, progress=progress)
    state = read_partial(partial, key="k")
    assert state is not None
    assert (state["step"], len(state["waves"])) == (step, searched)
    resumed = craft(model, partial, rule=settings.rule)
    for found, wanted in zip(resumed, expected, strict=True):
        assert np.array_equal(found.delta_255, wanted.delta_255)
        assert replace(found, delta_255=0) == replace(wanted, delta_255=0)  # type: ignore[arg-type]


def test_waves_and_restarts_need_images_to_choose_by(tmp_path: Path) -> None:
    for rule in (replace(WAVES.rule, selection=0), replace(MOMENTUM.rule, selection=0, restarts=2)):
        with pytest.raises(ValueError, match="need images to choose among them"):
            craft(fold(trained()), tmp_path / "p.pt", rule=rule)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("deploy", [fold, integerise], ids=["float", "integer"])
def test_on_a_gpu_it_is_as_strong_as_in_float32(
    deploy: Callable[[Any], nn.Module], tmp_path: Path
) -> None:
    """bf16 flips signs near zero: not the same bits, the same strength."""
    model = deploy(trained(bits=4 if deploy is integerise else None, steps=40))
    images, jobs = split(400, seed=8), [Job(Request(40.0), seed) for seed in range(4)]
    rule, rates = replace(MOMENTUM.rule, epochs=10), {}
    for device in (CPU, torch.device("cuda")):
        found = craft_together(
            model.to(device),
            split(64),
            jobs,
            rule,
            key="k",
            partial=tmp_path / "p.pt",
            device=device,
            progress=lambda _n: None,
        )
        wrong = [
            predict(model, images.images, to_levels(f.delta_255, eps=40.0), device=device)
            != images.labels
            for f in found
        ]
        rates[device.type] = float(np.mean(wrong))
    assert abs(rates["cuda"] - rates["cpu"]) < 0.08


def test_a_plain_request_is_the_papers_rule(tmp_path: Path) -> None:
    model = fold(trained())
    plain = craft_sgd(
        model,
        split(40),
        Request(10.0),
        SGD,
        seed=1,
        key="k",
        partial=tmp_path / "p.pt",
        device=CPU,
        progress=lambda _n: None,
    )
    (found,) = craft(model, tmp_path / "p.pt", JOBS[:1], SGD.rule)
    assert np.array_equal(plain.delta_255, found.delta_255)
    assert plain.chosen == "last iterate"

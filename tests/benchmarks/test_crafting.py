"""Crafting, paired with the loop the authors ran.

    pytest tests/benchmarks/test_crafting.py --benchmark-enable -s

Baseline: the same model, trainable as the authors had it (train mode, weights not frozen, batch
norm not folded, weights quantised anew), one perturbation at a time. Both meet the same machine in
turn, and ratios are printed. Nothing is asserted about time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from harness.crafting.momentum import MomentumSettings
from harness.crafting.perturbation import to_levels
from harness.crafting.together import Job, Request, Rule, craft_together
from harness.data.dataset import Dataset, load_dataset
from harness.data.splits import Split
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, ResNet, build_model

WIDTH = 16
BATCH = 64
PAIRS = 3
BETA = 8.0
CPU = torch.device("cpu")
SPEC = {"mean_255": (125, 122, 113), "std_255": (63.0, 62.1, 66.7)}
JOBS = [Job(Request(float(eps)), seed=eps) for eps in (2, 4, 6, 8, 10, 12)]
JOBS += [Job(Request(10.0, target), seed=target) for target in range(10)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the pipeline crafts: sources side by side, each on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def digits() -> Dataset:
    return load_dataset("digits", attack_images=256, evaluation_images=600, seed=0)


def untrained(bits: int | None) -> ResNet:
    return build_model(ModelSpec("resnet18", WIDTH, 3, 10, bits=bits, **SPEC), seed=0).eval()


@cache
def trained(width: int, *, epochs: int = 3) -> ResNet:
    """A few epochs: enough to be attacked."""
    model, train = build_model(ModelSpec("resnet18", width, 3, 10, **SPEC), seed=0), digits().train
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pixels, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(train), generator=generator).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[batch].float()), labels[batch]).backward()
            optimiser.step()
    return model.eval()


def authors_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, delta: torch.Tensor, eps: float
) -> torch.Tensor:
    delta = delta.detach().requires_grad_()
    loss = F.cross_entropy(model((x + delta).clamp(0, 255)), y, reduction="none")
    loss.clamp(max=BETA).mean().backward()
    assert delta.grad is not None
    return (delta.detach() + 0.2 * eps * delta.grad.sign()).clamp(-eps, eps)


@pytest.mark.parametrize("form", ["folded", "integer_q4"])
def test_images_a_second(benchmark: BenchmarkFixture, form: str, tmp_path: Path) -> None:
    """The 16 perturbations of a model in one pass over a batch, and one at a time."""
    jobs = JOBS[:2] if benchmark.disabled else JOBS  # as a test it need only run
    split = digits().attack
    images = torch.from_numpy(split.images[:BATCH]).float()
    labels = torch.from_numpy(split.labels[:BATCH])
    bits = 4 if form == "integer_q4" else None
    baseline = untrained(bits).train()
    model: nn.Module = fold(untrained(None)) if bits is None else integerise(untrained(bits))
    rule = Rule(1, BATCH, 0.2, BETA, shuffle=True, batch_statistics=False)
    few = type(split)(split.images[:BATCH], split.labels[:BATCH])

    def ours() -> None:
        craft_together(
            model,
            few,
            jobs,
            rule,
            key="k",
            partial=tmp_path / "never continued.pt",
            device=CPU,
            progress=lambda _n: None,
        )

    def theirs() -> None:
        for _job in jobs:
            authors_step(baseline, images, labels, torch.zeros(3, 32, 32), 10.0)

    if benchmark.disabled:
        theirs()
        benchmark.pedantic(ours, rounds=1)
        return
    ours_s, theirs_s = [], []
    for _ in range(PAIRS + 1):  # one to warm up
        ours_s.append(seconds(ours))
        theirs_s.append(seconds(theirs))
    ratio = float(np.median(theirs_s[1:]) / np.median(ours_s[1:]))
    benchmark.extra_info.update({"form": form, "speedup_over_authors_loop": ratio})
    sys.stderr.write(
        f"\n{form}, width {WIDTH}, 16 perturbations, batch {BATCH}: {ratio:.2f} x the images a"
        " second of the authors' loop\n"
    )
    benchmark.pedantic(ours, rounds=1)


def test_time_to_the_references_uer(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """How long until the default attack is as strong as ten epochs of the authors' loop."""
    # As a test it need only run.
    epochs, n, width = (2, 4 * BATCH, 4) if benchmark.disabled else (10, None, 8)
    data, eps = digits(), 10.0
    trained_model = trained(width, epochs=1 if benchmark.disabled else 3)
    some = Split(data.attack.images[:n], data.attack.labels[:n])
    images, labels = torch.from_numpy(some.images), torch.from_numpy(some.labels)
    folded = fold(trained_model)
    reference = build_model(trained_model.spec, seed=0)
    reference.load_state_dict(trained_model.state_dict())
    reference.train()  # as the authors left it

    def uer(levels: npt.NDArray[np.int16]) -> float:
        predicted = predict(folded, data.evaluation.images, levels, device=CPU)
        return float(np.mean(predicted != data.evaluation.labels))

    rng = np.random.default_rng(0)
    delta = torch.from_numpy(rng.choice(np.float32([-1, 1]), (3, 32, 32))) * (eps / 2)
    began = time.perf_counter()
    for _ in range(epochs):
        for first in range(0, len(images), BATCH):
            part = slice(first, first + BATCH)
            delta = authors_step(reference, images[part].float(), labels[part], delta, eps)
    theirs_s = time.perf_counter() - began
    goal = uer(to_levels(delta.numpy(), eps=eps))

    def attack(budget: int) -> npt.NDArray[np.int16]:
        settings = MomentumSettings(budget, 8, 0.2, BETA, 0.8, True, False, 64)
        (found,) = craft_together(
            folded,
            some,
            [Job(Request(eps), 0)],
            settings.rule,
            key=str(budget),
            partial=tmp_path / "p.pt",
            device=CPU,
            progress=lambda _n: None,
        )
        return to_levels(found.delta_255, eps=eps)

    for budget in range(1, epochs + 1):
        began = time.perf_counter()
        levels = attack(budget)
        ours_s = time.perf_counter() - began
        reached = uer(levels)
        if reached >= goal:
            break
    benchmark.extra_info.update({"goal_uer": goal, "epochs": budget, "uer": reached})
    sys.stderr.write(
        f"\nUER {reached:.1%} after {budget} epochs (the authors' loop: {goal:.1%} after {epochs}):"
        f" {theirs_s / ours_s:.1f} x less time\n"
    )
    assert reached >= goal
    benchmark.pedantic(attack, args=(1,), rounds=1)


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

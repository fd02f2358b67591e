"""Crafting on a GPU, paired with the loop the authors ran, and how much of the device it uses.

    pytest -m gpu tests/benchmarks/test_crafting_gpu.py --benchmark-enable -s

Baseline: the trainable model as the authors had it (train mode, weights not frozen, batch norm not
folded), one perturbation at a time, on the same device; in float32, and with its convolutions in
TF32, as PyTorch has them unless told otherwise. The peak is what the device does
in bf16 matrix products of 8192 x 8192, measured beside. Nothing is asserted about time.

Two questions: the same work, and the same result: how long until the default attack's perturbations
do as much as ten epochs of the authors' loop.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu_cases import JOBS, peak_flops, seconds
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.crafting.momentum import MomentumSettings
from harness.crafting.perturbation import to_levels
from harness.crafting.selection import selection_images
from harness.crafting.together import Job, Rule, craft_together
from harness.data.dataset import Dataset, Split, load_dataset
from harness.inference import predict
from harness.models.folded import fold
from harness.models.resnet import ModelSpec, ResNet, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, IMAGES, BATCH, PAIRS, BETA = 64, 8000, 500, 3, 8.0
ATTACKED, AUTHORS_EPOCHS = 2000, 10
SPEC = {"mean_255": (125, 122, 113), "std_255": (63.0, 62.1, 66.7)}


def authors_epoch(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    job: Job,
    delta: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass of one perturbation over the images, as the authors' loop makes it."""
    eps, target = job.request.eps, job.request.target
    delta = torch.zeros_like(images[0], dtype=torch.float32) if delta is None else delta
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        y = labels[part] if target is None else torch.full_like(labels[part], target)
        delta = delta.detach().requires_grad_()
        logits = model((images[part].float() + delta).clamp(0, 255))
        loss = F.cross_entropy(logits, y, reduction="none").clamp(max=BETA).mean()
        (loss if target is None else -loss).backward()
        assert delta.grad is not None
        delta = (delta.detach() + 0.2 * eps * delta.grad.sign()).clamp(-eps, eps)
    return delta


def test_a_campaign_and_its_share_of_the_peak(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    split = Split(
        rng.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8),
        rng.integers(0, 10, IMAGES).astype(np.int64),
    )
    images, labels = torch.from_numpy(split.images).cuda(), torch.from_numpy(split.labels).cuda()
    network = build_model(ModelSpec("resnet18", WIDTH, 3, 10, **SPEC), seed=0)
    ours_model = fold(network.eval()).requires_grad_(requires_grad=False).cuda()
    baseline = build_model(ModelSpec("resnet18", WIDTH, 3, 10, **SPEC), seed=0).cuda().train()
    rule = Rule(1, BATCH, 0.2, BETA, shuffle=True, batch_statistics=False)

    def ours() -> None:
        craft_together(
            ours_model,
            split,
            JOBS,
            rule,
            key="k",
            partial=tmp_path / "never continued.pt",
            device=torch.device("cuda"),
            progress=lambda _n: None,
        )

    def theirs(jobs: Sequence[Job] = JOBS) -> None:
        for job in jobs:
            authors_epoch(baseline, images, labels, job)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours_model(images[:1].float())
    ours()
    for tf32 in (True, False):  # chooses kernels
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            theirs(JOBS[:1])
    pairs = []
    for _ in range(PAIRS):
        ours_s = seconds(ours)
        pairs.append((ours_s, seconds(theirs)))  # in TF32, as PyTorch has convolutions
    ours_median = float(np.median([ours_s for ours_s, _ in pairs]))
    in_tf32 = float(np.median([theirs_s / ours_s for ours_s, theirs_s in pairs]))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        in_float32 = seconds(theirs) / ours_median
    # Frozen weights: the backward pass costs the input's gradient, as much as the forward pass.
    work = 2 * counter.get_total_flops() * IMAGES * len(JOBS)
    share = float(work / ours_median / peak_flops())
    benchmark.extra_info.update(
        {
            "speedup_over_authors_loop_in_tf32": in_tf32,
            "speedup_over_authors_loop_in_float32": in_float32,
            "share_of_peak": share,
        }
    )
    sys.stderr.write(
        f"\n{torch.cuda.get_device_name()}, width {WIDTH}, 16 perturbations, {IMAGES} images:"
        f" {in_tf32:.1f} x less time than the authors' loop in TF32,"
        f" {in_float32:.1f} x than in float32; {share:.0%} of the device's measured"
        " bf16 matrix-product peak\n"
    )
    assert share > 0
    benchmark.pedantic(ours, rounds=1)


def trained_on(data: Dataset, *, epochs: int) -> ResNet:
    """A few epochs: enough to be attacked."""
    model = build_model(ModelSpec("resnet18", WIDTH, 3, 10, **SPEC), seed=0).to(DEVICE)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pixels = torch.from_numpy(data.train.images).to(DEVICE)
    labels = torch.from_numpy(data.train.labels).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).to(DEVICE).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[batch].float()), labels[batch]).backward()
            optimiser.step()
    return model.eval()


def test_time_to_the_references_campaign(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """All 16 perturbations: until theirs are matched on average, as a device receives them."""
    data = load_dataset("digits", attack_images=ATTACKED, evaluation_images=600, seed=0)
    network = trained_on(data, epochs=3)
    folded = fold(copy.deepcopy(network).cpu()).requires_grad_(requires_grad=False).to(DEVICE)
    images = torch.from_numpy(data.attack.images).to(DEVICE)
    labels = torch.from_numpy(data.attack.labels).to(DEVICE)

    def success(deltas: list[np.ndarray]) -> float:
        rates = []
        for job, delta in zip(JOBS, deltas, strict=True):
            levels = to_levels(delta, eps=job.request.eps)
            predicted = predict(folded, data.evaluation.images, levels, device=DEVICE)
            target = job.request.target
            hit = predicted != data.evaluation.labels if target is None else predicted == target
            rates.append(float(np.mean(hit)))
        return float(np.mean(rates))

    def theirs() -> list[np.ndarray]:
        found = []
        for job in JOBS:
            signs = np.random.default_rng(job.seed).choice(np.float32([-1, 1]), images.shape[1:])
            delta = torch.from_numpy(signs * (job.request.eps / 2)).to(DEVICE)
            for _ in range(AUTHORS_EPOCHS):
                delta = authors_epoch(network, images, labels, job, delta)
            found.append(delta.cpu().numpy())
        return found

    def ours(epochs: int) -> list[np.ndarray]:
        n = len(data.attack)
        rule = MomentumSettings(
            epochs, 32, 0.2, BETA, 0.8, True, False, selection_images(n), waves=epochs * n // 8
        ).rule
        found = craft_together(
            folded,
            data.attack,
            JOBS,
            rule,
            key=str(epochs),
            partial=tmp_path / "never continued.pt",
            device=DEVICE,
            progress=lambda _n: None,
        )
        return [crafted.delta_255 for crafted in found]

    network.train()
    authors_epoch(network, images, labels, JOBS[0])  # chooses kernels
    made: list[list[np.ndarray]] = []
    theirs_s = seconds(lambda: made.append(theirs()))
    goal = success(made[-1])
    network.eval()
    ours(1)
    for epochs in range(1, AUTHORS_EPOCHS + 1):
        ours_s = seconds(lambda epochs=epochs: made.append(ours(epochs)))
        reached = success(made[-1])
        if reached >= goal:
            break
    benchmark.extra_info.update({"goal": goal, "reached": reached, "epochs": epochs})
    sys.stderr.write(
        f"\nwidth {WIDTH}, 16 perturbations: mean success {reached:.1%} after {epochs} epochs"
        f" (the authors' loop in TF32: {goal:.1%} after {AUTHORS_EPOCHS}):"
        f" {theirs_s / ours_s:.1f} x less time\n"
    )
    assert reached >= goal
    benchmark.pedantic(ours, args=(1,), rounds=1)

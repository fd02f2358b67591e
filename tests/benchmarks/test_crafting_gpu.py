"""Crafting on a GPU, paired with the loop the authors ran, and how much of the device it uses.

    pytest -m gpu tests/benchmarks/test_crafting_gpu.py --benchmark-enable -s

Baseline: the trainable model as the authors had it (train mode, weights not frozen, batch norm not
folded), one perturbation at a time, on the same device; in float32, and with its convolutions in
TF32, as PyTorch has them unless told otherwise. The peak is what the device does
in bf16 matrix products of 8192 x 8192, measured beside. Nothing is asserted about time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu_cases import JOBS, peak_flops, seconds
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.crafting.together import Job, Rule, craft_together
from harness.data.dataset import Split
from harness.models.folded import fold
from harness.models.resnet import ModelSpec, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
WIDTH, IMAGES, BATCH, PAIRS, BETA = 64, 4000, 500, 3, 8.0
SPEC = {"mean_255": (125, 122, 113), "std_255": (63.0, 62.1, 66.7)}


def authors_epoch(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, job: Job) -> None:
    """One pass of one perturbation over the images, as the authors' loop makes it."""
    eps, target = job.request.eps, job.request.target
    delta = torch.zeros(images.shape[1:], device="cuda")
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        y = labels[part] if target is None else torch.full_like(labels[part], target)
        delta = delta.detach().requires_grad_()
        logits = model((images[part].float() + delta).clamp(0, 255))
        loss = F.cross_entropy(logits, y, reduction="none").clamp(max=BETA).mean()
        (loss if target is None else -loss).backward()
        assert delta.grad is not None
        delta = (delta.detach() + 0.2 * eps * delta.grad.sign()).clamp(-eps, eps)


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

    def theirs() -> None:
        for job in JOBS:
            authors_epoch(baseline, images, labels, job)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours_model(images[:1].float())
    ours_s: list[float] = []
    theirs_s: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(PAIRS + 1):  # one to warm up
        ours_s.append(seconds(ours))
        for tf32, times in theirs_s.items():
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                times.append(seconds(theirs))
    ours_median = np.median(ours_s[1:])
    by_tf32 = {tf32: float(np.median(s[1:]) / ours_median) for tf32, s in theirs_s.items()}
    # Frozen weights: the backward pass costs the input's gradient, as much as the forward pass.
    work = 2 * counter.get_total_flops() * IMAGES * len(JOBS)
    share = float(work / ours_median / peak_flops())
    benchmark.extra_info.update(
        {
            "speedup_over_authors_loop_in_tf32": by_tf32[True],
            "speedup_over_authors_loop_in_float32": by_tf32[False],
            "share_of_peak": share,
        }
    )
    sys.stderr.write(
        f"\n{torch.cuda.get_device_name()}, width {WIDTH}, 16 perturbations, {IMAGES} images:"
        f" {by_tf32[True]:.1f} x less time than the authors' loop in TF32,"
        f" {by_tf32[False]:.1f} x than in float32; {share:.0%} of the device's measured"
        " bf16 matrix-product peak\n"
    )
    assert share > 0
    benchmark.pedantic(ours, rounds=1)

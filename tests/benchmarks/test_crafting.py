"""One crafting step, paired with the loop the authors ran.

    pytest tests/benchmarks/test_crafting.py --benchmark-enable -s

Baseline `authors_loop`: the trainable model as it is (weights not frozen, batch norm not folded).
Both take a step on the same images in turn, so that both meet the same machine; the printed ratio
is the median of one over the median of the other. Nothing is asserted about time.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from harness.crafting.sgd import _batch_gradient
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, ResNet, build_model

WIDTH = 16
BATCH = 64
PAIRS = 10
BETA = 8.0
SPEC = {"mean_255": (125, 122, 113), "std_255": (63.0, 62.1, 66.7)}


def trained(bits: int | None) -> ResNet:
    return build_model(ModelSpec("resnet18", WIDTH, 3, 10, bits=bits, **SPEC), seed=0).eval()


def authors_loop(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    delta = torch.zeros(images.shape[1:], requires_grad=True)
    attacked = (images.float() + delta).clamp(0, 255)
    loss = F.cross_entropy(model(attacked), labels, reduction="none").clamp(max=BETA).mean()
    loss.backward()
    assert delta.grad is not None
    return delta.grad


@pytest.mark.parametrize("form", ["folded", "integer_q4"])
def test_crafting_step(benchmark: BenchmarkFixture, form: str) -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, BATCH))
    delta = torch.zeros(3, 32, 32)
    baseline = trained(None)
    model: nn.Module = fold(trained(None)) if form == "folded" else integerise(trained(4))

    def step() -> None:
        _batch_gradient(model, images.float(), labels, delta, beta=BETA)

    ours_ns, theirs_ns = [], []
    for _ in range(PAIRS + 2):  # two to warm up
        began = time.perf_counter_ns()
        step()
        middle = time.perf_counter_ns()
        authors_loop(baseline, images, labels)
        ours_ns.append(middle - began)
        theirs_ns.append(time.perf_counter_ns() - middle)
    ratio = float(np.median(theirs_ns[2:]) / np.median(ours_ns[2:]))
    benchmark.extra_info.update({"form": form, "speedup_over_authors_loop": ratio})
    sys.stderr.write(
        f"\n{form}, width {WIDTH}, batch {BATCH}: {ratio:.2f} x the images a second of the"
        " authors' loop on the float model\n"
    )
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)

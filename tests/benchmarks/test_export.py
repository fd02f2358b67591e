"""What compression buys in onnxruntime at batch 1, paired with the unpruned fp32 export.

    pytest tests/benchmarks/test_export.py --benchmark-enable

Each pair of files runs interleaved, so that both meet the same machine; the printed ratio is the
median of one over the median of the other. Nothing is asserted about time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from onnxruntime import InferenceSession
from pytest_benchmark.fixture import BenchmarkFixture

from export.float_graph import float_graph
from export.graph import serialise
from export.integer_graph import integer_graph
from export.runtime import RunSettings, open_session
from export.slim import slim
from harness.models.folded import FoldedResNet, fold
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, build_model

SHAPE = (3, 32, 32)
WIDTH = 32
KEEP = 0.7
PAIRS = 200
IMAGE = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), dtype=np.uint8)


def folded(*, zeroed_share: float = 0.0) -> FoldedResNet:
    spec = ModelSpec("resnet18", WIDTH, 3, 10, (125, 122, 113), (63.0, 62.1, 66.7))
    model = fold(build_model(spec, seed=0).eval())
    for block in model.blocks():
        n_zeroed = int(block.conv1.out_channels * zeroed_share)
        block.conv1.weight[:n_zeroed] = 0
        block.conv1.bias[:n_zeroed] = 0.1
    return model


def session_of(content: bytes) -> InferenceSession:
    return open_session(content, RunSettings(threads=1))


def float_session(model: FoldedResNet) -> InferenceSession:
    return session_of(serialise(float_graph(model, image_shape=SHAPE, metadata={})))


@cache
def unpruned() -> InferenceSession:
    """The baseline: the full model, fp32."""
    return float_session(folded())


def sfp(align: int) -> InferenceSession:
    return float_session(slim(folded(zeroed_share=1 - KEEP), align=align)[0])


def apot(bits: int) -> InferenceSession:
    spec = ModelSpec("resnet18", WIDTH, 3, 10, (125, 122, 113), (63.0, 62.1, 66.7), bits=bits)
    model = integerise(build_model(spec, seed=0).eval())
    return session_of(serialise(integer_graph(model, image_shape=SHAPE, metadata={})))


VARIANTS: dict[str, Callable[[], InferenceSession]] = {
    "sfp_masked_not_slim": lambda: float_session(folded(zeroed_share=1 - KEEP)),
    "sfp_exact": lambda: sfp(1),
    "sfp_aligned_8": lambda: sfp(8),
    "q4_integer": lambda: apot(4),
    "q2_integer": lambda: apot(2),
}


def elapsed_ns(session: InferenceSession) -> int:
    start = time.perf_counter_ns()
    session.run(None, {"image": IMAGE})
    return time.perf_counter_ns() - start


@pytest.mark.benchmark(group="export")
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_1_latency_against_the_unpruned_export(
    variant: str, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, session = unpruned(), VARIANTS[variant]()
    benchmark(lambda: session.run(None, {"image": IMAGE}))
    if not benchmark.enabled:
        return
    pairs = np.array([(elapsed_ns(baseline), elapsed_ns(session)) for _ in range(PAIRS)])
    baseline_ms, variant_ms = np.median(pairs, axis=0) / 1e6
    ratio = variant_ms / baseline_ms
    benchmark.extra_info.update(baseline="unpruned fp32 export", latency_ratio=round(ratio, 3))
    line = (
        f"{variant} at width {WIDTH}: {variant_ms:.3f} ms, unpruned fp32 {baseline_ms:.3f} ms, "
        f"latency ratio {ratio:.2f}"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{line}\n")

"""What the benchmarks on a GPU share: a clock, a ceiling, the perturbations of one model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from harness.crafting.together import Job, Request

SIZE, ROUNDS = 8192, 20
JOBS = [Job(Request(float(eps)), seed=eps) for eps in (2, 4, 6, 8, 10, 12)]
JOBS += [Job(Request(10.0, target), seed=target) for target in range(10)]


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def best_of(work: Callable[[], object], times: int = 3) -> float:
    """Seconds; the first call, which chooses kernels, does not count."""
    work()
    return min(seconds(work) for _ in range(times))


def peak_flops() -> float:
    """Floating-point operations a second of bf16 matrix products, measured."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIZE**3 * ROUNDS / best_of(lambda: [torch.mm(a, b) for _ in range(ROUNDS)])

"""Tiny models, images and records that the tests of `harness` share. Everything is seeded."""

from __future__ import annotations

import copy
import hashlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from harness.data.splits import Split
from harness.models.resnet import ModelSpec, ResNet, build_model
from harness.records import (
    CostCard,
    EvaluationSet,
    LatencyProcess,
    LatencyRun,
    Machine,
    ModelRecord,
    PredictionRun,
    UapRecord,
)

CLASSES = 4
SIDE = 8
IMAGE_SHAPE = (3, SIDE, SIDE)
MEAN_255 = (125, 122, 113)
STD_255 = (63.0, 62.1, 66.7)
CPU = torch.device("cpu")


def spec(*, width: int = 4, bits: int | None = None, **changes: Any) -> ModelSpec:
    return ModelSpec("resnet18", width, 3, CLASSES, MEAN_255, STD_255, bits=bits, **changes)


@cache
def split(n: int, seed: int = 0) -> Split:
    """n images of `CLASSES` smooth patterns plus noise, and their labels."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).normal(0, 60, (CLASSES, 3, 2, 2)).repeat(4, 2).repeat(4, 3)
    labels = (np.arange(n) % CLASSES).astype(np.int64)
    pixels = 120 + patterns[labels] + rng.normal(0, 25, (n, *IMAGE_SHAPE))
    return Split(np.clip(pixels, 0, 255).astype(np.uint8), labels)


@cache
def _trained(bits: int | None, width: int, steps: int) -> ResNet:
    model = build_model(spec(width=width, bits=bits), seed=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = split(64)
    pixels, labels = torch.from_numpy(images.images).float(), torch.from_numpy(images.labels)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.1, 0.3, generator=generator)
            nn.init.uniform_(module.weight, 0.6, 1.4, generator=generator)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimiser.step()
    return model.eval()


def trained(*, bits: int | None = None, width: int = 4, steps: int = 6) -> ResNet:
    """A model after a few steps on `split(64)`, in eval mode; the caller may change its copy."""
    return copy.deepcopy(_trained(bits, width, steps))


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, as bytes: equal only when bit for bit the same."""
    return {
        name: tensor.detach().contiguous().numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def logits(model: nn.Module, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.from_numpy(images).float()).numpy()


# --- records ---------------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "arch": "x86_64",
        "cpu": "a CPU",
        "cores": 2,
        "os": "Linux",
        "python": "3.11.7",
        "runtime_version": "1.32.0",
        "extra": {"threads": 2, "flags": ["avx2"]},
    }
    return Machine(**(values | changes))


def evaluation_set(labels: tuple[int, ...], name: str = "evaluation") -> EvaluationSet:
    return EvaluationSet(
        sha256=digest(name),
        dataset="digits",
        classes=tuple("abcd"),
        labels=labels,
        image_shape=(3, 2, 2),
        examples=bytes(range(12)),
        note="four classes",
    )


def model_record(name: str = "m", variant: str = "full", **changes: Any) -> ModelRecord:
    values: dict[str, Any] = {
        "sha256": digest(name),
        "variant": variant,
        "method": "full",
        "dataset": "digits",
        "preset": "quickstart",
        "arch": "resnet18",
        "width": 8,
        "seed": 3,
        "cost": CostCard(
            file_bytes=1000,
            gzip_bytes=900,
            params=70,
            nonzeros=60,
            macs=12345,
            bops_nominal=5,
            bops_executed=7,
            opset=17,
            layers=({"name": "stem", "macs": 12345},),
        ),
        "manifest": {"input": "image", "nested": {"list": [1, 2.5, None]}},
    }
    return ModelRecord(**(values | changes))


def uap_record(name: str = "u", **changes: Any) -> UapRecord:
    values: dict[str, Any] = {
        "sha256": digest(name),
        "source": "full",
        "attack": "sgd",
        "protocol": "clean",
        "dataset": "digits",
        "seed": 11,
        "eps": 10.0,
        "target": None,
        "shape": (3, 2, 2),
        "delta": np.linspace(-1, 1, 12, dtype="<f4").tobytes(),
        "meta": {"epochs": 3, "loss": [1.5, 2.0]},
    }
    return UapRecord(**(values | changes))


def prediction_run(
    predictions: tuple[int, ...],
    *,
    model: str = "m",
    uap: str | None = None,
    **changes: Any,
) -> PredictionRun:
    values: dict[str, Any] = {
        "model_sha256": digest(model),
        "evaluation_sha256": digest("evaluation"),
        "uap_sha256": digest(uap) if uap is not None else None,
        "device": "local",
        "emulated": False,
        "runtime": "onnxruntime",
        "machine": machine(),
        "predictions": predictions,
        "seconds": 0.25,
    }
    return PredictionRun(**(values | changes))


def latency_process(samples_ns: tuple[int, ...], **changes: Any) -> LatencyProcess:
    values: dict[str, Any] = {
        "load_ns": 5_000_000,
        "first_ns": 3_000_000,
        "warmup_ns": (2_000_000, 1_500_000),
        "samples_ns": samples_ns,
        "telemetry": ({"load_1m": 0.5, "frequency_mhz": 1500.0},),
        "rss_load_bytes": 100,
        "rss_peak_bytes": 200,
    }
    return LatencyProcess(**(values | changes))


def latency_run(*processes: LatencyProcess, model: str = "m", **changes: Any) -> LatencyRun:
    values: dict[str, Any] = {
        "model_sha256": digest(model),
        "device": "local",
        "emulated": False,
        "runtime": "onnxruntime",
        "machine": machine(),
        "mode": "quick",
        "threads": 1,
        "processes": processes,
    }
    return LatencyRun(**(values | changes))

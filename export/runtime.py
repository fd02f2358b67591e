"""onnxruntime as `export` uses it: on the CPU, with every setting explicit.

Enters: the bytes of an ONNX file, uint8 images. Leaves: a session, and what it returns. The only
module of `export` that opens sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from export.graph import IMAGE, LOGITS
from harness.records import HarnessError

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
Arrays = list[npt.NDArray[Any]]

_LOG_FATAL_ONLY = 4
"""Errors come as exceptions; printed besides, they would be said twice."""


@dataclass(frozen=True)
class RunSettings:
    """How onnxruntime is asked to run a model."""

    threads: int = 2
    optimise: bool = True
    """All graph optimisations, or none."""
    batch_size: int = 64


DEFAULT_SETTINGS = RunSettings()
ALL_SETTINGS = tuple(
    RunSettings(threads=threads, optimise=optimise, batch_size=batch_size)
    for threads in (1, 2)
    for optimise in (True, False)
    for batch_size in (1, 128)
)
"""What a certificate covers: none of these may change what a model says."""


def open_session(
    model_bytes: bytes, settings: RunSettings = DEFAULT_SETTINGS
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Raises:
        HarnessError: onnxruntime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL_ONLY
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if settings.optimise else levels.ORT_DISABLE_ALL
    )
    try:
        return onnxruntime.InferenceSession(
            model_bytes, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's errors share no base class
        raise HarnessError(f"onnxruntime cannot load the model: {_line(error)}") from error


def run(
    session: onnxruntime.InferenceSession,
    images: Images,
    settings: RunSettings = DEFAULT_SETTINGS,
) -> Logits:
    """Logits float32 [N, classes] of uint8 images [N, C, H, W].

    Raises:
        HarnessError: onnxruntime fails on them.
    """
    parts = [run_outputs(session, b, [LOGITS])[0] for b in batches(images, settings.batch_size)]
    return np.concatenate(parts)


def run_outputs(
    session: onnxruntime.InferenceSession, images: Images, outputs: list[str]
) -> Arrays:
    """The named outputs of one call.

    Raises:
        HarnessError: onnxruntime fails.
    """
    try:
        values: Arrays = session.run(outputs, {IMAGE: np.ascontiguousarray(images)})
    except Exception as error:  # onnxruntime's errors share no base class
        raise HarnessError(f"onnxruntime cannot run the model: {_line(error)}") from error
    return values


def batches(images: Images, size: int) -> Iterator[Images]:
    """The images, `size` at a time."""
    return (images[start : start + size] for start in range(0, len(images), size))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Which form of a quantised convolution is fastest here: measured layer by layer, never assumed.

Enters: an integer network and the size of its images. Leaves: the times of every layer's forms. A
layer is timed alone, quantiser and table included, at batch 1 on one thread; layers of one shape
are timed once. The forms take turns, so that a busy machine slows all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from export.graph import IMAGE, LOGITS, serialise
from export.integer_graph import LayerShape, layer_graph, layer_named, layer_shapes
from export.integer_layers import Kernel, forms_of
from export.runtime import RunSettings, open_session
from harness.models.integer import IntegerResNet

WARM_UP_RUNS = 10
TIMED_RUNS = 60
"""Of each form; the median of so many settles within a few percent on a shared machine."""


Times = Mapping[Kernel, int]
"""Form -> median nanoseconds of one layer; the first of equals is preferred."""


def fastest(times: Times) -> Kernel:
    """The form to take."""
    return min(times, key=lambda kernel: times[kernel])


def tune(
    model: IntegerResNet,
    *,
    image_shape: tuple[int, int, int],
    runs: int = TIMED_RUNS,
    progress: Callable[[float, str], None] = lambda _fraction, _note: None,
) -> dict[str, Times]:
    """Time every form of every hidden convolution; `image_shape` is (C, H, W).

    Raises:
        HarnessError: onnxruntime cannot run a layer.
    """
    shapes = layer_shapes(model, image_shape=image_shape)
    distinct = list(dict.fromkeys(shapes.values()))
    measured: dict[LayerShape, Times] = {}
    for done, shape in enumerate(distinct):
        progress(done / len(distinct), shape.text)
        name = next(name for name, other in shapes.items() if other == shape)
        measured[shape] = _time(model, name, shape, runs)
    return {name: measured[shape] for name, shape in shapes.items()}


def _time(model: IntegerResNet, name: str, shape: LayerShape, runs: int) -> Times:
    settings = RunSettings(threads=1)
    sessions = {
        kernel: open_session(serialise(layer_graph(model, name, shape, kernel)), settings)
        for kernel in forms_of(layer_named(model, name))
    }
    pixels = np.random.default_rng(0).integers(0, 256, (1, *shape.input), dtype=np.uint8)
    taken: dict[Kernel, list[int]] = {kernel: [] for kernel in sessions}
    for run in range(WARM_UP_RUNS + runs):
        for kernel, session in sessions.items():
            elapsed = _run_once(session, pixels)
            if run >= WARM_UP_RUNS:
                taken[kernel].append(elapsed)
    return {kernel: int(statistics.median(times)) for kernel, times in taken.items()}


def _run_once(session: Any, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    began = time.perf_counter_ns()
    session.run([LOGITS], {IMAGE: pixels})
    return time.perf_counter_ns() - began

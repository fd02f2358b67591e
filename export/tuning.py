"""Which form of a quantised convolution is faster here: measured layer by layer, never assumed.

Enters: an integer network and the size of its images. Leaves: both times of every layer. A layer
is timed alone, quantiser and table included, at batch 1 on one thread; layers of one shape are
timed once. The forms take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from export.graph import IMAGE, LOGITS, serialise
from export.integer_graph import LayerShape, layer_graph, layer_shapes
from export.integer_layers import Kernel
from export.runtime import RunSettings, open_session
from harness.models.integer import IntegerResNet

WARM_UP_RUNS = 10
TIMED_RUNS = 60
"""Of each form; the median of so many settles within a few percent on a shared machine."""


@dataclass(frozen=True)
class Timing:
    """Medians of one layer's two forms."""

    integer_ns: int
    float_ns: int

    @property
    def faster(self) -> Kernel:
        """The integer form where they are equal: it takes less memory."""
        return "float" if self.float_ns < self.integer_ns else "integer"


def tune(
    model: IntegerResNet,
    *,
    image_shape: tuple[int, int, int],
    runs: int = TIMED_RUNS,
    progress: Callable[[float, str], None] = lambda _fraction, _note: None,
) -> dict[str, Timing]:
    """Time both forms of every hidden convolution; `image_shape` is (C, H, W).

    Raises:
        HarnessError: onnxruntime cannot run a layer.
    """
    shapes = layer_shapes(model, image_shape=image_shape)
    distinct = list(dict.fromkeys(shapes.values()))
    measured: dict[LayerShape, Timing] = {}
    for done, shape in enumerate(distinct):
        progress(done / len(distinct), shape.text)
        name = next(name for name, other in shapes.items() if other == shape)
        measured[shape] = _time(model, name, shape, runs)
    return {name: measured[shape] for name, shape in shapes.items()}


def _time(model: IntegerResNet, name: str, shape: LayerShape, runs: int) -> Timing:
    settings = RunSettings(threads=1)
    sessions = {
        kernel: open_session(serialise(layer_graph(model, name, shape, kernel)), settings)
        for kernel in get_args(Kernel)
    }
    pixels = np.random.default_rng(0).integers(0, 256, (1, *shape.input), dtype=np.uint8)
    taken: dict[Kernel, list[int]] = {kernel: [] for kernel in sessions}
    for run in range(WARM_UP_RUNS + runs):
        for kernel, session in sessions.items():
            elapsed = _run_once(session, pixels)
            if run >= WARM_UP_RUNS:
                taken[kernel].append(elapsed)
    medians = {kernel: int(statistics.median(times)) for kernel, times in taken.items()}
    return Timing(integer_ns=medians["integer"], float_ns=medians["float"])


def _run_once(session: Any, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    began = time.perf_counter_ns()
    session.run([LOGITS], {IMAGE: pixels})
    return time.perf_counter_ns() - began

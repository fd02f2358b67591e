"""`harness export --tune`: measure every form of every quantised layer here, keep the times.

Enters: checkpoints of quantised variants. Leaves: `cache/tuning.json`; exports after it take the
fastest form of each layer, and are rebuilt when the choice changes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnxruntime

from export.integer_layers import Kernel
from export.tuning import Times, fastest, tune
from harness.artefacts import write_atomic
from harness.models.checkpoint import load_checkpoint
from harness.models.integerise import integerise
from harness.pipeline.context import Context, processor_name
from harness.pipeline.tasks import Progress, Task
from harness.records import UsageError, Variant, variant_named

FORMAT_VERSION = 2
_LABELS: dict[Kernel, str] = {
    "integer": "integer convolutions",
    "matmul": "integer matrix products",
    "float": "float over whole numbers",
}
TUNE_FORWARDS = 3000.0
"""Rough cost of timing a variant's layers, in forward passes of one image."""


def tune_tasks(context: Context, names: list[str]) -> list[Task]:
    """Time the quantised ones of these variants, every time it is asked for.

    Raises:
        UsageError: none of them is quantised.
    """
    quantised = [name for name in names if variant_named(name).method == "apot"]
    if not quantised:
        raise UsageError("--tune chooses the form of quantised layers: name q2, q3 or q4")
    return [
        Task(
            stage="export",
            name=f"tune {name}",
            work=0.0,
            core_work=TUNE_FORWARDS,
            is_done=lambda: False,
            run=lambda progress, name=name: _tune(context, name, progress),  # type: ignore[misc]
        )
        for name in quantised
    ]


def chosen_kernels(context: Context, variant: Variant) -> dict[str, Kernel]:
    """Layer name -> its fastest form, of what was measured; empty where nothing was.

    Times of another processor, onnxruntime or width say nothing here and are not used.

    Raises:
        UsageError: the file of measurements is damaged.
    """
    measured = _load(context)["variants"].get(variant.name)
    if measured is None or measured["conditions"] != _conditions(context):
        return {}
    return {layer: fastest(times) for layer, times in measured["layers"].items()}


def _conditions(context: Context) -> dict[str, Any]:
    """What decides the times, beside the layers' names."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "processor": processor_name(),
        "width": context.config.width,
        "image_shape": list(context.image_shape),
    }


def _tune(context: Context, name: str, progress: Progress) -> None:
    model = integerise(load_checkpoint(context.workspace.checkpoint(name)).build())
    timings = tune(model, image_shape=context.image_shape, progress=progress)
    content = _load(context)
    content["variants"][name] = {
        "conditions": _conditions(context),
        "layers": {layer: dict(times) for layer, times in timings.items()},
    }
    text = json.dumps(content, indent=2, sort_keys=True)
    write_atomic(context.workspace.tuning, (text + "\n").encode())
    context.reporter.note(f"tune {name}: {_summary(timings)}")


def _summary(timings: Mapping[str, Times]) -> str:
    chosen = Counter(fastest(times) for times in timings.values())
    forms = ", ".join(f"{chosen[kernel]} {label}" for kernel, label in _LABELS.items())
    integer_ns = sum(times["integer"] for times in timings.values())
    fastest_ns = sum(min(times.values()) for times in timings.values())
    return (
        f"of {len(timings)} layers {forms}; "
        f"all layers {integer_ns / 1e6:.2f} ms as integer convolutions,"
        f" {fastest_ns / 1e6:.2f} ms as chosen"
    )


def _load(context: Context) -> dict[str, Any]:
    path = context.workspace.tuning
    if not path.exists():
        return {"format": FORMAT_VERSION, "variants": {}}
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT_VERSION:
            raise ValueError(f"format {content['format']}, not {FORMAT_VERSION}")
        for measured in content["variants"].values():
            dict(measured["conditions"])
            for times in measured["layers"].values():
                if not all(isinstance(ns, int) for ns in times.values()):
                    raise TypeError("times must be whole nanoseconds")
                if not times or not set(times) <= set(_LABELS):
                    raise ValueError(f"forms are {', '.join(_LABELS)}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged ({error}): delete it, or measure again with harness export --tune"
        ) from None
    result: dict[str, Any] = content
    return result

"""Rules about what a file asks of others: the harness's convention, the runtime's version.

Enters: the model. Leaves: findings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto

from export.graph import IMAGE, LOGITS
from export.lint_finding import Finding, label
from export.onnx_reader import opset_of

_CHANNELS = (1, 3, 4)
_OPSET_RUNTIMES = {
    7: "1.0", 8: "1.0", 9: "1.0", 10: "1.0", 11: "1.0", 12: "1.3", 13: "1.7", 14: "1.8",
    15: "1.9", 16: "1.11", 17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18",
    22: "1.21", 23: "1.22", 24: "1.24", 25: "1.24",
}  # fmt: skip
"""Opset -> the first onnxruntime that implements it."""
_IR_RUNTIMES = {8: "1.11", 9: "1.15", 10: "1.18", 11: "1.22", 12: "1.24", 13: "1.24"}
"""File-format version -> the first onnxruntime that reads it; all read 7 and below."""
_SUBGRAPHS = frozenset(("If", "Loop", "Scan"))
_RULE = "input_convention"
_REFUSED = "`harness attack-device` refuses it"


def input_convention(model: onnx.ModelProto) -> Iterator[Finding]:
    """Every way in which a file is not `image` uint8 [N, C, H, W] -> `logits` [N, classes]."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if len(inputs) == 1:
        yield from _image_findings(inputs[0])
    else:
        names = ", ".join(entry.name for entry in inputs) or "none"
        cost = f"{len(inputs)} inputs ({names}): one image is expected"
        yield _differs(names, cost, "turn what is no image into constants of the graph")
    if len(graph.output) == 1:
        yield from _logits_findings(graph.output[0])
    else:
        names = ", ".join(entry.name for entry in graph.output) or "none"
        cost = f"{len(graph.output)} outputs ({names}): one `{LOGITS}` is expected"
        yield _differs(names, cost, "keep the class scores only")


def newer_than_needed(model: onnx.ModelProto) -> Iterator[Finding]:
    """A declared version that shuts out runtimes which could run the same operators."""
    declared = opset_of(model)
    needed = 0
    for node in model.graph.node:
        if node.op_type in _SUBGRAPHS or node.domain not in ("", "ai.onnx"):
            continue  # what is inside, or whose versions, is not known here
        try:
            schema = onnx.defs.get_schema(node.op_type, declared, "")
        except onnx.defs.SchemaError:
            return
        needed = max(needed, schema.since_version)
    if not needed or any(node.op_type in _SUBGRAPHS for node in model.graph.node):
        return
    needed = max(needed, min(_OPSET_RUNTIMES))
    needed_ir = _min_ir(needed)
    now = _runtime(declared, model.ir_version)
    then = _runtime(min(needed, declared), min(needed_ir, model.ir_version))
    if now is None or then is None or _number(then) >= _number(now):
        return
    yield Finding(
        "newer_than_needed",
        "info",
        "",
        f"declares opset {declared}, IR {model.ir_version}: onnxruntime {now} or later; its"
        f" operators mean the same since opset {needed}: {then} would do",
        f"declare opset {needed} and IR {needed_ir} where old boards must run it",
        {"opset": declared, "opset_needed": needed, "ir": model.ir_version, "ir_needed": needed_ir},
    )


def unseen_subgraphs(model: onnx.ModelProto) -> Iterator[Finding]:
    """What these rules do not look into."""
    for node in model.graph.node:
        if node.op_type in _SUBGRAPHS:
            yield Finding(
                "not_checked",
                "info",
                label(node),
                f"the graphs inside {node.op_type} were not checked",
                "export without control flow where the model allows it",
            )


def _image_findings(entry: Any) -> Iterator[Finding]:
    tensor, where = entry.type.tensor_type, entry.name
    if where != IMAGE:
        yield _differs(where, f"the input is called {where!r}", f"call it {IMAGE!r}")
    if tensor.elem_type != TensorProto.UINT8:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        bigger = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8}
        times = bigger.get(tensor.elem_type)
        sent = f" and an image is {times} times the bytes" if times else ""
        yield _differs(
            where,
            f"the input is {kind}: scaling happens outside the file, where it can differ{sent}",
            "take uint8 pixels, and put Cast, the mean and the deviation into the graph",
        )
    dims = list(tensor.shape.dim)
    if len(dims) != 4:
        yield _differs(where, f"the input has {len(dims)} dimensions", "take [N, C, H, W]")
        return
    batch, *image = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    shown = ", ".join("?" if size is None else str(size) for size in (batch, *image))
    if batch is not None:
        slow = f"the batch is fixed at 1 in [{shown}]: images are judged one by one"
        yield Finding(
            _RULE,
            "warning",
            where,
            slow if batch == 1 else f"the batch is fixed at {batch} in [{shown}]: {_REFUSED}",
            "leave N open (dynamic_axes, dynamic_shapes)",
            {"batch": batch},
        )
    if image[2] in _CHANNELS and image[0] not in _CHANNELS:
        yield _differs(where, f"[{shown}] has channels last", "take [N, C, H, W]")
    elif None in image:
        yield _differs(where, f"[{shown}] leaves the image's size open", "fix C, H and W")


def _logits_findings(entry: Any) -> Iterator[Finding]:
    tensor, where = entry.type.tensor_type, entry.name
    if where != LOGITS:
        yield _differs(where, f"the output is called {where!r}", f"call it {LOGITS!r}")
    if tensor.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        yield _differs(where, f"the output is {kind}", "return float32")
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    if len(dims) != 2 or not dims[1]:
        shown = ", ".join("?" if size is None else str(size) for size in dims)
        yield _differs(where, f"the output is [{shown}]", "return [N, classes], classes fixed")


def _differs(where: str, cost: str, remedy: str) -> Finding:
    return Finding(_RULE, "warning", where, f"{cost}: {_REFUSED}", remedy)


def _min_ir(opset: int) -> int:
    return int(
        onnx.helper.find_min_ir_version_for(
            [onnx.helper.make_opsetid("", opset)], ignore_unknown=True
        )
    )


def _runtime(opset: int, ir_version: int) -> str | None:
    """The first onnxruntime that takes both; None for versions newer than this table."""
    if opset > max(_OPSET_RUNTIMES) or ir_version > max(_IR_RUNTIMES):
        return None
    needs = [_OPSET_RUNTIMES[max(opset, min(_OPSET_RUNTIMES))], _IR_RUNTIMES.get(ir_version, "1.0")]
    return max(needs, key=_number)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))

"""Whether an ONNX file may be sent to a device at all, decided on the workstation.

Enters: a path. Leaves: what the file takes and returns, or one UsageError. The file is read once,
and its sha256 comes from the same bytes that were checked: the runner loads only that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.records import UsageError

MAX_MODEL_BYTES = 512 << 20
"""Twelve times an fp32 ResNet-18: beyond it a file is a mistake, not a model for a small board."""


@dataclass(frozen=True)
class ModelFile:
    """An ONNX file that follows the harness's convention."""

    sha256: str
    classes: int
    image_shape: tuple[int, int, int]
    """(C, H, W)."""


def check_model_file(path: Path, *, max_bytes: int = MAX_MODEL_BYTES) -> ModelFile:
    """Check that `path` is an ONNX model that a device can run safely; external data stays unread.

    The convention: one input `image`, uint8 [N, C, H, W]; one output `logits`, float32
    [N, classes]; N dynamic or 1, the rest fixed; all weights inside the file.

    Raises:
        UsageError: missing, empty, too big, not ONNX, external data, or another convention.
    """
    content = _read(path, max_bytes=max_bytes)
    model = _parse(path, content)
    outside = next(_external_names(model), None)
    if outside is not None:
        raise UsageError(
            f"{path} keeps the tensor {outside!r} in another file (external data):"
            " save the model as a single file"
        )
    image_shape, classes = _convention(path, model.graph)
    return ModelFile(hashlib.sha256(content).hexdigest(), classes, image_shape)


def _read(path: Path, *, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UsageError(f"{path} has {size} bytes, the limit for a model is {max_bytes}")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the model {path}: {error.strerror or error}") from None
    if not content:
        raise UsageError(f"{path} is empty: export the model again")
    return content


def _parse(path: Path, content: bytes) -> Any:
    import onnx

    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's own DecodeError; its module has no types
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not an ONNX model, or is damaged: {reason}") from None
    if model.ir_version < 1 or not model.graph.node:
        raise UsageError(f"{path} is not an ONNX model: it has no graph")
    return model


def _external_names(message: Any) -> Iterator[str]:
    """Names of tensors kept in other files, wherever in the model: subgraphs, functions, ..."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        if message.data_location == message.EXTERNAL or message.external_data:
            yield message.name
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            # A repeated field has no DESCRIPTOR of a message.
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _external_names(part)


def _convention(path: Path, graph: Any) -> tuple[tuple[int, int, int], int]:
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer}  # listed as inputs before IR 4
    inputs = [value for value in graph.input if value.name not in weights]
    taken = [_signature(value) for value in inputs]
    given = [_signature(value) for value in graph.output]
    match taken:
        case [("image", TensorProto.UINT8, (batch, *image_shape))] if len(image_shape) == 3:
            pass
        case _:
            raise UsageError(
                f"{path} must take one input `image`, uint8 [N, C, H, W]; it takes"
                f" {_described(taken)}"
            )
    match given:
        case [("logits", TensorProto.FLOAT, (_, classes))]:
            pass
        case _:
            raise UsageError(
                f"{path} must return one output `logits`, float32 [N, classes]; it returns"
                f" {_described(given)}"
            )
    if batch not in (None, 1):
        raise UsageError(f"{path} has a fixed batch size of {batch}: export it with a dynamic one")
    channels, height, width = image_shape
    if not channels or not height or not width or not classes:
        raise UsageError(
            f"{path} must fix C, H, W and classes; it takes {_described(taken)} and returns"
            f" {_described(given)}"
        )
    return (channels, height, width), classes


Signature = tuple[str, int, tuple[int | None, ...] | None]
"""Name, element type, shape; an open dimension and an unknown shape are None."""


def _signature(value: Any) -> Signature:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return value.name, tensor.elem_type, None
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return value.name, tensor.elem_type, dims


def _described(signatures: list[Signature]) -> str:
    from onnx import TensorProto

    described = []
    for name, kind, shape in signatures:
        dims = ["?" if size is None else str(size) for size in shape or ()]
        kind_name = TensorProto.DataType.Name(kind).lower()
        described.append(f"`{name}` {kind_name} [{', '.join(dims)}]" if shape else f"`{name}`")
    return "; ".join(described) or "nothing"

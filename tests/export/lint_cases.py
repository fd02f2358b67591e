"""Hand-built ONNX models for the linter's tests, and models that this project did not make."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.lint import lint
from export.lint_finding import Finding

U8, S8, FLOAT = TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT
U8_ZERO, S8_ZERO = np.uint8(0), np.int8(0)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """Inputs in one string, separated by spaces; the node is called like its output."""
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, object] | None = None,
    *,
    kind: int = U8,
    shape: Sequence[int | str | None] = ("N", 3, 8, 8),
    name: str = "image",
    output: str = "logits",
    output_kind: int = FLOAT,
    output_shape: Sequence[int | str] | None = ("N", 10),
    opset: int = 13,
    ir_version: int = 7,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "case",
        [helper.make_tensor_value_info(name, kind, list(shape))],
        [helper.make_tensor_value_info(output, output_kind, output_shape)],
        [numpy_helper.from_array(np.asarray(v), key) for key, v in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def found(built: onnx.ModelProto, rule: str) -> list[Finding]:
    """The findings of one rule; the model itself is valid."""
    findings = lint(built)
    assert "invalid_model" not in {finding.rule for finding in findings}, findings
    return [finding for finding in findings if finding.rule == rule]


def one(built: onnx.ModelProto, rule: str) -> Finding:
    (finding,) = found(built, rule)
    assert finding.cost
    assert finding.remedy
    return finding


@cache
def torchvision_model(name: str, folder: Path, side: int = 64) -> Path:
    """An untrained torchvision model, exported by PyTorch itself."""
    import torch

    from harness.data.torchvision_shim import import_torchvision

    import_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    path = folder / f"{name}.onnx"
    axes = {"input": {0: "N"}, "output": {0: "N"}}
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript, which this project does not install.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            getattr(models, name)(weights=None).eval(),
            (torch.zeros(1, 3, side, side),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=axes,
        )
    return path


@cache
def quantised(source: Path, how: str, *, side: int = 64) -> Path:
    """`source` quantised by onnxruntime: qdq, qoperator, reduced or dynamic; int8 weights."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            images = rng.normal(size=(4, 1, 3, side, side)).astype(np.float32)
            self._left = iter([{"input": image} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    prepared = source.with_suffix(".prepared.onnx")
    if not prepared.exists():
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
    path = source.with_suffix(f".{how}.onnx")
    if how == "dynamic":
        quantize_dynamic(prepared, path, weight_type=QuantType.QInt8)
        return path
    quantize_static(
        prepared,
        path,
        Noise(),
        quant_format=QuantFormat.QOperator if how == "qoperator" else QuantFormat.QDQ,
        reduce_range=how == "reduced",
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path

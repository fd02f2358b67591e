"""onnxruntime's own static int8 quantisation of a float variant: what its users would do instead.

Enters: a folded float model, the trained model it came from, calibration images. Leaves:
`NAME.onnx` and `NAME.json`, as `export.exporter` writes them: opset 13, weights int8 a channel,
activations uint8, QuantizeLinear and DequantizeLinear around every operator, which onnxruntime
fuses to integer kernels.

Unlike every other export this one is not the model it came from: what it changes is measured and
written down, not refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import nn

from export.agreement import Agreement
from export.exporter import Exported, check_request, save_export
from export.float_graph import float_graph
from export.graph import IMAGE, NOMINAL_BITS, serialise
from export.runtime import DEFAULT_SETTINGS, Images, batches
from export.saturation import PAIR_LIMIT, Margin, margin_of
from export.verify import verify_float
from harness.models.folded import FoldedResNet
from harness.records import HarnessError

MIN_AGREEMENT = 0.5
"""Below it the file is broken, not merely coarse."""
_BATCH = 32
_BITS = (8, 8)
_LARGEST_ACTIVATION = 255
_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}
"""Batch norm is folded and shapes are known: tells the quantiser not to ask for it."""


def export_static_int8(
    model: FoldedResNet,
    reference: nn.Module,
    *,
    out: Path,
    calibration: Images,
    metadata: Mapping[str, str],
    classes: tuple[str, ...] = (),
) -> Exported:
    """Quantise, compare, and write `out` (.onnx) and its manifest (.json), or nothing.

    Args:
        model: the float model, batch norm folded.
        reference: the trained model that the file's predictions are compared with.
        out: the .onnx file; the manifest goes beside it.
        calibration: uint8 [N, C, H, W]: decides the ranges of activations, and is compared on.
        metadata: written into the file and the manifest.
        classes: class names, in the order of the logits; empty when unknown.

    Raises:
        HarnessError: the file predicts something else for half of the images, or cannot be
            written.
        ValueError: calibration images, file name, class names or metadata of the wrong form.
    """
    image_shape, properties = check_request(
        len(model.fc.bias), out=out, calibration=calibration, metadata=metadata, classes=classes
    )
    graph = float_graph(model, image_shape=image_shape, metadata={})
    content = quantise(graph, calibration, metadata=properties)
    agreement = verify_float(content, reference, calibration, settings=(DEFAULT_SETTINGS,))
    if agreement.argmax_agreement < MIN_AGREEMENT:
        raise HarnessError(
            f"export of {out.stem} refused, nothing written: quantised, it predicts as in PyTorch "
            f"on only {agreement.argmax_agreement:.1%} of {len(calibration):,} calibration images "
            f"(limit {MIN_AGREEMENT:.0%}): it needs more, or more typical, calibration images"
        )
    margins = int8_margins(content)
    return save_export(
        content,
        agreement,
        out=out,
        calibration=calibration,
        metadata=metadata,
        classes=classes,
        slimming=None,
        details={
            "exact": False,
            "saturation": [asdict(margin) for margin in margins],
            "notes": _notes(agreement, margins),
        },
    )


def quantise(model: onnx.ModelProto, calibration: Images, *, metadata: Mapping[str, str]) -> bytes:
    """The bytes of `model` quantised by onnxruntime; the same inputs give the same bytes.

    Args:
        model: float, input `image` uint8 [N, C, H, W].
        calibration: uint8 [N, C, H, W]; their smallest and largest activations are the ranges.
        metadata: written into the file.
    """
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    helper.set_model_props(prepared, _PREPARED)
    with tempfile.TemporaryDirectory(prefix="int8.") as folder, _quietly():
        path = Path(folder) / "quantised.onnx"
        quantize_static(
            prepared,
            path,
            _Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Percentiles and entropy, on two models of the digits: no better, twice as slow, and
            # every activation of every image in memory.
            calibrate_method=CalibrationMethod.MinMax,
            # Rounded to 8 bits, logits would tie.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        quantised = onnx.load(path)
    del quantised.graph.value_info[:]  # shapes that follow from the input's
    used = {node.domain for node in quantised.graph.node}
    imports = [entry for entry in quantised.opset_import if entry.domain in used]
    del quantised.opset_import[:]
    quantised.opset_import.extend(imports)
    bits = {n.name: _BITS for n in quantised.graph.node if n.op_type in ("Conv", "Gemm")}
    helper.set_model_props(
        quantised, dict(sorted({**metadata, NOMINAL_BITS: json.dumps(bits)}.items()))
    )
    onnx.checker.check_model(quantised, full_check=True)
    return serialise(quantised)


def int8_margins(content: bytes) -> tuple[Margin, ...]:
    """For every layer, how far uint8 activations times its int8 weights stay from saturation.

    An activation's zero point does not enter the products: any of 0 to 255 can meet a weight.
    """
    graph = onnx.load_model_from_string(content).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    quantised = {
        node.output[0]: stored[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    margins: list[Margin] = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weight = numpy_helper.to_array(quantised[node.input[1]]).astype(np.int64)
        margins.append(margin_of(node.name, weight, _LARGEST_ACTIVATION))
    return tuple(margins)


class _Calibration:
    """The images, batch by batch, as the quantiser asks for them."""

    def __init__(self, images: Images) -> None:
        self._batches: Iterator[Images] = batches(images, _BATCH)

    def get_next(self) -> dict[str, Any]:
        batch = next(self._batches, None)
        return {} if batch is None else {IMAGE: np.ascontiguousarray(batch)}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the quantiser from printing, and from configuring everybody's logging."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeHandler(silent)


def _notes(agreement: Agreement, margins: tuple[Margin, ...]) -> list[str]:
    """What a reader must know before trusting the file; a line each, short enough for a table."""
    notes = [
        f"not exact: weights and activations are rounded to 8 bits; on "
        f"{agreement.argmax_agreement:.1%} of {agreement.images:,} calibration images it predicts "
        "what PyTorch predicts before quantisation"
    ]
    saturating = [margin for margin in margins if margin.factor < 1]
    if saturating:
        worst = max(margin.worst_pair for margin in saturating)
        notes.append(
            f"{len(saturating)} of {len(margins)} layers can saturate on x86 with AVX2 but no VNNI "
            f"(pairs of products up to {worst:,} of {PAIR_LIMIT:,}): other processors may predict "
            "otherwise"
        )
    return notes

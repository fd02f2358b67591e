"""Proof that an ONNX file and a PyTorch model are the same function, on real images.

Enters: the bytes of a file, the PyTorch model it must equal, calibration images. Leaves: an
`Agreement` that says whether it does and why not. The only module of `export` that runs
onnxruntime.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, nn

from export.graph import IMAGE, LOGITS
from export.integer_graph import exposed_layers
from harness.models.integer import IntegerResNet, LevelTable
from harness.records import HarnessError

RELATIVE_TOLERANCE = 1e-4
"""Largest |logit difference| accepted, as a share of the largest |logit|."""
MIN_ARGMAX_AGREEMENT = 0.999
"""For float variants, and then only where every disagreement is a near-tie."""
_LOG_ERRORS_ONLY = 3
_NAMED_LAYERS = 3

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class RunSettings:
    """How onnxruntime is asked to run a model."""

    threads: int = 2
    optimise: bool = True
    """All graph optimisations, or none."""
    batch_size: int = 64


DEFAULT_SETTINGS = RunSettings()


@dataclass(frozen=True)
class Agreement:
    """What was compared, and what came out. Codes are None where the model has none."""

    images: int
    max_abs_error: float
    """Largest |logit difference|."""
    relative_error: float
    """The same divided by the largest |logit| of the PyTorch model."""
    argmax_agreement: float
    """Share of the images with the same prediction."""
    near_ties: int
    """Disagreements where PyTorch's two best logits differ by less than the tolerance."""
    codes_compared: int | None
    """Activations compared at the quantised layers: half-unit codes and levels each once."""
    code_mismatches: int | None
    runtime_version: str
    """Of onnxruntime."""
    passed: bool
    reason: str
    """Why it did not pass; empty when it did."""


def verify_float(
    model_bytes: bytes,
    reference: nn.Module,
    images: Images,
    *,
    settings: RunSettings = DEFAULT_SETTINGS,
) -> Agreement:
    """Compare a float export with the trained model it came from.

    Args:
        model_bytes: the ONNX file.
        reference: the original model: masked, with batch norm; evaluated as in `eval()`.
        images: uint8 [N, C, H, W].
        settings: of onnxruntime.

    Raises:
        HarnessError: onnxruntime cannot load or run the file.
    """
    session = open_session(model_bytes, settings)
    model = _on_cpu(reference)
    batches = list(_batches(images, settings))
    with torch.no_grad():
        logits_torch = np.concatenate([_forward(model, batch) for batch in batches])
    logits = run(session, images, settings)
    return _judge(logits_torch, logits, min_agreement=MIN_ARGMAX_AGREEMENT)


def verify_integer(
    model_bytes: bytes,
    twin: IntegerResNet,
    images: Images,
    *,
    settings: RunSettings = DEFAULT_SETTINGS,
) -> Agreement:
    """Compare an integer export with its twin: logits, and every code of every quantised layer.

    The codes are read from a temporary copy of the model with more outputs; the logits that are
    judged come from the file as it is.

    Raises:
        HarnessError: onnxruntime cannot load or run the file, or a quantised layer is not in it.
    """
    layers = exposed_layers(twin)
    tensors = list(dict.fromkeys(name for layer in layers for name in layer[1:]))
    shipped = open_session(model_bytes, settings)
    instrumented = open_session(_with_outputs(model_bytes, tensors), settings)
    model = _on_cpu(twin)
    mismatches = {layer.module: 0 for layer in layers}
    compared = 0
    logits_torch: list[Logits] = []
    for batch in _batches(images, settings):
        logits, captured = _forward_with_codes(model, batch)
        logits_torch.append(logits)
        exposed = dict(zip(tensors, _run(instrumented, batch, tensors), strict=True))
        for layer in layers:
            for expected, tensor in zip(captured[layer.module], layer[1:], strict=True):
                mismatches[layer.module] += _differences(expected, exposed[tensor])
                compared += expected.size
    return _judge(
        np.concatenate(logits_torch),
        run(shipped, images, settings),
        min_agreement=1.0,
        codes=(compared, mismatches),
    )


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
    options.log_severity_level = _LOG_ERRORS_ONLY
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
    parts = [_run(session, batch, [LOGITS])[0] for batch in _batches(images, settings)]
    return np.concatenate(parts)


def _run(session: onnxruntime.InferenceSession, images: Images, outputs: list[str]) -> Arrays:
    try:
        values: Arrays = session.run(outputs, {IMAGE: np.ascontiguousarray(images)})
    except Exception as error:  # onnxruntime's errors share no base class
        raise HarnessError(f"onnxruntime cannot run the model: {_line(error)}") from error
    return values


def _judge(
    expected: Logits,
    actual: Logits,
    *,
    min_agreement: float,
    codes: tuple[int, dict[str, int]] | None = None,
) -> Agreement:
    scale = float(np.abs(expected).max())
    with np.errstate(invalid="ignore"):  # inf - inf: the reasons below say it
        max_abs_error = float(np.abs(expected - actual).max())
    relative_error = max_abs_error / scale if scale > 0 else max_abs_error
    differ = expected.argmax(axis=1) != actual.argmax(axis=1)
    best_two = np.sort(expected, axis=1)[:, -2:]
    tied = best_two[:, -1] - best_two[:, 0] < RELATIVE_TOLERANCE * scale
    near_ties = int((differ & tied).sum())
    argmax_agreement = 1.0 - float(differ.mean())
    compared, mismatches = codes if codes is not None else (None, {})
    wrong = {name: count for name, count in mismatches.items() if count}
    reasons: list[str] = []
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        reasons.append("logits are not finite")
    elif relative_error > RELATIVE_TOLERANCE:
        reasons.append(
            f"logits differ by {relative_error:.1e} of the largest (limit {RELATIVE_TOLERANCE:g})"
        )
    if argmax_agreement < min_agreement:
        reasons.append(
            f"{int(differ.sum())} of {len(differ)} predictions differ "
            f"(agreement {argmax_agreement:.4f}, limit {min_agreement:g})"
        )
    if int(differ.sum()) > near_ties:
        reasons.append(f"{int(differ.sum()) - near_ties} of the differing predictions are no ties")
    if wrong:
        first = ", ".join(list(wrong)[:_NAMED_LAYERS])
        reasons.append(f"{sum(wrong.values())} codes differ, in {len(wrong)} layers from {first}")
    return Agreement(
        images=len(expected),
        max_abs_error=max_abs_error,
        relative_error=relative_error,
        argmax_agreement=argmax_agreement,
        near_ties=near_ties,
        codes_compared=compared,
        code_mismatches=sum(wrong.values()) if codes is not None else None,
        runtime_version=onnxruntime.__version__,
        passed=not reasons,
        reason="; ".join(reasons),
    )


def _differences(expected: npt.NDArray[np.uint8], actual: npt.NDArray[Any]) -> int:
    """How many elements differ; all of them when the shapes do."""
    if expected.shape != actual.shape:
        return expected.size
    return int(np.count_nonzero(expected != actual))


def _with_outputs(model_bytes: bytes, tensors: list[str]) -> bytes:
    model = onnx.load_model_from_string(model_bytes)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {info.name: info.type.tensor_type.elem_type for info in inferred}
    missing = [name for name in tensors if name not in types]
    if missing:
        raise HarnessError(f"the ONNX file has no tensor {missing[0]!r} to compare with the twin")
    model.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None) for name in tensors
    )
    content: bytes = model.SerializeToString()
    return content


def _forward_with_codes(
    model: nn.Module, images: Images
) -> tuple[Logits, dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]]:
    """Logits, and (codes, levels) of every `LevelTable` by its module name."""
    captured: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = {}

    def capture(name: str, _module: nn.Module, inputs: tuple[Tensor], levels: Tensor) -> None:
        codes = inputs[0].round().clamp(0, 255)
        captured[name] = (codes.byte().numpy(), levels.byte().numpy())

    hooks = [
        module.register_forward_hook(partial(capture, name))
        for name, module in model.named_modules()
        if isinstance(module, LevelTable)
    ]
    try:
        with torch.no_grad():
            logits = _forward(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, captured


def _forward(model: nn.Module, images: Images) -> Logits:
    logits: Logits = model(torch.from_numpy(np.ascontiguousarray(images)).float()).numpy()
    return logits


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU: a GPU's TF32 convolutions would fail any honest tolerance."""
    return copy.deepcopy(model).cpu().eval()


def _batches(images: Images, settings: RunSettings) -> Iterator[Images]:
    size = settings.batch_size
    return (images[start : start + size] for start in range(0, len(images), size))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

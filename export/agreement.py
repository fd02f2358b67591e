"""Whether two models agree: the record of a comparison, and the limits that decide.

Enters: logits of both sides and what was found layer by layer. Leaves: an `Agreement`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime

from export.runtime import Logits, RunSettings

RELATIVE_TOLERANCE = 1e-4
"""Largest |logit difference| accepted, as a share of the largest |logit|."""
NOT_COMPARABLE = 1e30
"""The error of a layer of another shape or without finite values: JSON has no infinity."""
_NAMED_LAYERS = 3


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the file beside the same layer in PyTorch, over all images and settings."""

    layer: str
    """The tensor's name in the file."""
    compared: int
    """Elements."""
    mismatches: int | None
    """Differing whole numbers; None for a float layer."""
    relative_error: float | None
    """Largest |difference| over the largest |value|; None for a quantised layer."""


@dataclass(frozen=True)
class Agreement:
    """What was compared, and what came out. Codes are None where the model has none."""

    images: int
    settings: tuple[RunSettings, ...]
    """How onnxruntime was asked; every image under every one of them."""
    max_abs_error: float
    """Largest |logit difference|."""
    relative_error: float
    """The same divided by the largest |logit| of the PyTorch model."""
    argmax_agreement: float
    """Share of the predictions that are the same."""
    near_ties: int
    """Disagreements where PyTorch's two best logits differ by less than the tolerance."""
    codes_compared: int | None
    """Activations compared at the quantised layers: half-unit codes and levels each once."""
    code_mismatches: int | None
    layers: tuple[LayerCheck, ...]
    runtime_version: str
    """Of onnxruntime."""
    passed: bool
    reason: str
    """Why it did not pass; empty when it did."""


def judge(
    expected: Logits,
    actual: Logits,
    *,
    layers: tuple[LayerCheck, ...],
    images: int,
    settings: tuple[RunSettings, ...],
    min_agreement: float,
) -> Agreement:
    """What the logits [N, classes] of PyTorch and of the file, and the layers, amount to."""
    scale = float(np.abs(expected).max())
    with np.errstate(invalid="ignore"):  # inf - inf: the reasons below say it
        max_abs_error = float(np.abs(expected - actual).max())
    relative_error = max_abs_error / scale if scale > 0 else max_abs_error
    differ = expected.argmax(axis=1) != actual.argmax(axis=1)
    best_two = np.sort(expected, axis=1)[:, -2:]
    tied = best_two[:, -1] - best_two[:, 0] < RELATIVE_TOLERANCE * scale
    near_ties = int((differ & tied).sum())
    argmax_agreement = 1.0 - float(differ.mean())
    quantised = [layer for layer in layers if layer.mismatches is not None]
    wrong = {layer.layer: layer.mismatches for layer in quantised if layer.mismatches}
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
    off = [
        layer
        for layer in layers
        if layer.relative_error is not None and not layer.relative_error <= RELATIVE_TOLERANCE
    ]
    if off:
        reasons.append(
            f"{len(off)} layers differ from PyTorch's, first {off[0].layer} "
            f"(by {off[0].relative_error:.1e} of the largest value, limit {RELATIVE_TOLERANCE:g})"
        )
    if wrong:
        first = ", ".join(list(wrong)[:_NAMED_LAYERS])
        reasons.append(f"{sum(wrong.values())} codes differ, in {len(wrong)} tensors from {first}")
    return Agreement(
        images=images,
        settings=settings,
        max_abs_error=max_abs_error,
        relative_error=relative_error,
        argmax_agreement=argmax_agreement,
        near_ties=near_ties,
        codes_compared=sum(layer.compared for layer in quantised) if quantised else None,
        code_mismatches=sum(wrong.values()) if quantised else None,
        layers=layers,
        runtime_version=onnxruntime.__version__,
        passed=not reasons,
        reason="; ".join(reasons),
    )

"""Proof that an ONNX file and a PyTorch model are the same function, on real images.

Enters: the bytes of a file, the PyTorch model it must equal, images. Leaves: an `Agreement` that
says whether it does, layer by layer, and why not. Onnxruntime is asked in several ways (threads,
batch, graph optimisations); all its answers must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from export.agreement import NOT_COMPARABLE, Agreement, LayerCheck, judge
from export.float_graph import exposed_blocks
from export.integer_graph import exposed_layers
from export.onnx_reader import load_model
from export.runtime import (
    DEFAULT_SETTINGS,
    Images,
    Logits,
    RunSettings,
    batches,
    open_session,
    run,
    run_outputs,
)
from harness.models.folded import FoldedResNet
from harness.models.integer import IntegerResNet
from harness.records import HarnessError

MIN_ARGMAX_AGREEMENT = 0.999
"""For float variants, and then only where every disagreement is a near-tie."""
_TORCH_BATCH = 128

Array = npt.NDArray[Any]
Progress = Callable[[int], None]
"""Images checked since the last call, counted once for every setting."""


def verify_float(
    model_bytes: bytes,
    reference: nn.Module,
    images: Images,
    *,
    deployed: FoldedResNet | None = None,
    settings: Sequence[RunSettings] = (DEFAULT_SETTINGS,),
    progress: Progress = lambda _images: None,
) -> Agreement:
    """Compare a float export with the trained model it came from.

    Args:
        model_bytes: the ONNX file.
        reference: the original model: masked, with batch norm; evaluated as in `eval()`.
        images: uint8 [N, C, H, W].
        deployed: the slimmed model the file was written from, to compare block by block.
        settings: of onnxruntime; all are tried.
        progress: told as images are checked.

    Raises:
        HarnessError: onnxruntime cannot load or run the file.
    """
    pairs = exposed_blocks(deployed) if deployed is not None else {}
    tensors = _Tensors(pairs, {}, _on_cpu(deployed) if deployed is not None else None)
    return _compare(
        model_bytes, _on_cpu(reference), images, tensors, settings, MIN_ARGMAX_AGREEMENT, progress
    )


def verify_integer(
    model_bytes: bytes,
    twin: IntegerResNet,
    images: Images,
    *,
    settings: Sequence[RunSettings] = (DEFAULT_SETTINGS,),
    progress: Progress = lambda _images: None,
) -> Agreement:
    """Compare an integer export with its twin: logits, and every code of every quantised layer.

    The codes are read from a temporary copy of the model with more outputs; the logits that are
    judged come from the file as it is.

    Raises:
        HarnessError: onnxruntime cannot load or run the file, or a quantised layer is not in it.
    """
    layers = exposed_layers(twin)
    codes = {layer.codes: layer.module for layer in layers}
    levels = {layer.levels: layer.module for layer in layers}
    model = _on_cpu(twin)
    return _compare(
        model_bytes, model, images, _Tensors(levels, codes, model), settings, 1.0, progress
    )


@dataclass(frozen=True)
class _Tensors:
    """Which tensors of the file are compared, each with a module of `model`."""

    outputs: dict[str, str]
    """Tensor -> the module whose output it is."""
    codes: dict[str, str]
    """Tensor -> the `LevelTable` whose rounded input it is."""
    model: nn.Module | None

    @property
    def names(self) -> list[str]:
        return [*self.codes, *self.outputs]

    def in_torch(self, images: Images) -> tuple[Logits | None, dict[str, Array]]:
        """(logits, every tensor by name) of `model`; (None, nothing) without one."""
        if self.model is None:
            return None, {}
        seen: dict[str, Array] = {}

        def keep(name: str, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            for tensor, module in self.outputs.items():
                if module == name:
                    seen[tensor] = output.numpy()
            for tensor, module in self.codes.items():
                if module == name:
                    seen[tensor] = inputs[0].round().clamp(0, 255).numpy()

        wanted = {*self.outputs.values(), *self.codes.values()}
        hooks = [
            module.register_forward_hook(partial(keep, name))
            for name, module in self.model.named_modules()
            if name in wanted
        ]
        try:
            logits = _forward(self.model, images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, seen


@dataclass
class _Tally:
    """Counts of one layer, as batches come in."""

    compared: int = 0
    mismatches: int = 0
    largest_difference: float = 0.0
    largest_value: float = 0.0

    def add(self, expected: Array, actual: Array) -> None:
        self.compared += expected.size
        if expected.shape != actual.shape:
            self.mismatches += expected.size
            self.largest_difference = float("inf")
            return
        self.mismatches += int(np.count_nonzero(expected != actual))
        with np.errstate(invalid="ignore"):  # inf - inf
            difference = float(np.abs(expected - actual.astype(expected.dtype)).max())
        # NaN compares with nothing: it must not look like agreement.
        difference = difference if np.isfinite(difference) else float("inf")
        self.largest_difference = max(self.largest_difference, difference)
        self.largest_value = max(self.largest_value, float(np.abs(expected).max()))


@dataclass
class _Answers:
    """Logits of both sides, a row for every image and setting."""

    torch: list[Logits] = field(default_factory=list)
    runtime: list[Logits] = field(default_factory=list)


def _compare(
    model_bytes: bytes,
    reference: nn.Module,
    images: Images,
    tensors: _Tensors,
    settings: Sequence[RunSettings],
    min_agreement: float,
    progress: Progress,
) -> Agreement:
    names = tensors.names
    instrumented_bytes = _with_outputs(model_bytes, names) if names else model_bytes
    opened: dict[tuple[int, bool], Any] = {}
    for how in settings:  # sessions do not depend on the batch
        key = (how.threads, how.optimise)
        if key not in opened:
            opened[key] = tuple(open_session(b, how) for b in (model_bytes, instrumented_bytes))
    tallies = {name: _Tally() for name in names}
    answers = _Answers()
    for batch in batches(images, _TORCH_BATCH):
        logits, expected = tensors.in_torch(batch)
        if logits is None or tensors.model is not reference:
            logits = _forward(reference, batch)
        for how in settings:
            shipped, instrumented = opened[how.threads, how.optimise]
            answers.torch.append(logits)
            answers.runtime.append(run(shipped, batch, how))
            if names:
                parts = [
                    run_outputs(instrumented, b, names) for b in batches(batch, how.batch_size)
                ]
                for name, values in zip(names, zip(*parts, strict=True), strict=True):
                    tallies[name].add(expected[name], np.concatenate(values))
            progress(len(batch))
    whole = isinstance(reference, IntegerResNet)
    layers = tuple(_layer_check(name, tally, whole=whole) for name, tally in tallies.items())
    return judge(
        np.concatenate(answers.torch),
        np.concatenate(answers.runtime),
        layers=layers,
        images=len(images),
        settings=tuple(settings),
        min_agreement=min_agreement,
    )


def _layer_check(name: str, tally: _Tally, *, whole: bool) -> LayerCheck:
    error = min(tally.largest_difference / (tally.largest_value or 1.0), NOT_COMPARABLE)
    return LayerCheck(
        name,
        tally.compared,
        mismatches=tally.mismatches if whole else None,
        relative_error=None if whole else error,
    )


def _with_outputs(model_bytes: bytes, tensors: list[str]) -> bytes:
    model = load_model(model_bytes)
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    except Exception as error:  # of C++, of many kinds
        raise HarnessError(f"shapes of the ONNX file cannot be inferred: {error}") from error
    types = {info.name: info.type.tensor_type.elem_type for info in inferred}
    missing = [name for name in tensors if name not in types]
    if missing:
        raise HarnessError(f"the ONNX file has no tensor {missing[0]!r} to compare with PyTorch")
    model.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None) for name in tensors
    )
    content: bytes = model.SerializeToString()
    return content


def _forward(model: nn.Module, images: Images) -> Logits:
    with torch.no_grad():
        logits: Logits = model(torch.from_numpy(np.ascontiguousarray(images)).float()).numpy()
    return logits


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU: a GPU's TF32 convolutions would fail any honest tolerance."""
    return copy.deepcopy(model).cpu().eval()

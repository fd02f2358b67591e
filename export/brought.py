"""A PyTorch model of the user's own to a verified file: PyTorch writes it, a comparison decides.

PyTorch has two exporters, and neither is good for every model. They are asked in turn; the first
file that is the same function as the model is taken, whoever wrote it, and none is where no file
is. `torch.export` needs the package onnxscript, and is not asked where that is not installed. Code
that makes a constant of the size of a batch, as `x.view(len(x), -1)` does for both, gets a file of
one image at a time, as devices run it. A trace that passed a Python decision on a tensor is taken
only where the other exporter has nothing better, and says so: a file has one side of a branch.

Enters: a model of pixels, float [N, C, H, W] in [0, 255], to logits; calibration images. Leaves:
`NAME.onnx`, uint8 pixels to logits, and `NAME.json`, as `export.exporter` writes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # public, not declared

from export.agreement import Agreement
from export.cost import cost_card, uncounted_operators
from export.exporter import EXPORT_SETTINGS, Exported, check_request, save_export
from export.graph import IMAGE, LOGITS, serialise
from export.onnx_reader import load_model
from export.runtime import Images
from export.verify import verify_float
from harness.records import CostCard, HarnessError, UsageError

OPSET = 17
"""Of the file, where the exporter can be told: onnxruntime 1.12 and later."""
EXAMPLES = 2
"""Images that the exporters see: the size of a batch of one would pass for a constant."""
MOST_COMPARED, MOST_ONE_BY_ONE = 512, 64
"""Images that are compared, in batches, and in batches of one, as they are deployed."""
_DECISION = re.compile("to a (Python (boolean|float|number|list)|NumPy array)")
"""In what tracing warns of where a value becomes a Python one that code can branch on."""
_REASON = 160
"""Characters of what an exporter said."""


def export_brought(
    model: nn.Module,
    *,
    out: Path,
    calibration: Images,
    classes: tuple[str, ...],
    metadata: Mapping[str, str],
) -> Exported:
    """Write `out` (.onnx) and its manifest (.json), or nothing.

    Args:
        model: on the CPU, in eval mode; float pixels [N, C, H, W] in [0, 255] -> logits.
        out: the .onnx file; the manifest goes beside it.
        calibration: uint8 [N, C, H, W], the images to compare on, `MOST_COMPARED` at most.
        classes: class names, in the order of the logits.
        metadata: written into the manifest; the file holds its digest.

    Raises:
        UsageError: no exporter takes the model, or no file is the same function: in one line, what
            each of them said first.
        HarnessError: the folder cannot be written.
        ValueError: calibration images, file name, class names or metadata of the wrong form.
    """
    images = calibration[:MOST_COMPARED]
    with torch.no_grad():
        logits = model(torch.from_numpy(images[:1].copy()).float()).shape[1]
    check_request(logits, out=out, calibration=images, metadata=metadata, classes=classes)
    # Of one length for all models: what a file weighs must not depend on what it is called.
    properties = {"origin": sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()}
    deployed = _Deployed(model).eval()
    refusals: dict[str, str] = {}
    decisions: tuple[str, ...] = ()
    doubtful: Callable[[], Exported] | None = None
    examples = torch.from_numpy(np.resize(images, (EXAMPLES, *images.shape[1:])))
    for name, write, batch in WAYS:
        try:
            with _quietly():
                written = write(deployed, examples[:batch], batch is None)
            decisions = decisions or written.decisions
            content = _tidied(written.content, properties)
            agreement = _compared(content, model, images, batch)
            cost = _counted(content, partial(write, deployed, examples[:1], False), images)
        except Exception as error:  # PyTorch's exporters raise whatever they come across
            refusals.setdefault(name, _one_line(error))
            continue
        if not agreement.passed:
            refusals.setdefault(name, f"not the same function, {agreement.reason}")
            continue
        save = partial(
            save_export,
            content,
            agreement,
            out=out,
            calibration=images[: agreement.images],
            metadata=metadata,
            classes=classes,
            slimming=None,
            details={
                "exporter": name,
                "batch": batch,
                "decided_on_tensors": written.decisions,
                "min_onnxruntime": None,
            },
            cost=cost,
        )
        if not written.decisions:
            return save()
        doubtful = doubtful or save
    if doubtful is not None:
        return doubtful()
    said = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    if decisions:
        said = (
            f"its code decides in Python on tensors ({', '.join(decisions)}), and a file has one "
            f"side of a branch: write torch.where; {said}"
        )
    raise UsageError(
        f"export of {out.stem} refused, no file written: {said} (a file of your own making can be "
        "attacked with --onnx)"
    )


class _Deployed(nn.Module):
    """uint8 [N, C, H, W] -> logits, as devices are asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image.float())
        return logits


@dataclass(frozen=True)
class Written:
    """An ONNX file, and where their code made Python decisions on tensors: `net.py:12`."""

    content: bytes
    decisions: tuple[str, ...] = ()


def _traced(model: nn.Module, example: Tensor, any_batch: bool) -> Written:
    """By the exporter that follows one call: quick, and what it writes old runtimes read."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TracerWarning)
        torch.onnx.export(
            model,
            (example,),
            buffer,  # type: ignore[arg-type]  # a file object is taken, and not declared
            dynamo=False,
            input_names=[IMAGE],
            output_names=[LOGITS],
            dynamic_axes={IMAGE: {0: "N"}, LOGITS: {0: "N"}} if any_batch else None,
            opset_version=OPSET,
        )
    decisions = dict.fromkeys(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in told
        if _DECISION.search(str(warning.message))
    )
    if decisions and _hangs_on_shapes_only(model, example):
        decisions = {}
    return Written(buffer.getvalue(), tuple(decisions))


def _hangs_on_shapes_only(model: nn.Module, example: Tensor) -> bool:
    """Whether no decision hangs on a value: to tracing a size is a value, too; capturing tells."""
    try:
        torch.export.export(model, (example,), strict=False)
    except Exception:  # it refuses what hangs on a value, in many ways
        return False
    return True


def _captured(model: nn.Module, example: Tensor, any_batch: bool) -> Written:
    """By the exporter that captures the program: for what the other has no operator."""
    if importlib.util.find_spec("onnxscript") is None:
        raise HarnessError("not tried, it needs onnxscript (pip install onnxscript)")
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=[IMAGE],
        output_names=[LOGITS],
        dynamic_shapes=({0: torch.export.Dim("N")},) if any_batch else None,
        verbose=False,
    )
    assert program is not None, "without a file name the program is returned"
    return Written(program.model_proto.SerializeToString())


FLAT = "of one colour"
ENLARGED_ROUNDING = 1e-2
"""Largest difference of logits, as a share of the largest, on images of one colour."""
Write = Callable[[nn.Module, Tensor, bool], Written]
"""(uint8 images -> logits, example, whether any number of images is to be taken) -> ONNX."""
WAYS: tuple[tuple[str, Write, int | None], ...] = (
    ("TorchScript", _traced, None),
    ("torch.export", _captured, None),
    ("TorchScript", _traced, 1),
    ("torch.export", _captured, 1),
)
"""(exporter, how, images that every call of the file has; None: any number), as they are tried."""


def _tidied(content: bytes, properties: Mapping[str, str]) -> bytes:
    """Without what is not of the function: where on this machine the code is, for one."""
    model = load_model(content)
    _strip(model)
    helper.set_model_props(model, dict(sorted(properties.items())))
    onnx.checker.check_model(model)
    return serialise(model)


def _strip(message: Any) -> None:
    """Clear descriptions and notes, wherever in the model: subgraphs, functions, values."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None and field.name != "initializer":
            # A repeated field has no ListFields of a message.
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _compared(content: bytes, model: nn.Module, images: Images, batch: int | None) -> Agreement:
    alone = tuple(replace(settings, batch_size=1) for settings in EXPORT_SETTINGS)
    few = images[:MOST_ONE_BY_ONE]
    found = verify_float(content, model, few, settings=alone)
    if not found.passed:
        return found
    ways = alone[:1] if batch is not None else EXPORT_SETTINGS
    for kind, images_unlike in _unlike(few).items():
        unlike = verify_float(content, model, images_unlike, settings=ways)
        if not unlike.passed and not (kind == FLAT and _rounded(unlike)):
            return replace(unlike, reason=f"on images unlike the data ({kind}), {unlike.reason}")
    if batch is not None:
        return found
    return verify_float(content, model, images, settings=EXPORT_SETTINGS)


def _rounded(found: Agreement) -> bool:
    """Whether what differs is rounding that a model enlarges.

    One that divides by an image's own deviation does so on an image of one colour, which has none;
    another side of a branch moves logits by much more.
    """
    return found.relative_error <= ENLARGED_ROUNDING and found.argmax_agreement == 1.0


def _unlike(images: Images) -> dict[str, Images]:
    """Images that take another side of a branch than the data does, by what they are."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, images.shape, dtype=np.uint8)
    colours = rng.integers(0, 256, (*images.shape[:2], 1, 1), dtype=np.uint8)
    flat = np.ascontiguousarray(np.broadcast_to(colours, images.shape))
    return {
        "brighter": 128 + images // 2,
        "darker": images // 2,
        "inverted": 255 - images,
        "noise": noise,
        FLAT: flat,
    }


def _counted(content: bytes, again: Callable[[], Written], images: Images) -> CostCard:
    """The file's cost; operators whose shapes it leaves open as they are in one for one image."""
    channels, height, width = images.shape[1:]
    cost = cost_card(content, image_shape=(channels, height, width))
    if not uncounted_operators(cost):
        return cost
    try:
        with _quietly():
            single = cost_card(again().content, image_shape=(channels, height, width))
    except Exception:  # the exporter's own; what was counted is said to be a lower bound
        return cost
    return replace(single, file_bytes=cost.file_bytes, gzip_bytes=cost.gzip_bytes)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' prints and warnings, which are about themselves, from the user."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that ONNX has no name for
    was = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(was)
        torch.backends.mha.set_fastpath_enabled(fast)


def _one_line(error: Exception) -> str:
    told = error.__cause__ or error  # torch.export wraps what went wrong in advice
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(told))
    words = " ".join(plain.split()) or type(told).__name__
    return words if len(words) <= _REASON else f"{words[:_REASON]}..."

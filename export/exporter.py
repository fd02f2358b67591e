"""From a trained variant to a verified file: slim, build the graph, compare, count, then save.

Enters: a folded or integer model, the model it must equal, calibration images. Leaves:
`NAME.onnx`, and `NAME.json`, its manifest: what the file is, costs, and was checked against.
The same inputs give the same bytes; there are no timestamps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from export.agreement import Agreement
from export.cost import cost_card
from export.float_graph import float_graph
from export.graph import NOMINAL_BITS, serialise
from export.integer_graph import integer_graph
from export.integer_layers import Kernel
from export.runtime import Images, RunSettings
from export.saturation import saturation_margins
from export.slim import SlimReport, slim
from export.verify import Progress, verify_float, verify_integer
from harness.artefacts import sha256_file, write_atomic
from harness.models.folded import FoldedResNet
from harness.models.integer import IntegerResNet
from harness.records import CostCard, HarnessError

FORMAT_VERSION = 1
"""Of the manifest."""
MIN_ONNXRUNTIME = "1.15.0"
"""The oldest that is tested (tests/export/test_oldest_runtime.py); opset 13 alone asks for less."""
_CLASSES = "classes"
_MANIFEST_KEYS = {"format", "sha256", "cost", "metadata"}
_IMAGE_DIMS = 4
EXPORT_SETTINGS = (RunSettings(), RunSettings(threads=1, optimise=False, batch_size=128))
"""What every file is checked under before it is written; `harness export --verify` tries more."""


@dataclass(frozen=True)
class Exported:
    """One exported variant, as it lies on disk."""

    path: Path
    manifest_path: Path
    sha256: str
    """Of the ONNX file."""
    cost: CostCard
    agreement: Agreement
    slimming: SlimReport | None
    """None for integer models: they are not slimmed."""
    manifest: dict[str, Any]


def export_model(
    model: FoldedResNet | IntegerResNet,
    reference: nn.Module,
    *,
    out: Path,
    calibration: Images,
    metadata: Mapping[str, str],
    classes: tuple[str, ...] = (),
    align: int = 1,
    packed: bool = True,
    kernels: Mapping[str, Kernel] | None = None,
    progress: Progress = lambda _images: None,
) -> Exported:
    """Write `out` (.onnx) and its manifest (.json), or nothing.

    Args:
        model: the deployed form; a float one is slimmed here.
        reference: what it must equal. For a float model the trained `ResNet` itself, masked and
            with batch norm; for an integer model the twin.
        out: the .onnx file; the manifest goes beside it.
        calibration: uint8 [N, C, H, W], the images to compare on.
        metadata: written into the file and the manifest (variant, data set, seed, ...).
        classes: class names, in the order of the logits; empty when unknown.
        align: round slimmed widths up to a multiple of this.
        packed: store an integer model's weights several to a code (`export.packing`).
        kernels: an integer model's layer name -> the form of its convolution.
        progress: told as images are compared, each once for every one of `EXPORT_SETTINGS`.

    Raises:
        HarnessError: the file would not agree with `reference`, or cannot be written.
        TypeError: an integer model with a reference that is not one.
        ValueError: calibration images, file name, class names or metadata of the wrong form, or a
            mask that cannot be exported.
    """
    image_shape, properties = check_request(
        len(model.fc.bias), out=out, calibration=calibration, metadata=metadata, classes=classes
    )
    slimming: SlimReport | None = None
    margins: list[dict[str, Any]] | None = None
    widths: dict[str, dict[str, int]] | None = None
    if isinstance(model, IntegerResNet):
        if not isinstance(reference, IntegerResNet):
            raise TypeError("an integer export is compared with its integer twin")
        graph = integer_graph(
            model, image_shape=image_shape, metadata=properties, packed=packed, kernels=kernels
        )
        content = serialise(graph)
        agreement = verify_integer(
            content, reference, calibration, settings=EXPORT_SETTINGS, progress=progress
        )
        margins = [asdict(margin) for margin in saturation_margins(model)]
    else:
        widths = _other_widths(model, image_shape)
        model, slimming = slim(model, align=align)
        content = serialise(float_graph(model, image_shape=image_shape, metadata=properties))
        agreement = verify_float(
            content,
            reference,
            calibration,
            deployed=model,
            settings=EXPORT_SETTINGS,
            progress=progress,
        )
    if not agreement.passed:
        raise HarnessError(
            f"export of {out.stem} refused, nothing written: it is not the PyTorch model: "
            f"{agreement.reason}"
        )
    return save_export(
        content,
        agreement,
        out=out,
        calibration=calibration,
        metadata=metadata,
        classes=classes,
        slimming=slimming,
        details={
            "saturation": margins,
            "other_widths": widths,
            "packed": packed and margins is not None,
            "tuned_kernels": dict(kernels or {}),
        },
    )


def _other_widths(
    model: FoldedResNet, image_shape: tuple[int, int, int]
) -> dict[str, dict[str, int]]:
    """What the model would cost as trained, and slimmed as far as is exact, whatever `align` is."""
    forms = {"as_trained": model, "exact": slim(model, align=1)[0]}
    costs: dict[str, dict[str, int]] = {}
    for name, form in forms.items():
        content = serialise(float_graph(form, image_shape=image_shape, metadata={}))
        card = cost_card(content, image_shape=image_shape)
        costs[name] = {"macs": card.macs, "params": card.params, "file_bytes": card.file_bytes}
    return costs


def check_request(
    logits: int,
    *,
    out: Path,
    calibration: Images,
    metadata: Mapping[str, str],
    classes: tuple[str, ...],
) -> tuple[tuple[int, int, int], dict[str, str]]:
    """((C, H, W) of the images, the properties the file will hold) of a request that makes sense.

    Args:
        logits: how many the model returns for an image.
        out: as `export_model` has it; so are the others.
        calibration: uint8 [N, C, H, W].
        metadata: of the file.
        classes: names, as many as logits, or none.

    Raises:
        ValueError: calibration images, file name, class names or metadata of the wrong form.
    """
    if calibration.dtype.name != "uint8" or calibration.ndim != _IMAGE_DIMS or not len(calibration):
        raise ValueError(
            f"calibration must be uint8 [N, C, H, W], not {calibration.dtype} {calibration.shape}"
        )
    if out.suffix != ".onnx":
        raise ValueError(f"the exported file must be called *.onnx, not {out.name}")
    channels, height, width = calibration.shape[1:]
    properties = dict(metadata)
    _check_classes(logits, classes, properties)
    if classes:
        properties[_CLASSES] = json.dumps(classes, ensure_ascii=False)
    return (channels, height, width), properties


def save_export(
    content: bytes,
    agreement: Agreement,
    *,
    out: Path,
    calibration: Images,
    metadata: Mapping[str, str],
    classes: tuple[str, ...],
    slimming: SlimReport | None,
    details: Mapping[str, Any],
    cost: CostCard | None = None,
) -> Exported:
    """Count a finished file, then write it and its manifest.

    Args:
        content: the ONNX file's bytes.
        agreement: what comparing it with PyTorch on `calibration` gave.
        out: the .onnx file; the manifest goes beside it.
        calibration: uint8 [N, C, H, W], the images it was compared on.
        metadata: as the file holds it.
        classes: class names, in the order of the logits.
        slimming: what was removed; None where nothing is slimmed.
        details: what else the manifest says.
        cost: of the file, where it was counted already.

    Raises:
        HarnessError: the folder cannot be written.
    """
    channels, height, width = calibration.shape[1:]
    image_shape = (channels, height, width)
    cost = cost or cost_card(content, image_shape=image_shape)
    sha256 = hashlib.sha256(content).hexdigest()
    exact = details.get("exact", True)
    manifest = {
        "min_onnxruntime": MIN_ONNXRUNTIME if exact else None,
        **details,
        "format": FORMAT_VERSION,
        "sha256": sha256,
        "metadata": dict(metadata),
        "classes": list(classes),
        "input": {
            "name": "image",
            "dtype": "uint8",
            "shape": [details.get("batch") or "N", *image_shape],
        },
        "cost": asdict(cost),
        "slimming": None if slimming is None else asdict(slimming),
        "agreement": asdict(agreement),
        "agreement_images_sha256": hashlib.sha256(calibration.tobytes()).hexdigest(),
        "min_opset": cost.opset,
        "checked_with": {"onnxruntime": agreement.runtime_version},
        NOMINAL_BITS: {
            layer["name"]: layer["bits_nominal"]
            for layer in cost.layers
            if "bits_nominal" in layer  # what cannot be counted has none
        },
    }
    text = _as_text(manifest)
    manifest_path = out.with_suffix(".json")
    # Model first: interrupted in between, the old manifest no longer matches and is refused.
    write_atomic(out, content)
    write_atomic(manifest_path, text)
    loaded: dict[str, Any] = json.loads(text)  # exactly what a later reader will see
    return Exported(out, manifest_path, sha256, cost, agreement, slimming, loaded)


def _as_text(manifest: Mapping[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _check_classes(logits: int, classes: tuple[str, ...], properties: Mapping[str, str]) -> None:
    if classes and len(classes) != logits:
        raise ValueError(f"{len(classes)} class names for a model of {logits} classes")
    if _CLASSES in properties:
        raise ValueError(f"metadata key {_CLASSES!r} is reserved: pass `classes`")


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an exported model; `path` is the .onnx file or the .json beside it.

    Raises:
        HarnessError: missing, corrupt, of another format, or not that of the .onnx file there.
    """
    manifest_path, model_path = path.with_suffix(".json"), path.with_suffix(".onnx")
    again = "export the variant again"
    try:
        manifest = json.loads(manifest_path.read_bytes())
    except OSError as error:
        raise HarnessError(f"cannot read {manifest_path} ({error.strerror}): {again}") from error
    except ValueError as error:
        raise HarnessError(f"{manifest_path} is not a manifest ({error}): {again}") from error
    if not isinstance(manifest, dict) or not manifest.keys() >= _MANIFEST_KEYS:
        raise HarnessError(f"{manifest_path} is not a manifest of an exported model: {again}")
    if manifest["format"] != FORMAT_VERSION:
        raise HarnessError(
            f"{manifest_path} has format {manifest['format']}, this version reads "
            f"{FORMAT_VERSION}: {again}"
        )
    try:
        sha256 = sha256_file(model_path)
    except OSError as error:
        raise HarnessError(f"cannot read {model_path} ({error.strerror}): {again}") from error
    if sha256 != manifest["sha256"]:
        raise HarnessError(f"{model_path} is not the file that {manifest_path} describes: {again}")
    return manifest


def add_memory(path: Path, *, load_bytes: int | None, peak_bytes: int | None, runtime: str) -> None:
    """State in the manifest what running the file takes: the cost card's measured part.

    Args:
        path: the .onnx file.
        load_bytes: resident memory of a process of its own, with the model loaded.
        peak_bytes: its highest resident memory up to the first inference, batch 1.
        runtime: version of onnxruntime it was measured with.

    Raises:
        HarnessError: the manifest cannot be read or written.
    """
    manifest = load_manifest(path)
    memory = {"rss_load_bytes": load_bytes, "rss_peak_bytes": peak_bytes, "onnxruntime": runtime}
    write_atomic(path.with_suffix(".json"), _as_text({**manifest, "memory": memory}))


def manifest_cost(manifest: Mapping[str, Any]) -> CostCard:
    """The cost card inside a manifest.

    Raises:
        HarnessError: its fields are not those of a cost card.
    """
    try:
        fields = dict(manifest["cost"])
        return CostCard(**{**fields, "layers": tuple(fields["layers"])})
    except (KeyError, TypeError, ValueError) as error:
        raise HarnessError(f"the manifest holds no valid cost card ({error!r})") from error

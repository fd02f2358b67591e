"""The perturbations as pictures: what was added, and what the device then saw.

Enters: a `View`. Leaves: PNG data URIs with captions, one strip per source.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.metrics import UNSEEN
from harness.records import CONTROLS, EvaluationSet, ResultRow, UapRecord
from harness.sources import FLEET
from reports.view import View
from reports.words import clean_text, label_of, paper_rank

Pixels = npt.NDArray[np.uint8]
MAX_EXAMPLES = 6
MAX_SIDE = 64
"""Larger images are shown at every k-th pixel, to keep the page small."""


@dataclass(frozen=True)
class Picture:
    """An image and the words under it."""

    uri: str
    alt: str
    caption: str
    wrong: bool = False


@dataclass(frozen=True)
class Strip:
    """One source: its perturbation, then the example images under it."""

    label: str
    delta: Picture
    attacked: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
    """All strips; `problem` says in a sentence why there is none."""

    clean: tuple[Picture, ...] = ()
    strips: tuple[Strip, ...] = ()
    stride: int = 1
    problem: str = ""


def gallery(view: View) -> Gallery:
    """The perturbations at the reference eps, beside clean and attacked examples."""
    sources = {
        row.uap_source: view.uaps[row.uap_sha256]
        for variant in view.variants
        for row in variant.attacked.values()
        if row.uap_source is not None and row.uap_sha256 in view.uaps
    }
    if not sources:
        return Gallery(problem="No untargeted perturbation is in the store, so none is shown.")
    images = example_images(view.evaluation)
    chosen = _distinct(view.evaluation, 0 if images is None else len(images))
    stride = max(1, -(-max(view.evaluation.image_shape[1:]) // MAX_SIDE))
    strips = []
    for source in sorted(sources, key=paper_rank):
        delta = delta_of(sources[source])
        if delta is None:
            continue
        under = _shown_run(view, source)
        # Devices get whole levels within the budget, also where eps is not whole.
        limit = math.floor(sources[source].eps) / 255
        deployed = np.clip(delta, -limit, limit)
        strips.append(
            Strip(
                label=label_of(source),
                delta=Picture(
                    _uri(_visible(delta, sources[source].eps), stride),
                    f"perturbation crafted on {label_of(source)}, scaled for view",
                    "perturbation",
                ),
                attacked=tuple(
                    _attacked(view, under, images[i], deployed, i, stride)
                    for i in chosen
                    if images is not None and images.shape[1:] == delta.shape
                ),
            )
        )
    if not strips:
        return Gallery(problem="The perturbations in the store are not images that can be shown.")
    clean = []
    if images is not None:
        for i in chosen:
            name = _class(view, view.evaluation.labels[i])
            clean.append(Picture(_uri(images[i], stride), f"clean image of class {name}", name))
    return Gallery(clean=tuple(clean), strips=tuple(strips), stride=stride)


def attacked_image(image: Pixels, delta: npt.NDArray[np.float32]) -> Pixels:
    """What the device receives: clip(x + rint(255 delta), 0, 255), uint8 [C, H, W]."""
    moved = image.astype(np.int64) + np.rint(255 * delta.astype(np.float64)).astype(np.int64)
    return np.clip(moved, 0, 255).astype(np.uint8)


def example_images(evaluation: EvaluationSet) -> Pixels | None:
    """uint8 [E, C, H, W], or None where there are none or their size does not fit the shape."""
    shape = evaluation.image_shape
    each = shape[0] * shape[1] * shape[2]
    if shape[0] not in (1, 3) or each <= 0 or not evaluation.examples:
        return None
    if len(evaluation.examples) % each:
        return None
    images = np.frombuffer(evaluation.examples, dtype=np.uint8).reshape(-1, *shape)
    shown: Pixels = images[: len(evaluation.labels)]
    return shown


def delta_of(uap: UapRecord) -> npt.NDArray[np.float32] | None:
    """float32 [C, H, W], or None where the bytes do not fit the shape or are not finite."""
    channels, height, width = uap.shape
    if channels not in (1, 3) or len(uap.delta) != 4 * channels * height * width or not uap.delta:
        return None
    delta = np.frombuffer(uap.delta, dtype="<f4").reshape(uap.shape).astype(np.float32)
    return delta if bool(np.isfinite(delta).all()) else None


def _attacked(
    view: View,
    row: ResultRow | None,
    image: Pixels,
    delta: npt.NDArray[np.float32],
    index: int,
    stride: int,
) -> Picture:
    seen, wrong = "", False
    predicted = view.predictions(row) if row is not None else None
    if predicted is not None and index < predicted.size and predicted[index] != UNSEEN:
        seen = _class(view, int(predicted[index]))
        wrong = int(predicted[index]) != view.evaluation.labels[index]
    alt = "the same image under the perturbation" + (f", predicted {seen}" if seen else "")
    return Picture(_uri(attacked_image(image, delta), stride), alt, seen, wrong)


def _shown_run(view: View, source: str) -> ResultRow | None:
    """Whose predictions stand under the pictures: the source's own; else the baseline's."""
    name = view.baseline_name if source in (FLEET, *CONTROLS) else source
    victim = next((v for v in view.variants if v.name == name), None)
    return victim.attacked.get(source) if victim else None


def _distinct(evaluation: EvaluationSet, available: int) -> list[int]:
    """Up to `MAX_EXAMPLES` images, of different classes as far as there are."""
    first: dict[int, int] = {}
    for i in range(available):
        first.setdefault(evaluation.labels[i], i)
    chosen = list(first.values())[:MAX_EXAMPLES]
    rest = [i for i in range(available) if i not in chosen]
    return sorted(chosen + rest[: max(0, MAX_EXAMPLES - len(chosen))])


def _class(view: View, index: int) -> str:
    classes = view.evaluation.classes
    return clean_text(classes[index] if index < len(classes) else str(index), 14)


def _visible(delta: npt.NDArray[np.float32], eps: float) -> Pixels:
    """-eps black, 0 grey, +eps white, each channel by itself."""
    span = max(eps / 255, float(np.abs(delta).max()), 1e-6)
    visible: Pixels = np.rint(127.5 + 127.5 * delta / span).astype(np.uint8)
    return visible


def _uri(image: Pixels, stride: int) -> str:
    pixels = np.moveaxis(image[:, ::stride, ::stride], 0, -1)  # [H, W, C]
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}
    imsave(buffer, np.ascontiguousarray(pixels), format="png", metadata=nothing)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

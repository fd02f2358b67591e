"""Whether a model that a user brought can be attacked on these images, and is read as it expects.

Enters: a `BroughtModel`, uint8 images with labels. Leaves: one error naming what is in the way, a
digest of what the model is, warnings.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from harness.data.splits import Split
from harness.inference import predict
from harness.metrics import wilson
from harness.models.brought import BroughtModel, Convention, theirs
from harness.records import UsageError

PROBES = 4
CHECKED_IMAGES = 256
"""Evaluation images that tell whether the model classifies at all."""
GOOD_ACCURACY = 0.9
"""From here on no other convention is tried."""
BETTER = 0.05
"""By how much another convention must be more accurate before it is named."""
CLOSE = 0.02
FAR_BETTER, ENOUGH_A_CLASS = 0.2, 5
"""Before another order of classes is named: how much better it is, by how many images a class."""
MOST_NAMED = 6
GUESS = ", not shown to be better than a guess"
SAME = 1e-3
"""Of the largest logit: how much a model may differ from itself by rounding."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def check_attackable(model: BroughtModel, images: np.ndarray, *, classes: int, what: str) -> str:
    """Run the model on a few images and differentiate it; then it can be attacked.

    Args:
        model: on the CPU.
        images: uint8 [N, C, H, W], of which a few are used.
        classes: how many the data has.
        what: how the model is called in errors.

    Returns:
        Digest of what the model computes: its weights, its classes, its logits on those images, as
        they are and disturbed.

    Raises:
        UsageError: it does not take these images, returns no logits [N, classes] of floats, is
            random, mixes the images of a batch, or has no gradient with respect to its input.
    """
    shape = list(images.shape[1:])
    pixels = torch.from_numpy(images[:PROBES].copy()).float()
    if len(pixels) == 1:
        pixels = pixels.repeat(2, 1, 1, 1)
    doing = f"{what}: its model, given float32 images [{len(pixels)}, {_listed(shape)}],"
    with theirs(doing), torch.no_grad():
        logits: object = model(pixels)
        again: object = model(pixels)
    if not isinstance(logits, Tensor) or not isinstance(again, Tensor):
        raise UsageError(
            f"{what}: its model returns a {type(logits).__name__}, not a tensor of logits: let the "
            "function return a module that does"
        )
    if logits.ndim != 2 or len(logits) != len(pixels) or not logits.is_floating_point():
        raise UsageError(
            f"{what}: its model returns {_kind(logits)} [{_listed(logits.shape)}] for "
            f"{len(pixels)} images; it must return float logits [N, classes]"
        )
    if logits.shape[1] != classes:
        raise UsageError(
            f"{what}: its model has {logits.shape[1]} classes; the data set has {classes} (name "
            "yours with --dataset)"
        )
    if not bool(torch.isfinite(logits).all()):
        raise UsageError(f"{what}: its model returns logits that are not finite")
    tolerance = SAME * float(logits.abs().max()) + 1e-6
    if float((again - logits).abs().max()) > tolerance:
        raise UsageError(
            f"{what}: its model answers the same images differently every time, in eval mode: "
            "switch its randomness off (functional dropout needs training=self.training)"
        )
    with theirs(doing), torch.no_grad():
        alone = torch.cat([model(one) for one in pixels.split(1)])
    if alone.shape != logits.shape or float((alone - logits).abs().max()) > tolerance:
        raise UsageError(
            f"{what}: what its model says of an image depends on the other images of the batch "
            "(batch norm without running statistics?): no perturbation can be universal to it"
        )
    _check_gradient(model, pixels, what=what, doing=doing)
    with theirs(doing), torch.no_grad():
        probed = model(_probes(pixels))
    return _digest(model, probed)


def _probes(pixels: Tensor) -> Tensor:
    """The images, the same as an attack would leave them, and what no image is."""
    signs = torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    disturbed = [(pixels + eps * signs).clamp(0, 255) for eps in (4, 16)]
    extremes = [torch.full_like(pixels[:1], value) for value in (0.0, 255.0)]
    return torch.cat([pixels, *disturbed, *extremes])


def _check_gradient(model: BroughtModel, pixels: Tensor, *, what: str, doing: str) -> None:
    leaf = pixels.clone().requires_grad_()
    with theirs(doing):
        logits = model(leaf)
    gradient: Tensor | None = None
    if logits.requires_grad:
        weights = torch.linspace(-1.0, 1.0, logits.numel()).view_as(logits)
        with theirs(f"{what}: differentiating its model"):
            (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise UsageError(
            f"{what}: no gradient reaches the input of its model (no_grad, detach, argmax or "
            "rounding in its forward; or images read otherwise than it was trained to, see --mean, "
            "--std and --input-range), and the attack needs one"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise UsageError(f"{what}: the gradient of its model is not finite")


def _digest(model: BroughtModel, logits: Tensor) -> str:
    digest = hashlib.sha256(f"{model.input_range}".encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(
                value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
    # And the code: the text of its classes, and what it computes, two digits of the logits. What an
    # edit elsewhere moves by less goes unnoticed; rounding that moves one across a half, as on
    # another processor, costs everything of this model once more.
    for text in sorted({_source(type(module)) for module in model.network.modules()}):
        digest.update(text.encode())
    logits = logits.nan_to_num()
    scaled = (logits / (logits.abs().max() + 1e-12) * 100).round().to(torch.int16)
    digest.update(scaled.numpy().tobytes())
    return digest.hexdigest()


def _source(kind: type[nn.Module]) -> str:
    """The text of a class; of a library's, and where there is none, its name."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name.startswith(("torch.", "torchvision.")):
        return name
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return name


@dataclass(frozen=True)
class Reading:
    """How well a model classifies clean images, and what its user should hear about that."""

    accuracy: float
    warning: str
    """One line, or empty."""


def read_accuracy(
    model: BroughtModel,
    convention: Convention,
    evaluation: Split,
    *,
    names: tuple[str, ...],
    own_statistics: tuple[tuple[float, ...], tuple[float, ...]],
    device: torch.device,
) -> Reading:
    """Clean accuracy on some evaluation images; a convention that reads them better is named.

    Args:
        model: on `device`.
        convention: what it was made with.
        evaluation: images and labels.
        names: of the classes, in the order of the logits.
        own_statistics: mean and standard deviation of each channel of the data, in [0, 1].
        device: where to run.
    """
    chosen = np.unique(
        np.linspace(0, len(evaluation) - 1, min(CHECKED_IMAGES, len(evaluation))).astype(int)
    )
    images, labels = evaluation.images[chosen], evaluation.labels[chosen]

    def predicted(of: BroughtModel) -> np.ndarray:
        return predict(of, images, None, device=device, batch_size=64)

    n, said, classes = len(labels), predicted(model), len(names)
    right = int((said == labels).sum())
    accuracy = right / n
    if accuracy >= GOOD_ACCURACY:
        return Reading(accuracy, "")
    best, better = right, None
    for other in _conventions(images.shape[1], own_statistics):
        if other != convention:
            tried = int((predicted(BroughtModel(model.network, other).to(device)) == labels).sum())
            # A later one is less usual: it must do better by more than luck.
            if tried > best + (0 if better is None else CLOSE * n):
                best, better = tried, other
    share = float(np.bincount(labels, minlength=classes).max()) / n
    at_chance = wilson(right, n)[0] <= max(share, 1 / classes)
    found = f"clean accuracy is {accuracy:.1%} on {n} evaluation images"
    if (order := _other_order(said, labels, names)) and best < order[0]:
        return Reading(
            accuracy,
            f"warning: {found}; the classes are likely in another order: logits stand for "
            f"{_shortened(names)}, and with {order[1]} it is {order[0] / n:.1%}",
        )
    if better is not None and wilson(best, n)[0] > max(accuracy + BETTER, share):
        return Reading(
            accuracy,
            f"warning: {found}{GUESS if at_chance else ''}; the convention is likely "
            f"wrong: with {better.options()} it is {best / n:.1%}",
        )
    if at_chance:
        return Reading(
            accuracy,
            f"warning: {found}{GUESS}, and no convention tried does better: check the "
            "checkpoint, the order of classes and channels, and --input-range, --mean and --std",
        )
    return Reading(accuracy, "")


def _other_order(
    said: np.ndarray, labels: np.ndarray, names: tuple[str, ...]
) -> tuple[int, str] | None:
    """(how many are right, the change) of the best other order of the logits; None: none is.

    An order that is chosen for these images does better on them by luck: it must do so by much.
    """
    n, classes = len(labels), len(names)
    if n < ENOUGH_A_CLASS * classes:
        return None
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (said, labels), 1)
    logits, meant = linear_sum_assignment(-confusion)
    right, before = int(confusion[logits, meant].sum()), int(np.trace(confusion))
    if wilson(right, n)[0] <= before / n + FAR_BETTER:
        return None
    moved = [(i, j) for i, j in zip(logits, meant, strict=True) if i != j]
    change = ", ".join(f"logit {i} as {names[j]}" for i, j in moved[:MOST_NAMED])
    return right, change + (", ..." if len(moved) > MOST_NAMED else "")


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def _conventions(
    channels: int, own: tuple[tuple[float, ...], tuple[float, ...]]
) -> list[Convention]:
    """What people really have, the simplest first."""
    found = [
        Convention(1),
        Convention(255),
        Convention(1, (0.5,), (0.5,)),
        Convention(1, *own),
        Convention(255, tuple(255 * v for v in own[0])),
    ]
    return [*found, Convention(1, *IMAGENET)] if channels == 3 else found


def _listed(sizes: object) -> str:
    assert isinstance(sizes, list | torch.Size)
    return ", ".join(map(str, sizes))


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

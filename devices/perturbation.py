"""The 8-bit rule: what a device receives under attack is a real image, not a float tensor.

Enters: uint8 images and a perturbation in 1/255 units. Leaves: uint8 images. DESIGN section 4:
clip(round(x + 255 * delta), 0, 255). The runner applies the same rule on the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harness.records import UsageError

Images = npt.NDArray[np.uint8]
Delta255 = npt.NDArray[np.int16]

MAX_DELTA_255 = 255


def perturb(images: Images, delta_255: npt.NDArray[np.integer]) -> Images:
    """The attacked images: clip(x + delta, 0, 255).

    Args:
        images: uint8 [N, C, H, W].
        delta_255: integers [C, H, W] in 1/255 units, within [-255, 255].

    Raises:
        UsageError: a dtype, shape or range that is not the above.
    """
    images = checked_images(images)
    delta = checked_delta(delta_255, image_shape=images.shape[1:])
    attacked: Images = np.clip(images.astype(np.int16) + delta, 0, 255).astype(np.uint8)
    return attacked


def delta_to_255(delta: npt.NDArray[np.floating]) -> Delta255:
    """A perturbation in [0, 1] pixel units, rounded to the 8-bit grid: int16, same shape.

    On the grid (255 * delta integer up to float error, as a +-eps perturbation is) attacking with
    the result equals clip(round(x + 255 * delta), 0, 255) for every x. Off the grid it equals it
    but for exact halves, which numpy rounds to even, with or without x.

    Raises:
        UsageError: values that are not finite or not within [-1, 1].
    """
    scaled = np.asarray(delta, dtype=np.float64) * 255
    if not np.isfinite(scaled).all():
        raise UsageError("the perturbation has values that are not finite")
    return checked_delta(np.rint(scaled).clip(-1e4, 1e4).astype(np.int16))


def checked_images(images: npt.NDArray[np.uint8]) -> Images:
    """`images` as C-ordered uint8 [N, C, H, W] with N > 0.

    Raises:
        UsageError: another dtype or shape; the message has both.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
        raise UsageError(
            f"images must be uint8 [N, C, H, W] and not empty, got {images.dtype} {images.shape}"
        )
    return np.ascontiguousarray(images)


def checked_delta(
    delta_255: npt.NDArray[np.integer], *, image_shape: tuple[int, ...] | None = None
) -> Delta255:
    """`delta_255` as int16 [C, H, W]; with `image_shape`, of that very shape.

    Raises:
        UsageError: not integers, not within [-255, 255], or of another shape.
    """
    if not np.issubdtype(delta_255.dtype, np.integer) or delta_255.ndim != 3:
        raise UsageError(
            "a perturbation must be integers [C, H, W] in 1/255 units,"
            f" got {delta_255.dtype} {delta_255.shape}"
        )
    if image_shape is not None and delta_255.shape != image_shape:
        raise UsageError(f"the perturbation is {delta_255.shape}, the images are {image_shape}")
    # Not abs(): the most negative integer has no absolute value of its own type.
    if delta_255.max(initial=0) > MAX_DELTA_255 or delta_255.min(initial=0) < -MAX_DELTA_255:
        raise UsageError(
            f"a perturbation must be within +-{MAX_DELTA_255} (1/255 units),"
            f" got {delta_255.min()} to {delta_255.max()}"
        )
    return np.ascontiguousarray(delta_255, dtype=np.int16)

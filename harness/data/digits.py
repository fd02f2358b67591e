"""scikit-learn's 1,797 handwritten digits, rendered to 32x32 colour: real data, offline, fast.

What enters: nothing but scikit-learn's embedded file. What leaves: three sets of renderings that
share no original, so what is measured on evaluation was never trained on in another colour.
The rendering does not depend on the user's seed: like CIFAR-10, `digits` is one fixed data set,
and two experiments with different seeds are compared on the same evaluation images. It is integer
arithmetic on a frozen random stream, so it is the same bytes on every machine.

Originals are split by image; the file does not say who wrote them, so a writer may be on both
sides, as in scikit-learn's own examples.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from harness.data.source import Source
from harness.data.splits import Split, frozen_random, stratified
from harness.records import HarnessError

SIDE = 32
CLASSES = tuple(str(digit) for digit in range(10))
NOTE = (
    "digits: 32x32 colour renderings of scikit-learn's 1,797 real 8x8 handwritten digits, "
    "split by original image; one rendering per original in the evaluation set."
)

EVALUATION_ORIGINALS = 600
CALIBRATION_ORIGINALS = 150
TRAIN_RENDERINGS = 4  # about 4,200 training images: eight epochs in under a minute on two cores
RENDERING_SEED = 1797  # part of the data set's definition: changing it makes another data set

# --- what makes attacks on it meaningful -------------------------------------------------------
# On black-on-white digits an eps of 10/255 does nothing; digits fainter than the noise are not
# learnt. Contrast is therefore bounded on both sides: the stroke is lighter than its background by
# CONTRAST levels in each channel, a few times the budget of 10, and everything else in the picture
# (shading, noise) stays below it.
# Measured on these bytes (ResNet-18 of width 8, 8 epochs, one training seed): 98.2 % accuracy;
# white-box UAP at eps 10, 12 steps of 64 images, three starts: UER 0.86 to 0.88; random +-10
# signs, five draws: 0.013 to 0.022; +-10 chessboard: 0.018.
GLYPH_PX = (20, 28)  # side of the rendered 8x8 original, inclusive
BACKGROUND = (70, 180)  # far from 0 and 255: hardly one value in 10,000 clips
CONTRAST = (40, 80)  # stroke - background per channel, in levels of 255
SHADING = 12  # a linear ramp of at most this many levels from the centre to an edge, per axis
NOISE_SIGMA = 4.0  # pixel noise in levels, normal, cut at about 2.9 sigma

_FIXED_POINT = 64  # weights of the interpolation, as integers


def read_digits() -> Source:
    """The data set `digits`, its calibration already held out.

    Raises:
        HarnessError: scikit-learn is not installed.
    """
    train, calibration, evaluation, _ = digits_splits()
    return Source("digits", CLASSES, train, evaluation, False, NOTE, calibration=calibration)


def digits_splits(
    *, renderings: int = TRAIN_RENDERINGS
) -> tuple[Split, Split, Split, dict[str, NDArray[np.int64]]]:
    """Train, calibration and evaluation images, and the original each rendering comes from.

    Args:
        renderings: how many pictures of each training and calibration original; evaluation
            originals have one, so that evaluation images are independent.

    Returns:
        (train, calibration, evaluation, originals): splits of uint8 [N, 3, 32, 32], in an order
        that mixes the classes; `originals[role]` int64 [N] indexes scikit-learn's file.

    Raises:
        HarnessError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HarnessError(
            "the data set digits needs scikit-learn: pip install scikit-learn, or name another "
            "data set (FILE.npz, FOLDER)"
        ) from error

    bunch = load_digits()
    glyphs = bunch.images.astype(np.int32)  # [1797, 8, 8], 0..16
    labels = bunch.target.astype(np.int64)

    everyone = np.arange(len(labels))
    evaluation = stratified(labels, EVALUATION_ORIGINALS, frozen_random(RENDERING_SEED, 0))
    rest = np.setdiff1d(everyone, evaluation)
    chosen = stratified(labels[rest], CALIBRATION_ORIGINALS, frozen_random(RENDERING_SEED, 1))
    calibration = rest[chosen]
    train = np.setdiff1d(rest, calibration)

    originals = {
        "train": np.tile(train, renderings),
        "calibration": np.tile(calibration, renderings),
        "evaluation": evaluation,
    }
    splits = []
    for stream, (role, order) in enumerate(originals.items(), start=2):
        rng = frozen_random(RENDERING_SEED, stream)
        order = originals[role] = rng.permutation(order)
        splits.append(Split(render(glyphs[order], rng), labels[order]))
    return splits[0], splits[1], splits[2], originals


def render(glyphs: NDArray[np.int32], rng: np.random.RandomState) -> NDArray[np.uint8]:
    """One random picture of each glyph: size, place, colours, shading and noise are drawn.

    Args:
        glyphs: int32 [N, 8, 8], ink in 0..16.
        rng: where the draws come from.

    Returns:
        uint8 [N, 3, 32, 32].
    """
    n = len(glyphs)
    size = _uniform(rng, *GLYPH_PX, (n, 2))
    # Height and width differ by at most 2: a digit keeps roughly its proportions.
    size[:, 1] = np.clip(size[:, 0] + _uniform(rng, -2, 2, n), *GLYPH_PX)
    place = _uniform(rng, 0, 10_000, (n, 2)) * (SIDE - size) // 10_000
    rows = _interpolation(size[:, 0], place[:, 0])
    columns = _interpolation(size[:, 1], place[:, 1])
    # Integer matrix products: exact, whatever the order of the sums, unlike a BLAS on floats.
    ink = rows @ glyphs @ columns.transpose(0, 2, 1)  # [N, 32, 32], full ink is about 16 * 64^2
    full_ink = 16 * _FIXED_POINT**2

    background = _uniform(rng, *BACKGROUND, (n, 3, 1, 1))
    contrast = _uniform(rng, *CONTRAST, (n, 3, 1, 1))
    ramp = 2 * np.arange(SIDE, dtype=np.int32) - (SIDE - 1)  # -31..31
    slope = _uniform(rng, -SHADING, SHADING, (2, n, 3, 1, 1))
    shading = (slope[0] * ramp[:, None] + slope[1] * ramp) // SIDE
    picture = background + shading + (contrast * ink[:, None] + full_ink // 2) // full_ink
    picture += _noise_table()[np.frombuffer(rng.bytes(picture.size), np.uint8)].reshape(
        picture.shape
    )
    pixels: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def _interpolation(size: NDArray[np.int32], place: NDArray[np.int32]) -> NDArray[np.int32]:
    """Weights [N, 32, 8] that spread 8 samples over `size` pixels from `place` on.

    A quadratic B-spline: smooth, non-negative, sums to one, and zero beyond the glyph. Element by
    element in float64, then rounded, so the integers are the same on every processor.
    """
    pixel = np.arange(SIDE)[None, :, None] + 0.5
    at = (pixel - place[:, None, None]) * 8 / size[:, None, None] - 0.5
    distance = np.abs(at - np.arange(8))
    near, far = 0.75 - distance * distance, 0.5 * (1.5 - distance) * (1.5 - distance)
    weight = np.where(distance < 0.5, near, np.where(distance < 1.5, far, 0.0))
    weights: NDArray[np.int32] = np.rint(weight * _FIXED_POINT).astype(np.int32)
    return weights


def _noise_table() -> NDArray[np.int32]:
    """256 normal quantiles in whole levels: a uniform byte indexes one draw."""
    normal = NormalDist(0.0, NOISE_SIGMA)
    return np.array([round(normal.inv_cdf((i + 0.5) / 256)) for i in range(256)], dtype=np.int32)


def _uniform(
    rng: np.random.RandomState, low: int, high: int, shape: int | tuple[int, ...]
) -> NDArray[np.int32]:
    """Integers low..high, both included."""
    drawn: NDArray[np.int32] = rng.randint(low, high + 1, shape, dtype=np.int32)
    return drawn

"""What a perturbation's file says of its source's gradients: read back from the store.

Enters: a `View`. Leaves: numbers, or nothing where the file does not say; metadata is free-form, so
anything that is not what `harness.crafting.probe` writes counts as not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.bootstrap import Estimate, agreement, slope_ratio
from reports.view import VariantView, View


@dataclass(frozen=True)
class Probed:
    """Gradients on clean attack images of the model a perturbation was crafted on."""

    images: int
    zero_gradient: int
    saturated: int
    slope: Estimate | None
    """Measured over promised slope along the gradient; None where there is no gradient."""
    agreement: Estimate | None
    """Cosine of promised and measured slopes along random directions."""
    reach_255: float


def probe_of(view: View, variant: VariantView) -> Probed | None:
    """The probe stored with the variant's own perturbation, of whichever seed has one."""
    if variant.white_box is None:
        return None
    for row in view.repeats(variant.white_box):
        uap = view.uaps.get(row.uap_sha256 or "")
        found = _probed(uap.meta.get("probe")) if uap is not None else None
        if found is not None:
            return found
    return None


def _probed(raw: Any) -> Probed | None:
    if not isinstance(raw, dict):
        return None
    try:
        images, zero, saturated = (
            int(raw[name]) for name in ("images", "zero_gradient", "saturated")
        )
        own, own_measured, random, random_measured = (
            np.asarray(raw[name], dtype=np.float64)
            for name in ("own_promised", "own_measured", "random_promised", "random_measured")
        )
        reach = float(raw["reach_255"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    sound = own.shape == own_measured.shape == (images,) and random.ndim == 2
    sound = sound and random.shape == random_measured.shape and len(random) == images
    sound = sound and all(
        np.isfinite(a).all() for a in (own, own_measured, random, random_measured)
    )
    if not sound or not 0 <= zero <= images or not 0 <= saturated <= images or not images:
        return None
    return Probed(
        images=images,
        zero_gradient=zero,
        saturated=saturated,
        slope=slope_ratio(own, own_measured),
        agreement=agreement(random, random_measured),
        reach_255=reach,
    )

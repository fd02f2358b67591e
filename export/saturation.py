"""How far an integer network stays from the saturation of AVX2's 8-bit products (FACTS E).

Without VNNI, x86 kernels add two neighbouring products u8 x s8 in 16 bits before they widen: a pair
beyond 32,767 is clipped and the result is wrong. Which products become neighbours is the
runtime's business, so the bound here takes the two worst of every filter.

Enters: an integer network. Leaves: one bound for every layer on an integer kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.models.integer import IntegerConv, IntegerResNet

PAIR_LIMIT = 2**15 - 1


@dataclass(frozen=True)
class Margin:
    """The worst sum of two products that one layer can form."""

    layer: str
    worst_pair: int
    limit: int

    @property
    def factor(self) -> float:
        """Times the worst pair fits below the limit; below 1 the layer can saturate."""
        return self.limit / self.worst_pair if self.worst_pair else float("inf")


def saturation_margins(model: IntegerResNet) -> tuple[Margin, ...]:
    """One bound a layer, as stored for the integer kernels; the float stem cannot saturate."""
    margins: list[Margin] = []
    for index, block in enumerate(model.blocks()):
        name = f"blocks.{index}"
        top = block.quantise.levels.top
        conv1 = _weight(block.conv1.conv) * block.conv1.multiplier
        margins.append(margin_of(f"{name}.conv1", conv1, top))
        hidden = block.conv1.output.levels.top
        margins.append(margin_of(f"{name}.conv2", _weight(block.conv2.conv), hidden))
        if block.shortcut is not None and block.quantise_shortcut is not None:
            top = block.quantise_shortcut.levels.top
            margins.append(margin_of(f"{name}.shortcut", _weight(block.shortcut.conv), top))
    return tuple(margins)


def margin_of(layer: str, weight: npt.NDArray[np.int64], top: int) -> Margin:
    """The bound of one layer whose weights int [O, ...] meet activations from 0 to `top`."""
    filters = np.sort(weight.reshape(len(weight), -1), axis=1)
    # Activations are never negative: the worst pair has both weights of one sign.
    highest = np.maximum(filters[:, -2:], 0).sum(axis=1).max()
    lowest = -np.minimum(filters[:, :2], 0).sum(axis=1).min()
    return Margin(layer, worst_pair=int(max(highest, lowest)) * top, limit=PAIR_LIMIT)


def _weight(conv: IntegerConv) -> npt.NDArray[np.int64]:
    return conv.weight_int8().astype(np.int64)

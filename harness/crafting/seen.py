"""What an optimisation saw: kept beside the perturbation, so that a reader can judge the attack.

Enters: losses, saturated samples and gradients, step by step. Leaves: a summary of each run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Seen:
    """What the optimisation saw, per perturbation: losses of epochs, counts of the last one."""

    def __init__(self, jobs: int, device: torch.device) -> None:
        self._epochs: list[list[float]] = []
        self._counts = torch.zeros(3, jobs, device=device)
        """Sums of loss and of saturated samples over images, of zero gradients over steps."""
        self._images = self._steps = 0

    def new_epoch(self) -> None:
        if self._images:
            self._epochs.append((self._counts[0] / self._images).tolist())
        self._counts.zero_()
        self._images = self._steps = 0

    def add(self, loss: Tensor, over: Tensor, gradient: Tensor, *, images: int) -> None:
        zero = (gradient == 0).float().mean(dim=(1, 2, 3))
        self._counts += torch.stack([loss * images, over, zero])
        self._images += images
        self._steps += 1

    def state(self) -> dict[str, Any]:
        counts = self._counts.cpu()
        return {"epochs": self._epochs, "counts": counts, "n": [self._images, self._steps]}

    def restore(self, state: dict[str, Any]) -> None:
        self._epochs = list(state["epochs"])
        self._counts.copy_(state["counts"])
        self._images, self._steps = state["n"]

    def of(self, k: int, values: np.ndarray) -> tuple[np.ndarray, tuple[float, ...], float, float]:
        loss, over, zero = self._counts[:, k].tolist()
        losses = (*(epoch[k] for epoch in self._epochs), loss / self._images)
        return values, losses, over / self._images, zero / self._steps

"""Small networks, really trained on digits, and the same networks with their gradients masked.

Every mask leaves the predictions (nearly) what they are: robustness is not what it adds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.data.splits import Split


class Digits(nn.Module):
    """Pixels float [N, 3, 32, 32] in [0, 255] -> logits [N, 10]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * 16, 10),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers((pixels - 125) / 50)
        return logits


def trained(split: Split, *, seed: int, epochs: int = 3, batch: int = 50) -> Digits:
    """In eval mode, frozen."""
    with torch.random.fork_rng():
        model = Digits(seed).train()
    pixels, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(split) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(split), generator=generator)
        for chosen in order.split(batch):
            if len(chosen) < batch:
                continue
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[chosen].float()), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(requires_grad=False)


class Overconfident(nn.Module):
    """Logits times a huge factor: the softmax is exactly one or zero, its slope exactly zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels) * 1e5


class Staircase(nn.Module):
    """Pixels rounded to steps of some levels: flat nearly everywhere, so no gradient anywhere."""

    def __init__(self, model: nn.Module, step: float = 8.0) -> None:
        super().__init__()
        self.model = model
        self.step = step

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(torch.round(pixels / self.step) * self.step)


class Shattered(nn.Module):
    """A ripple on the pixels, of a tenth of a level: too small to matter, too steep to see past."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        # Its slope is up to 1,000 times the pixel's own, and of either sign.
        return self.model(pixels + 0.08 * torch.sin(12345.678 * (pixels + 0.1)))

"""SGD universal adversarial perturbations (Shafahi et al. 2020), as the paper runs them.

For every batch X of images:      delta <- clip(delta + (step * eps) * sign(g), -eps, eps)
                                  g = grad_delta  mean_{x in X} min(CE(F(clip(x + delta)), y), beta)
Targeted: y is the target class and the loss is descended. The loop itself, which crafts many
perturbations in one pass, is `harness.crafting.together`; this is its plainest rule.

Enters: a frozen deployed model, uint8 images. Leaves: one perturbation per request. Units here
are pixel levels, 0..255, so eps 10 is 10.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from harness.crafting.together import Crafted, Job, Progress, Request, Rule, craft_together
from harness.data.dataset import Split


@dataclass(frozen=True)
class SgdSettings:
    """The attack's parameters; see `harness.config.CraftConfig`."""

    epochs: int
    batch_size: int
    step: float
    beta: float
    shuffle: bool
    """False: the images in their order, as the authors had it."""
    batch_statistics: bool
    """True: batch norm in train mode, as the authors had it (protocol `paper`)."""
    selection: int = 0
    """Attack images that choose among restarts; 0 where there is one start, as in the paper."""
    restarts: int = 1

    @property
    def rule(self) -> Rule:
        """The optimiser: no momentum, a constant step, the last iterate (of the best start)."""
        return Rule(**asdict(self))


def craft_sgd(
    model: nn.Module,
    split: Split,
    request: Request,
    settings: SgdSettings,
    *,
    seed: int,
    key: str,
    partial: Path,
    device: torch.device,
    progress: Progress,
) -> Crafted:
    """Craft one perturbation: the last iterate, not rounded. See `craft_together`."""
    (crafted,) = craft_together(
        model,
        split,
        [Job(request, seed)],
        settings.rule,
        key=key,
        partial=partial,
        device=device,
        progress=progress,
    )
    return crafted

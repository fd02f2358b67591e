"""The default attack: many small steps with momentum, whose size falls to nothing.

Against the paper's SGD-UAP at the same number of gradient evaluations (docs/adr/0007): batches a
fraction as large, so more steps; momentum over gradients brought to one size; a step that falls
linearly; and a result that is chosen, on attack images, among the last iterate and patterns that no
gradient made, so that it does not lose to them: chessboard, random signs, and, untargeted and where
there are passes to spare, the best plane wave, which at small eps is often ahead of gradients.

Enters: `harness.config.CraftConfig`'s numbers. Leaves: a rule for `harness.crafting.together`.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.crafting.together import Rule


@dataclass(frozen=True)
class MomentumSettings:
    """The attack's parameters; see `harness.config.CraftConfig`."""

    epochs: int
    batch_size: int
    step: float
    beta: float
    momentum: float
    shuffle: bool
    batch_statistics: bool
    selection: int
    waves: int = 0
    """Forward passes to find the wave with, part of the budget that `epochs` is."""
    restarts: int = 1

    @property
    def rule(self) -> Rule:
        """The optimiser."""
        return Rule(
            epochs=self.epochs,
            batch_size=self.batch_size,
            step=self.step,
            beta=self.beta,
            shuffle=self.shuffle,
            batch_statistics=self.batch_statistics,
            momentum=self.momentum,
            decay=True,
            selection=self.selection,
            patterns=True,
            waves=self.waves,
            restarts=self.restarts,
        )

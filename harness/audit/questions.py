"""Questions of the audit, by name: which models and perturbations of which arms are compared.

Enters: how many training seeds. Leaves: a `Question`. Adding one is an entry here and a function
beside the others, in `crafting.py` or `trained.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.audit import crafting, trained
from harness.audit.contrasts import Question

SEEDS = 3
"""Training runs of every method, unless more are asked for. Not fewer: where one is left out, two
must be left that can meet (`crossed` contrasts)."""

QUESTIONS: dict[str, Callable[[int], Question]] = {
    "split": crafting.split,
    "batch_norm": crafting.batch_norm,
    "attack": crafting.attack,
    "loss_and_step": crafting.loss_and_step,
    "unit_masks": trained.unit_masks,
    "seeds": trained.other_seeds,
    "methods": trained.methods,
    "architecture": trained.architecture,
    "sfp_training": trained.sfp_training,
}
"""Training seeds -> the question. How UAPs are crafted is asked of four models of one seed."""

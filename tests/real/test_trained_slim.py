"""Slimming of models that soft filter pruning really trained, at every keep rate.

    pytest -m slow tests/real/test_trained_slim.py

The models of tests/export are pruned after a few steps; these go through the paper's loop, so their
zeroed filters have the batch-norm constants that training leaves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.exporter import export_model
from export.runtime import ALL_SETTINGS
from export.slim import slim
from export.verify import verify_float
from harness.models.checkpoint import load_checkpoint
from harness.models.folded import fold
from harness.pipeline.checkpoints import train_tasks
from harness.pipeline.context import Context
from harness.presets import preset_named
from harness.workspace import create_workspace

pytestmark = pytest.mark.slow
KEEP_RATES = (0.9, 0.7, 0.5, 0.3, 0.1)
IMAGES = 1000
"""Each clean and under random signs of eps 10: 2,000 in all."""


@pytest.mark.parametrize("keep", KEEP_RATES)
def test_slim_is_the_masked_model(keep: float, tmp_path: Path) -> None:
    # At width 16 a tenth of every layer is at least one filter.
    config = preset_named("quickstart")
    config = replace(config, width=16, train=replace(config.train, sfp_keep=keep, epochs=3))
    context = Context(create_workspace(tmp_path, config), torch.device("cpu"))
    context.build(train_tasks(context, ["sfp"]))
    model = load_checkpoint(context.workspace.checkpoint("sfp")).build()
    zeroed = model.conv1.weight.flatten(1).abs().sum(1) == 0
    assert int(zeroed.sum()) == int(16 * (1 - keep))

    clean = context.data.train.images[:IMAGES]
    signs = np.random.default_rng(0).choice([-10, 10], size=clean.shape[1:])
    attacked = np.clip(clean.astype(np.int16) + signs, 0, 255).astype(np.uint8)
    exported = export_model(
        fold(model),
        model,
        out=tmp_path / "sfp.onnx",
        calibration=context.data.calibration.images,
        metadata={},
    )
    slimmed, report = slim(fold(model))
    assert report.changed
    assert sum(block.constants_merged for block in report.blocks) > 0
    agreement = verify_float(
        exported.path.read_bytes(),
        model,
        np.concatenate([clean, attacked]),
        deployed=slimmed,
        settings=ALL_SETTINGS,
    )
    assert agreement.passed, agreement.reason
    assert agreement.relative_error <= 1e-4
    assert agreement.argmax_agreement >= 0.999
    assert len(agreement.layers) == 8
    assert max(layer.relative_error or 0.0 for layer in agreement.layers) <= 1e-4

"""Saturation bounds by hand, and against every pair of products a small layer can form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from export_cases import spec, twin

from export.saturation import PAIR_LIMIT, saturation_margins
from harness.models.integerise import WEIGHT_MULTIPLIER, integerise
from harness.models.resnet import build_model


@pytest.mark.parametrize(("bits", "top", "weight"), [(2, 4, 1), (3, 10, 4), (4, 48, 10)])
def test_no_layer_of_apot_can_saturate(bits: int, top: int, weight: int) -> None:
    """FACTS E: two products of the largest activation and the largest stored weight."""
    margins = saturation_margins(integerise(build_model(spec(width=16, bits=bits), seed=0).eval()))
    assert len(margins) == 8 + 8 + 3
    stored = {"conv1": weight * WEIGHT_MULTIPLIER[bits], "conv2": weight, "shortcut": weight}
    for margin in margins:
        assert 0 < margin.worst_pair <= 2 * top * stored[margin.layer.split(".")[-1]]
        assert margin.limit == PAIR_LIMIT == 32_767
        assert margin.factor > 1
    assert max(m.worst_pair for m in margins) == 2 * top * stored["conv1"]


def test_the_bound_is_the_worst_pair_of_a_filter() -> None:
    model = twin(4)
    block = next(iter(model.blocks()))
    levels = torch.zeros_like(block.conv2.conv.weight)
    levels[0, 0, 0, :3] = torch.tensor([10.0, -8.0, 3.0])  # pairs: 13 up, 8 down
    levels[1, 1, 1, :2] = torch.tensor([-6.0, -8.0])  # 14 down
    block.conv2.conv.weight.copy_(levels)
    margin = next(m for m in saturation_margins(model) if m.layer == "blocks.0.conv2")
    assert margin.worst_pair == 14 * 48
    activations = (0, 48)
    reached = max(
        abs(a * u + b * v)
        for filters in np.asarray(levels).reshape(len(levels), -1)
        for u, v in itertools.combinations(filters[filters != 0], 2)
        for a, b in itertools.product(activations, repeat=2)
    )
    assert reached == margin.worst_pair

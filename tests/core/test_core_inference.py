"""Predictions on a GPU, told without one: what TF32 leaves in doubt is computed again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness import inference
from harness.inference import TF32_DOUBT, in_doubt, predict
from harness.models.folded import FoldedResNet, fold
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, build_model

CUDA = torch.device("cuda")
LARGEST = 20.0
CLEAR, CLOSE, TIED, LAST = [LARGEST, 1.0, 0.0], [5.0, 5.1, 0.0], [3.0, 3.0, 3.0], [0.0, 9.0, 9.15]


def network() -> FoldedResNet:
    spec = ModelSpec("resnet20", 8, 3, 3, (125, 122, 113), (63.0, 62.1, 66.7))
    return fold(build_model(spec, seed=0).eval())


def test_in_doubt_is_who_has_two_best_within_a_hundredth_of_the_largest() -> None:
    assert in_doubt(torch.tensor([CLEAR, CLOSE, TIED, LAST])).tolist() == [1, 2, 3]
    assert (
        in_doubt(torch.tensor([CLEAR, [1.0, 1.0 + 1.01 * TF32_DOUBT * LARGEST, 0.0]])).tolist()
        == []
    )


def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """In place of a GPU: TF32 swaps what is close. Returns (TF32 allowed, images) of every call."""
    asked: list[tuple[bool, int]] = []
    exact = torch.tensor([CLEAR, CLOSE, TIED, LAST])

    def logits(_model: nn.Module, images: Any, *_rest: Any) -> Tensor:
        tf32 = torch.backends.cudnn.allow_tf32
        asked.append((tf32, len(images)))
        found = exact[torch.from_numpy(images[:, 0, 0, 0].astype(np.int64))]
        return torch.where(found == 5.1, 4.9, found) if tf32 else found

    monkeypatch.setattr(inference, "_logits", logits)
    return asked


def numbered() -> np.ndarray:
    images = np.zeros((4, 3, 2, 2), dtype=np.uint8)
    images[:, 0, 0, 0] = range(4)
    return images


def test_only_images_in_doubt_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch)
    assert predict(network(), numbered(), None, device=CUDA).tolist() == [0, 1, 0, 2]
    assert asked == [(True, 4), (False, 3)]


@pytest.mark.parametrize(("kind", "tf32"), [("integer", True), ("foreign", False)])
def test_others_are_computed_once(kind: str, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec("resnet20", 8, 3, 3, (125, 122, 113), (63.0, 62.1, 66.7), bits=4)
    model: nn.Module = nn.Identity()
    if kind == "integer":
        model = integerise(build_model(spec, seed=0).eval())
    asked = answers(monkeypatch)
    predict(model, numbered(), None, device=CUDA)
    assert asked == [(tf32, 4)]

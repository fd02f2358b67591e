"""The network that crafting runs on a GPU, in float32 on a CPU: the same function, its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness.models.folded import FoldedResNet, fold
from harness.models.fused import FusedResNet, can_fuse
from harness.models.resnet import ModelSpec, build_model

MASKS: list[tuple[int, int, int] | None] = [None, (16, 1, 1), (16, 8, 8)]


def folded(
    mask: tuple[int, int, int] | None = None, *, width: int = 8, channels: int = 3
) -> FoldedResNet:
    spec = ModelSpec(
        "resnet18",
        width,
        channels,
        10,
        (125, 122, 113)[:channels],
        (63.0, 62.1, 66.7)[:channels],
        mask_stage=2 if mask else None,
        mask_shape=mask,
    )
    model = build_model(spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    if mask:
        model.stage_output(2).mask = (torch.rand(mask, generator=generator) > 0.3).float()
    return fold(model.eval())


def with_gradient(network: FoldedResNet | FusedResNet, pixels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = pixels.clone().requires_grad_()
    logits = network(leaf)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]


def pixels_of(channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 255 * torch.rand((5, channels, size, size), generator=generator)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_logits_and_gradient_as_the_folded_network(
    mask: tuple[int, int, int] | None, channels: int
) -> None:
    network, pixels = folded(mask, channels=channels), pixels_of(channels)
    logits, gradient = with_gradient(FusedResNet(network, dtype=torch.float32), pixels)
    expected, expected_gradient = with_gradient(network, pixels)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_bfloat16_keeps_a_small_perturbation_of_a_bright_pixel() -> None:
    """In one channel 250.125 would be rounded to 250: here it is 250 and 0.125."""
    network, pixels = folded(), torch.full((1, 3, 16, 16), 250.0)
    fused = FusedResNet(network)
    one, other = (fused._packed(pixels + by) for by in (0.0, 0.125))
    assert torch.equal(one[:, :3], other[:, :3])
    assert torch.equal(other[:, 3:6], torch.full((1, 3, 16, 16), 0.125, dtype=torch.bfloat16))
    assert torch.equal(other[:, 6:], torch.zeros((1, 2, 16, 16), dtype=torch.bfloat16))


def test_bfloat16_points_where_float32_does() -> None:
    network, pixels = folded(), pixels_of()
    _, gradient = with_gradient(FusedResNet(network), pixels)
    _, expected = with_gradient(network, pixels)
    assert nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98


def test_only_whole_blocks_of_tensor_core_sizes_are_fused() -> None:
    assert can_fuse(folded())
    assert not can_fuse(folded(width=4))
    assert not can_fuse(nn.Identity())
    half = folded((16, 1, 1))
    for block in half.blocks():
        if block.mask is not None:
            block.mask.fill_(0.5)
    assert not can_fuse(half)
    with pytest.raises(ValueError, match="mask"):
        FusedResNet(half)

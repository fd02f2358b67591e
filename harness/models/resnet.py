"""ResNet for small images (He et al. 2016, as the paper uses it on 32 x 32 inputs).

Enters: pixels as float [N, C, H, W] in [0, 255], what a device receives. Normalisation is the
model's first layer, so perturbations live in pixel space. Leaves: logits float [N, classes].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.apot import ApotConv2d, Uniform8Conv2d, Uniform8Linear
from harness.records import BLOCKS_PER_STAGE, UsageError


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model before its weights are loaded."""

    arch: str
    width: int
    """Channels of the stem and of the first stage."""
    in_channels: int
    classes: int
    mean_255: tuple[int, ...]
    """Per-channel mean in whole pixel units: whole, so that an integer stem is exact."""
    std_255: tuple[float, ...]
    bn_eps: float = 1e-5
    """Added to the variance by batch norm; see `harness.config.TrainConfig`."""
    bits: int | None = None
    """APoT bits of the hidden layers; None for a float model."""
    mask_stage: int | None = None
    """The stage (1-based) whose output is masked, for post-training pruning."""
    mask_shape: tuple[int, int, int] | None = None
    """[C, 1, 1] for channels, [C, H, W] for single activations."""


class Normalise(nn.Module):
    """(pixels - mean) / std per channel; the mean only when the stem divides by std itself."""

    mean_255: Tensor
    std_255: Tensor

    def __init__(self, mean_255: tuple[int, ...], std_255: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean_255", torch.tensor(mean_255).float().view(1, -1, 1, 1))
        self.register_buffer("std_255", torch.tensor(std_255).float().view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean_255) / self.std_255


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), times a mask if it has one."""

    mask: Tensor | None

    def __init__(self, cin: int, cout: int, *, stride: int, spec: ModelSpec) -> None:
        super().__init__()
        bits, eps = spec.bits, spec.bn_eps
        self.conv1 = _conv(cin, cout, kernel=3, stride=stride, bits=bits)
        self.bn1 = nn.BatchNorm2d(cout, eps=eps)
        self.conv2 = _conv(cout, cout, kernel=3, stride=1, bits=bits)
        self.bn2 = nn.BatchNorm2d(cout, eps=eps)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(
                _conv(cin, cout, kernel=1, stride=stride, bits=bits),
                nn.BatchNorm2d(cout, eps=eps),
            )
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.downsample(x) if self.downsample is not None else x
        h = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(h)) + skip)
        return y * self.mask if self.mask is not None else y


class ResNet(nn.Module):
    """The trainable form of every variant: float, masked, or APoT fake-quantised."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        try:
            blocks_per_stage = BLOCKS_PER_STAGE[spec.arch]
        except KeyError:
            known = ", ".join(sorted(BLOCKS_PER_STAGE))
            raise UsageError(f"unknown arch {spec.arch!r}: choose from {known}") from None
        self.normalise = Normalise(spec.mean_255, spec.std_255)
        self.conv1 = (
            nn.Conv2d(spec.in_channels, spec.width, 3, padding=1, bias=False)
            if spec.bits is None
            else Uniform8Conv2d(spec.in_channels, spec.width, 3, padding=1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(spec.width, eps=spec.bn_eps)
        stages: list[nn.Sequential] = []
        cin = spec.width
        for index, n_blocks in enumerate(blocks_per_stage):
            cout = spec.width * 2**index
            blocks: list[BasicBlock] = []
            for block in range(n_blocks):
                stride = 2 if index > 0 and block == 0 else 1
                blocks.append(BasicBlock(cin, cout, stride=stride, spec=spec))
                cin = cout
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = (
            nn.Linear(cin, spec.classes) if spec.bits is None else Uniform8Linear(cin, spec.classes)
        )
        if spec.mask_stage is not None and spec.mask_shape is not None:
            self.stage_output(spec.mask_stage).mask = torch.ones(spec.mask_shape)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.bn1(self._stem(pixels)))
        x = self.stages(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits

    def _stem(self, pixels: Tensor) -> Tensor:
        if isinstance(self.conv1, Uniform8Conv2d):
            # Quantise w / std, not w: the device convolves integers (pixels - mean).
            normalise = self.normalise
            return self.conv1.over_integers(pixels - normalise.mean_255, normalise.std_255)
        features: Tensor = self.conv1(self.normalise(pixels))
        return features

    def blocks(self) -> Iterator[BasicBlock]:
        """The residual blocks from input to output."""
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                assert isinstance(block, BasicBlock)
                yield block

    def stage_output(self, stage: int) -> BasicBlock:
        """The last block of a stage (1-based, as the paper counts).

        Raises:
            UsageError: the architecture has no such stage.
        """
        if not 1 <= stage <= len(self.stages):
            raise UsageError(f"{self.spec.arch} has stages 1 to {len(self.stages)}, not {stage}")
        chosen = self.stages[stage - 1]
        assert isinstance(chosen, nn.Sequential)
        block = chosen[-1]
        assert isinstance(block, BasicBlock)
        return block


def build_model(spec: ModelSpec, *, seed: int) -> ResNet:
    """A freshly initialised model; the same seed gives the same weights.

    Convolutions are He-initialised (fan-out), batch norm starts at identity, the last layer is
    uniform within 1 / sqrt(features), as PyTorch does.
    """
    generator = torch.Generator().manual_seed(seed)
    # Layers draw from PyTorch's global generator as they are made. Models are built side by side,
    # so nothing of that may last: every weight is drawn again below.
    with torch.random.fork_rng(devices=[]):
        model = ResNet(spec)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                module.weight.normal_(0.0, (2.0 / fan_out) ** 0.5, generator=generator)
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
    return model


def _conv(cin: int, cout: int, *, kernel: int, stride: int, bits: int | None) -> nn.Conv2d:
    if bits is None:
        return nn.Conv2d(cin, cout, kernel, stride=stride, padding=kernel // 2, bias=False)
    return ApotConv2d(cin, cout, kernel, stride=stride, padding=kernel // 2, bits=bits)

"""What a network computes with while perturbations are crafted on it.

Enters: frozen networks, where they are, and whether they are to be taken as they come. Leaves: a
function of pixels for each, in fast arithmetic on a GPU where that changes no code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from harness.models.brought import BroughtModel
from harness.models.folded import FoldedResNet
from harness.models.fused import FusedResNet, can_fuse
from harness.models.integer import IntegerResNet

T = TypeVar("T")
Function = Callable[[Tensor], Tensor]
"""Pixels float32 [N, C, H, W] -> logits float32 [N, classes], differentiable in the pixels."""

IMAGES_AT_ONCE = {"cpu": 64, "cuda": 4096}
"""Perturbed images in one call of the network at most; a batch of one perturbation is not cut.
On a CPU more do not fit its caches; fewer pay for every call (64: 2.2 times the images a second
of 8 at width 8)."""
PIXEL_VALUES = 3 * 32 * 32
"""Of the images those numbers are for; of larger ones proportionally fewer run at once."""


def images_at_once(images: Tensor) -> int:
    """How many images like these, [N, C, H, W], one call of a network should have."""
    limit = IMAGES_AT_ONCE.get(images.device.type, IMAGES_AT_ONCE["cpu"])
    return max(1, limit * PIXEL_VALUES // max(PIXEL_VALUES, images[0].numel()))


def in_parts(total: int, at_once: int, work: Callable[[slice], T]) -> list[T]:
    """The work on `total` things, so many at once; fewer where a GPU has less memory.

    Raises:
        torch.OutOfMemoryError: even one at a time is too much.
    """
    done: list[T] = []
    first, at_once = 0, max(1, at_once)
    while first < total:
        part = slice(first, min(first + at_once, total))
        try:
            done.append(work(part))
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            torch.cuda.empty_cache()
            continue
        first = part.stop
    return done


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's, [N]: positive where the prediction is another."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own[:, 0]


@contextlib.contextmanager
def crafted_on(
    networks: Sequence[nn.Module], *, batch_statistics: bool, device: torch.device
) -> Iterator[list[Function]]:
    """The networks as functions; what is set for them is put back when the context is left.

    Args:
        networks: frozen, on `device`.
        batch_statistics: batch norm in train mode, as the authors had it; then the arithmetic is
            theirs, too.
        device: where to craft.
    """
    for network in networks:
        set_batch_statistics(network, batch_statistics)
    plain = batch_statistics or any(isinstance(n, BroughtModel) for n in networks)
    try:
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=True, deterministic=True, allow_tf32=not plain
                    )
                )
            yield [_function(n, batch_statistics=batch_statistics, device=device) for n in networks]
    finally:
        for network in networks:
            set_batch_statistics(network, False)


def set_batch_statistics(model: nn.Module, enabled: bool) -> None:
    """Batch norm by the batch at hand, or by what training left."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Batch statistics, but the running ones stay as trained: the authors' runs
            # polluted each other's models, ours start from the same model every time.
            module.train(enabled)
            module.track_running_stats = not enabled


def _has_fused_kernels(device: torch.device) -> bool:
    # cuDNN's, in bfloat16: NVIDIA since Ampere.
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _function(network: nn.Module, *, batch_statistics: bool, device: torch.device) -> Function:
    # An integer network's whole numbers are exact in TF32's 11 bits, and their sums are left in
    # float32; bf16's 8 bits hold neither. What a user brought may not bear bf16 (fake
    # quantisation, operators of its own).
    as_it_comes = batch_statistics or isinstance(network, IntegerResNet | BroughtModel)
    fast = device.type == "cuda" and not as_it_comes
    if fast and can_fuse(network) and _has_fused_kernels(device):
        assert isinstance(network, FoldedResNet)
        return FusedResNet(network)

    def logits_of(pixels: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16) if fast else contextlib.nullcontext():
            logits: Tensor = network(pixels.contiguous(memory_format=torch.channels_last))
            return logits.float()

    return logits_of

"""What every stage of the paper-scale campaign takes of a GPU, beside what the GPU can do.

    pytest -m gpu tests/benchmarks/test_stages_gpu.py --benchmark-enable -s

ResNet-18 of width 64 on 32 x 32 images, as `paper-fast` trains and crafts it. Two ceilings are
measured first: bf16 matrix products of 8192 x 8192, and a copy within the device's memory. Nothing
is asserted about time; that whole numbers stay exact in TF32 is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_cases import JOBS, best_of, peak_flops
from torch import nn

from harness.crafting import arithmetic
from harness.crafting.together import Rule, craft_together
from harness.data.dataset import Split
from harness.inference import predict
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, ResNet, build_model
from harness.training.loop import Recipe, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda")
COPIED = 2**31
FORWARD_FLOP = 2 * 0.5554e9
"""Of one image through the network: two a multiply-accumulate."""
SPEC = ModelSpec("resnet18", 64, 3, 10, (125, 122, 113), (63.0, 62.1, 66.7))
RECIPE = Recipe(
    epochs=1,
    batch_size=512,
    schedule="one_cycle",
    decay_epochs=(),
    momentum=0.9,
    weight_decay=5e-4,
    learning_rates={"": 0.01},
    crop_padding=4,
    flip=True,
    nesterov=True,
    precision="bf16",
)
APOT = replace(
    RECIPE,
    precision="fp32",
    learning_rates={"": 0.01, "activation_alpha": 0.01, "weight_alpha": 0.01},
)


def copy_bytes() -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    block = torch.empty(COPIED, dtype=torch.uint8, device=CUDA)
    other = torch.empty_like(block)
    return 2 * COPIED / best_of(lambda: other.copy_(block))


def images(n: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(
        rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8),
        rng.integers(0, 10, n).astype(np.int64),
    )


def model_of(bits: int | None) -> ResNet:
    return build_model(replace(SPEC, bits=bits), seed=0).eval()


def one_epoch(model: ResNet, split: Split, recipe: Recipe, folder: Path) -> None:
    train(
        model,
        split,
        recipe,
        seed=0,
        key="k",
        partial=folder / f"never continued {id(model)}.pt",
        device=CUDA,
        progress=lambda _done, _all, _note: None,
    )


def crafting(network: nn.Module, split: Split, folder: Path) -> Callable[[], object]:
    rule = Rule(1, 250, 0.2, 8.0, shuffle=True, batch_statistics=False)
    network = network.to(CUDA).requires_grad_(requires_grad=False)
    return lambda: craft_together(
        network,
        split,
        JOBS,
        rule,
        key="k",
        partial=folder / "never continued.pt",
        device=CUDA,
        progress=lambda _n: None,
    )


def test_the_share_of_every_stage(tmp_path: Path) -> None:
    peak, copied = peak_flops(), copy_bytes()
    rows: list[tuple[str, float, float]] = []

    def row(stage: str, forwards: float, n: int, took: float) -> None:
        rate = n / took
        rows.append((stage, rate, forwards * FORWARD_FLOP * rate / peak))

    split = images(12_800)
    full, q4 = model_of(None), model_of(4)
    row("train full, bf16", 3, 12_800, best_of(lambda: one_epoch(full, split, RECIPE, tmp_path)))
    one = model_of(None), model_of(None)
    in_turn = best_of(lambda: [one_epoch(m, split, RECIPE, tmp_path) for m in one], 2)

    def beside(model: ResNet) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            one_epoch(model, split, RECIPE, tmp_path)

    def together() -> None:
        crew = [threading.Thread(target=beside, args=(model,)) for model in one]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()

    row("train two side by side, bf16", 3, 25_600, best_of(together, 2))
    row("train two in turn, bf16", 3, 25_600, in_turn)
    row("train q4, TF32", 3, 12_800, best_of(lambda: one_epoch(q4, split, APOT, tmp_path), 2))

    few = images(2_000)
    folded, integer = fold(full.eval().cpu()), integerise(q4.eval().cpu())
    perturbed = len(few) * len(JOBS)
    row("craft full, bf16, fused", 2, perturbed, best_of(crafting(folded, few, tmp_path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "can_fuse", lambda _network: False)
        row("craft full, bf16, autocast", 2, perturbed, best_of(crafting(folded, few, tmp_path)))
    row("craft q4, TF32", 2, perturbed, best_of(crafting(integer, few, tmp_path), 2))

    pixels = images(8_192).images
    # Untrained logits are all alike: nearly all images are in doubt, and computed twice.
    row(
        "predict full, TF32 and fp32",
        1,
        8_192,
        best_of(lambda: predict(folded, pixels, None, device=CUDA)),
    )
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.inference_mode():
        x = torch.from_numpy(pixels[:1024]).float().to(CUDA)
        x = x.contiguous(memory_format=torch.channels_last)
        row("forward full, fp32", 1, 1_024, best_of(lambda: folded(x)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True), torch.inference_mode():
        row("forward full, TF32", 1, 1_024, best_of(lambda: folded(x)))
    row("predict q4, TF32", 1, 8_192, best_of(lambda: predict(integer, pixels, None, device=CUDA)))
    text = [
        f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in bf16 matrix products,"
        f" {copied / 1e12:.2f} TB/s copied"
    ]
    text += [f"{s:<30} {rate:>10,.0f} images/s {share:>7.1%} of peak" for s, rate, share in rows]
    sys.stderr.write("\n" + "\n".join(text) + "\n")
    assert all(share > 0 for _, _, share in rows)


def test_whole_numbers_are_exact_in_tf32() -> None:
    integer, pixels = integerise(model_of(4)).to(CUDA), images(512).images
    x = torch.from_numpy(pixels).float().to(CUDA)
    logits = []
    for tf32 in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32), torch.inference_mode():
            logits.append(integer(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(*logits)

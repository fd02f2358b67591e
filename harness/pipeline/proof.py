"""`harness export --verify`: proves anew, from the files alone, what a manifest claims.

Enters: a variant's checkpoint, ONNX file and manifest, and images. Leaves: a `Proof`; nothing is
written. Clean and attacked images go through PyTorch and onnxruntime in every setting that may not
matter: threads, batch size, graph optimisations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from export.agreement import Agreement
from export.cost import cost_card
from export.exporter import load_manifest, manifest_cost
from export.runtime import ALL_SETTINGS
from export.saturation import Margin, saturation_margins
from export.slim import slim
from export.verify import verify_float, verify_integer
from harness.crafting.perturbation import load_perturbation, random_sign, to_levels
from harness.models.checkpoint import load_checkpoint
from harness.models.folded import FoldedResNet
from harness.models.integer import IntegerResNet
from harness.models.resnet import ResNet
from harness.pipeline.checkpoints import deployed_form, reference_form
from harness.pipeline.context import CPU_THREADS, Context, use_cpu_threads
from harness.pipeline.exports import export_key
from harness.pipeline.tasks import Progress, Task
from harness.pipeline.uap_files import valid_uap
from harness.pipeline.uap_names import transfer_name
from harness.records import HarnessError, UsageError, variant_named

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Proof:
    """What was checked of one exported variant, and what did not hold."""

    variant: str
    file: str
    """Name of the ONNX file."""
    sha256: str
    """Of the ONNX file."""
    checkpoint_sha256: str
    images_clean: int
    images_attacked: int
    attacked_by: str
    """The perturbation on the attacked images: the variant's own UAP where it is there."""
    agreement: Agreement | None
    """None when the file could not even be run."""
    margins: tuple[Margin, ...]
    """Saturation bounds, a layer each; empty for a float variant."""
    problems: tuple[str, ...]
    """Why the manifest does not hold; empty when all of it does."""


def prove_all(
    context: Context, variants: list[str], *, images: int, compat: bool = False
) -> list[Proof]:
    """Prove several variants, telling the context's reporter how far it is; see `prove`.

    Raises:
        UsageError: one of them is not exported.
    """
    files = [_exported(context, variant, compat=compat)[0] for variant in variants]
    proofs: list[Proof] = []
    tasks = [
        Task(
            stage="verify",
            name=f"verify {path.stem}",
            work=1.0,
            is_done=lambda: False,
            run=lambda progress, variant=variant: proofs.append(  # type: ignore[misc]
                prove(context, variant, images=images, compat=compat, progress=progress)
            ),
        )
        for variant, path in zip(variants, files, strict=True)
    ]
    context.build(tasks)
    return proofs


def prove(
    context: Context, variant: str, *, images: int, compat: bool = False, progress: Progress
) -> Proof:
    """Check hashes, cost card and agreement of one exported variant.

    Args:
        context: of the workspace.
        variant: its name.
        images: how many images to use, from the training images (the largest split; labels and
            training do not matter here). Each is used clean and attacked.
        compat: the file that `export --compat` wrote, instead of the one that is deployed.
        progress: told how far it is.

    Raises:
        UsageError: the variant is not exported.
    """
    use_cpu_threads(CPU_THREADS)
    onnx_path, checkpoint_path = _exported(context, variant, compat=compat)
    problems: list[str] = []
    content = onnx_path.read_bytes()
    problems += _manifest_problems(context, variant, onnx_path, content, compat=compat)
    trained = load_checkpoint(checkpoint_path).build()
    deployed = deployed_form(trained)
    clean = context.data.train.images[:images]
    delta, attacked_by = _delta_255(context, variant)
    attacked = np.clip(clean.astype(np.int16) + delta, 0, 255).astype(np.uint8)
    shown = np.concatenate([clean, attacked])
    total, done = len(shown) * len(ALL_SETTINGS), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done / total, "")

    margins = saturation_margins(deployed) if isinstance(deployed, IntegerResNet) else ()
    agreement: Agreement | None = None
    try:
        agreement = _compare(context, content, trained, deployed, shown, advance)
    except HarnessError as error:
        problems.append(str(error))
    problems += [
        f"{m.layer} can saturate without VNNI: a pair of products reaches {m.worst_pair:,} "
        f"of {m.limit:,}"
        for m in margins
        if m.factor < 1
    ]
    if agreement is not None and not agreement.passed:
        problems.append(agreement.reason)
    return Proof(
        variant=variant,
        file=onnx_path.name,
        sha256=context.sha256(onnx_path),
        checkpoint_sha256=context.sha256(checkpoint_path),
        images_clean=len(clean),
        images_attacked=len(attacked),
        attacked_by=attacked_by,
        agreement=agreement,
        # They are computed from the twin: of the file only as far as it is the twin.
        margins=margins if agreement is not None and agreement.passed else (),
        problems=tuple(problems),
    )


def _compare(
    context: Context,
    content: bytes,
    trained: ResNet,
    deployed: nn.Module,
    images: Images,
    advance: Callable[[int], None],
) -> Agreement:
    """The file beside the model it must be, in every setting."""
    if isinstance(deployed, IntegerResNet):
        return verify_integer(content, deployed, images, settings=ALL_SETTINGS, progress=advance)
    assert isinstance(deployed, FoldedResNet)
    slimmed, _ = slim(deployed, align=context.config.export.align)
    return verify_float(
        content,
        reference_form(trained),
        images,
        deployed=slimmed,
        settings=ALL_SETTINGS,
        progress=advance,
    )


def _exported(context: Context, variant: str, *, compat: bool) -> tuple[Path, Path]:
    """(ONNX file, checkpoint) of a variant that has both."""
    workspace = context.workspace
    onnx = workspace.compat_onnx(variant) if compat else workspace.onnx(variant)
    paths = onnx, workspace.checkpoint(variant)
    options = f"--compat --model {variant}" if compat else f"--model {variant}"
    for path in paths:
        if not path.exists():
            raise UsageError(f"no {path}: run `harness export {options}` first")
    return paths


def _manifest_problems(
    context: Context, variant: str, path: Path, content: bytes, *, compat: bool
) -> list[str]:
    try:
        manifest: dict[str, Any] = load_manifest(path)  # the file's hash is checked here
        claimed = manifest_cost(manifest)
    except HarnessError as error:
        return [str(error)]
    problems: list[str] = []
    checkpoint_sha256 = context.sha256(context.workspace.checkpoint(variant))
    if manifest["metadata"].get("checkpoint_sha256") != checkpoint_sha256:
        problems.append("the manifest names another checkpoint: export the variant again")
    if manifest["metadata"].get("key") != export_key(
        context, variant_named(variant), compat=compat
    ):
        problems.append("harness.toml asks for another file than this: export the variant again")
    if cost_card(content, image_shape=context.image_shape) != claimed:
        problems.append("the manifest's cost card is not what the file costs: export again")
    return problems


def _delta_255(context: Context, variant: str) -> tuple[npt.NDArray[np.int16], str]:
    name = transfer_name(context, variant)
    path = context.workspace.uap(name)
    if valid_uap(context, name):
        return load_perturbation(path).delta_255, path.name
    eps = context.config.craft.reference_eps
    signs = random_sign(context.image_shape, eps=eps, seed=context.config.seed)
    return to_levels(signs, eps=eps).astype(np.int16), f"random signs at eps {eps:g}"

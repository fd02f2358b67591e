"""Stage `train`: data -> checkpoint -> compressed checkpoint.

Enters: the data and, for a compressed variant, its parent's checkpoint. Leaves:
`cache/<variant>.pt`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from harness.artefacts import cache_key
from harness.compression import variants as compression
from harness.compression.variants import (
    Build,
    build_variant,
    parent_of,
    planned_epochs,
    relevant_config,
)
from harness.models.checkpoint import load_checkpoint, save_checkpoint
from harness.models.folded import fold
from harness.models.integerise import integerise
from harness.models.resnet import ResNet
from harness.pipeline.context import TRAIN_THREADS, Context, use_cpu_threads
from harness.pipeline.tasks import Progress, Task
from harness.records import (
    BLOCKS_PER_STAGE,
    VARIANTS,
    HarnessError,
    UsageError,
    Variant,
    trained_for,
    variant_named,
)

TRAIN_COST = {"full": 3.5, "sfp": 3.6, "pp": 3.5, "apot": 7.0}
"""Forward passes that one training image costs: forward, backward, and fake quantisation."""


def with_parents(context: Context, names: list[str]) -> list[Variant]:
    """What these are trained as, and all it starts from, in build order."""
    wanted: set[str] = set()
    for name in names:
        current: str | None = trained_for(name).name
        while current is not None:
            wanted.add(current)
            current = parent_of(variant_named(current), context.config)
    return [variant for variant in VARIANTS if variant.name in wanted]


def checkpoint_key(context: Context, variant: Variant) -> str:
    """Digest of everything the variant's weights depend on."""
    data, parent = context.data, parent_of(variant, context.config)
    inputs = {"train": data.digests["train"], "classes": data.classes, "flip": data.flip}
    if variant.method == "pp":
        inputs["calibration"] = data.digests["calibration"]
    return cache_key(
        "train",
        compression.VERSION,
        variant=variant.name,
        config=relevant_config(variant, context.config),
        data=inputs,
        parent=checkpoint_key(context, variant_named(parent)) if parent else None,
    )


def valid_checkpoint(context: Context, variant: Variant) -> bool:
    """Whether the variant's checkpoint is there and is what the configuration asks for.

    Raises:
        UsageError: there is a file, but it is damaged.
    """
    path = context.workspace.checkpoint(variant.name)
    if not path.exists():
        return False
    key, meta = context.checkpoint_header(path)
    if key != checkpoint_key(context, variant):
        return False
    parent = parent_of(variant, context.config)
    if parent is None:
        return True
    if not valid_checkpoint(context, variant_named(parent)):
        return False
    parent_sha256 = context.sha256(context.workspace.checkpoint(parent))
    return bool(meta.get("parent_sha256") == parent_sha256)


def train_tasks(context: Context, names: list[str]) -> list[Task]:
    """Train the variants, and first whatever they start from.

    Raises:
        UsageError: the architecture lacks the stage that a variant prunes.
    """
    arch = context.config.arch
    for variant in with_parents(context, names):
        if variant.stage is not None and variant.stage > len(BLOCKS_PER_STAGE[arch]):
            raise UsageError(
                f"{variant.name} prunes stage {variant.stage}, and {arch} has "
                f"{len(BLOCKS_PER_STAGE[arch])}: name the other variants with --model"
            )
    return [_train_task(context, variant) for variant in with_parents(context, names)]


def _train_task(context: Context, variant: Variant) -> Task:
    epochs = planned_epochs(variant, context.config.train)
    parent = parent_of(variant, context.config)
    return Task(
        stage="train",
        name=task_name(variant.name),
        work=TRAIN_COST[variant.method] * epochs * len(context.data.train),
        is_done=lambda: valid_checkpoint(context, variant),
        run=lambda progress: _train(context, variant, progress),
        beside="accelerator",
        after=(task_name(parent),) if parent else (),
        uses=context.uses("accelerator"),
    )


def task_name(variant: str) -> str:
    """What the task that trains a variant is called."""
    return f"train {variant}"


def _train(context: Context, variant: Variant, progress: Progress) -> None:
    use_cpu_threads(TRAIN_THREADS)
    workspace = context.workspace
    parent: ResNet | None = None
    meta = {
        "dataset": context.data.name,
        "preset": context.config.preset,
        "seed": context.config.seed,
        "method": variant.method,
    }
    parent_name = parent_of(variant, context.config)
    if parent_name is not None:
        path = workspace.checkpoint(parent_name)
        parent = load_checkpoint(path).build()
        meta["parent"] = parent_name
        meta["parent_sha256"] = context.sha256(path)
    key = checkpoint_key(context, variant)
    partial = workspace.partial(f"train_{variant.name}")
    build = Build(
        variant=variant,
        config=context.config,
        data=context.data,
        parent=parent,
        key=f"{key} from {meta.get('parent_sha256', 'scratch')}",
        partial=partial,
        device=context.accelerator,
        progress=lambda done, total, note: progress(done / max(total, 1), note),
    )
    try:
        with _queue_of_its_own(context.accelerator):
            model = build_variant(build).cpu()
    except torch.OutOfMemoryError:
        raise HarnessError(
            f"training {variant.name} needs more memory than the GPU has: lower train.batch_size in"
            " harness.toml, or take --accelerator cpu"
        ) from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values()):
        partial.unlink(missing_ok=True)
        raise HarnessError(
            f"training {variant.name} diverged, its weights are not finite: lower train.lr "
            "(pp_lr, apot_lr) in harness.toml"
        )
    save_checkpoint(
        workspace.checkpoint(variant.name), model, variant=variant.name, key=key, meta=meta
    )
    partial.unlink(missing_ok=True)


def _queue_of_its_own(accelerator: torch.device) -> contextlib.AbstractContextManager[object]:
    """Work on a GPU that does not wait for that of another model's training."""
    if accelerator.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(accelerator))


def deployed_form(model: ResNet) -> nn.Module:
    """What is attacked and exported: batch norm folded, or the integer network."""
    return fold(model) if model.spec.bits is None else integerise(model)


def reference_form(model: ResNet) -> nn.Module:
    """PyTorch's side of every comparison: the trained model itself, or the integer network.

    A fake-quantised model's codes differ from any integer deployment's in a few places, so for
    APoT the integer network is the model, and fake quantisation only how it was trained.
    """
    return model if model.spec.bits is None else integerise(model)

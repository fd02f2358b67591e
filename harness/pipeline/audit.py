"""The audit: the arms' workspaces, built, crafted in and evaluated question by question.

Enters: the context of the audited workspace. Leaves: `audit/<arm>/` beside its `harness.toml`, each
a workspace like any other, and whose images which model got wrong. Checkpoints that do not depend
on an arm's change are taken from another arm, not trained again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from devices.local import LocalDevice
from harness.artefacts import write_atomic
from harness.audit.arms import ARMS, BASE, arm_named, config_of, in_seed
from harness.audit.contrasts import Meeting, Question
from harness.audit.questions import QUESTIONS, SEEDS
from harness.config import Config
from harness.config_file import to_toml
from harness.data.dataset import Dataset
from harness.pipeline.checkpoints import (
    checkpoint_key,
    train_tasks,
    valid_checkpoint,
    with_parents,
)
from harness.pipeline.context import Context
from harness.pipeline.experiment import attack_tasks
from harness.pipeline.exports import valid_export
from harness.pipeline.tasks import Task
from harness.pipeline.uap_files import valid_uap
from harness.pipeline.uap_names import transfer_names
from harness.pipeline.uaps import craft_tasks
from harness.records import CONTROLS, UsageError, variant_named
from harness.sampling import RunKey, by_machine
from harness.workspace import CONFIG_NAME, UapName, Workspace

STAGES = ("train", "export", "craft", "evaluate")
Wrong = npt.NDArray[np.bool_]
"""[N], of every evaluation image whether the model errs on it."""


@dataclass
class Audit:
    """The audited workspace and its arms."""

    context: Context
    _arms: dict[str, Context] = field(default_factory=dict)
    _data: dict[tuple[object, ...], Dataset] = field(default_factory=dict)
    _wrong: dict[tuple[Meeting, float | None], Wrong | None] = field(default_factory=dict)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Every question is asked at these, the one that headlines first."""
        craft = self.context.config.craft
        rest = (eps for eps in craft.transfer_budgets if eps != craft.reference_eps)
        return (craft.reference_eps, *rest)

    @property
    def folder(self) -> Path:
        """Where the arms are."""
        return self.context.workspace.root / "audit"

    def arm(self, name: str) -> Context:
        """The context of an arm; arms with the same images share them.

        Raises:
            UsageError: the arm would be evaluated on other images, or cannot be configured so.
        """
        if name == BASE:
            return self.context
        if name not in self._arms:
            config = config_of(arm_named(name), self.context.config)
            of = (config.craft.attack_images, config.eval.images, config.seed)
            if of not in self._data:
                self._data[of] = self._load(config)
            workspace = Workspace(self.folder / name, config)
            self._arms[name] = replace(self.context, workspace=workspace, loaded=self._data[of])
        return self._arms[name]

    def uap_name(self, meeting: Meeting, eps: float | None) -> UapName | None:
        """The perturbation of a meeting, as its arm calls it; None where there is none."""
        if meeting.source is None:
            return None
        context = self.arm(meeting.source_arm)
        # Of several crafting seeds the workspace's own, which comes last.
        name = next(n for n in reversed(transfer_names(context, meeting.source)) if n.eps == eps)
        own = meeting.attack == context.config.attack or meeting.source in CONTROLS
        return replace(name, attack="" if own else meeting.attack)

    def asked(self) -> list[Question]:
        """Every question, over the most seeds for which most of it is measured."""
        found = []
        for name, make in QUESTIONS.items():
            most = self._seeds_of(name)
            of_seeds = [make(seeds) for seeds in range(most, SEEDS - 1, -1)]
            # As much as there is, and of that the most seeds.
            found.append(max(of_seeds, key=self._measured_share))
        return found

    def run(self, question: Question) -> int:
        """Measure what a question needs and the stores lack. Returns how many tasks were run.

        Raises:
            TimeLimitReached: the deadline of the context is over.
        """
        self._wrong.clear()
        ran, waiting = 0, _in_order(question.meetings)
        for name in waiting:
            self._configure(name)
        while waiting:
            # What one arm trains another may take: that one waits for the next round.
            coming, now = set[str](), list[str]()
            for name in waiting:
                missing = self._adopt(self.arm(name), _variants(question, name))
                if not missing & coming:
                    now.append(name)
                    coming |= missing
            tasks = [task for name in now for task in self._preparations(question, name)]
            ran += self.context.build(tasks)
            waiting = [name for name in waiting if name not in now]
        arms = _in_order(question.meetings)
        tasks = [task for name in arms for task in self._evaluations(question, name)]
        # A stage after the other, so that all models are evaluated side by side.
        return ran + self.context.build(sorted(tasks, key=lambda task: STAGES.index(task.stage)))

    def wrong(self, meeting: Meeting, eps: float | None) -> Wrong | None:
        """What the model of a meeting got wrong at a budget; None where that is not measured."""
        at = (meeting, None if meeting.source is None else eps)
        if at not in self._wrong:
            there = self._is_there(meeting.victim_arm) and self._is_there(meeting.source_arm)
            self._wrong[at] = self._measured(*at) if there else None
        return self._wrong[at]

    def _measured(self, meeting: Meeting, eps: float | None) -> Wrong | None:
        context, uap = self.arm(meeting.victim_arm), self.uap_name(meeting, eps)
        onnx, uap_sha256 = context.workspace.onnx(meeting.victim), None
        if uap is not None:
            source = self.arm(meeting.source_arm)
            if not valid_uap(source, uap):
                return None
            uap_sha256 = source.sha256(source.workspace.uap(uap))
        if valid_export(context, variant_named(meeting.victim)) is None:
            return None  # also where the file is of another configuration
        if not context.workspace.results.exists():
            return None
        model, evaluation = context.sha256(onnx), context.data.digests["evaluation"]
        with context.open_store() as store:
            runs = by_machine(
                store.predictions_of(model_sha256=model, evaluation_sha256=evaluation),
                images={evaluation: len(context.data.evaluation)},
            )
        key = RunKey(model, evaluation, uap_sha256, "local", False, "onnxruntime")
        found = next((run for run in runs.get(key, []) if run.complete), None)
        if found is None:
            return None
        wrong: Wrong = found.predictions != context.data.evaluation.labels
        return wrong

    def _load(self, config: Config) -> Dataset:
        workspace = Workspace(self.context.workspace.root, config)
        data = replace(self.context, workspace=workspace).data
        if data.digests["evaluation"] != self.context.data.digests["evaluation"]:
            raise UsageError(
                f"eval.images = {config.eval.images} draws other images for another seed, and the "
                "audit compares seeds on the same ones: set eval.images = 0 in harness.toml"
            )
        return data

    def _seeds_of(self, question: str) -> int:
        """The most seeds all of whose arms are there; as many as usual where it was not asked."""
        make, most = QUESTIONS[question], SEEDS
        while (more := make(most + 1)) != make(most) and all(
            self._is_there(arm) for arm in _in_order(more.meetings)
        ):
            most += 1
        return most

    def _measured_share(self, question: Question) -> float:
        met = list(itertools.product(question.meetings, self.budgets))
        return sum(self.wrong(meeting, eps) is not None for meeting, eps in met) / len(met)

    def _is_there(self, arm: str) -> bool:
        return arm == BASE or (self.folder / arm / CONFIG_NAME).exists()

    def _configure(self, name: str) -> None:
        context = self.arm(name)
        path, text = context.workspace.root / CONFIG_NAME, to_toml(context.config).encode()
        if name != BASE and not (path.exists() and path.read_bytes() == text):
            write_atomic(path, text)

    def _preparations(self, question: Question, arm: str) -> list[Task]:
        """Training and crafting of an arm."""
        context = self.arm(arm)
        mine = [m for m in question.meetings if m.source_arm == arm]
        uaps = [self.uap_name(m, eps) for eps in self.budgets for m in mine]
        tasks = train_tasks(context, _variants(question, arm))
        tasks += craft_tasks(context, [uap for uap in uaps if uap is not None])
        return _named_by(arm, tasks)

    def _evaluations(self, question: Question, arm: str) -> list[Task]:
        context, tasks = self.arm(arm), []
        mine = [m for m in question.meetings if m.victim_arm == arm]
        for victim in dict.fromkeys(m.victim for m in mine):
            paths = []
            for meeting, eps in itertools.product(mine, self.budgets):
                uap = self.uap_name(meeting, eps)
                if meeting.victim == victim and uap is not None:
                    # Whole paths: this arm's own file of the same name is another.
                    paths.append(str(self.arm(meeting.source_arm).workspace.uap(uap).absolute()))
            tasks += attack_tasks(
                context,
                variants=[victim],
                onnx_files=[],
                uaps=paths,
                device=LocalDevice(),
                device_images=0,  # contrasts pair images: all of them, or there are none to pair
            )[0]
        return _named_by(arm, tasks)

    def _adopt(self, context: Context, variants: Iterable[str]) -> set[str]:
        """Take valid checkpoints of the same key from other arms, parents first.

        Returns:
            The keys of those that no arm has.
        """
        others, missing = [self.context, *self._arms.values()], set[str]()
        for variant in with_parents(context, list(variants)):
            if valid_checkpoint(context, variant):
                continue
            key = checkpoint_key(context, variant)
            theirs = (
                other.workspace.checkpoint(variant.name)
                for other in others
                if valid_checkpoint(other, variant) and checkpoint_key(other, variant) == key
            )
            found = next(theirs, None)
            if found is None:
                missing.add(key)
            else:
                write_atomic(context.workspace.checkpoint(variant.name), found.read_bytes())
        return missing


def _named_by(arm: str, tasks: Sequence[Task]) -> list[Task]:
    """Tasks of several arms in one list: each knows its own."""
    if arm == BASE:
        return list(tasks)
    return [
        replace(task, name=f"{arm}: {task.name}", after=tuple(f"{arm}: {t}" for t in task.after))
        for task in tasks
    ]


def _in_order(meetings: Sequence[Meeting]) -> list[str]:
    """The arms that take part, the audited workspace first, then by seed."""
    part = {arm for m in meetings for arm in (m.victim_arm, m.source_arm)}
    kinds = [BASE, *(arm.name for arm in ARMS)]
    offsets = range(1 + max(arm_named(name).seed_offset for name in part))
    return [name for offset in offsets for kind in kinds if (name := in_seed(kind, offset)) in part]


def _variants(question: Question, arm: str) -> list[str]:
    """What an arm trains for a question."""
    found = [m.victim for m in question.meetings if m.victim_arm == arm]
    sources = [m.source for m in question.meetings if m.source_arm == arm]
    found += [s for s in sources if s is not None and s not in CONTROLS]
    return list(dict.fromkeys(found))

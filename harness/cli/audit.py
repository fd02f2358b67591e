"""Command `audit`: which undocumented choices of the paper carry its conclusions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.options import (
    accelerator_option,
    data_dir_option,
    json_option,
    make_context,
    time_limit_option,
    working_in,
    workspace_option,
)
from harness.records import UsageError

if TYPE_CHECKING:
    from harness.audit.contrasts import Question
    from harness.pipeline.audit import Audit
    from harness.pipeline.context import Context
    from reports.audit import Answer


@click.command()
@click.option(
    "--question", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated."
)
@click.option(
    "--seeds",
    type=click.IntRange(3, 20),
    metavar="N",
    help="Training seeds of what is trained otherwise; 3 unless given.",
)
@click.option("--list", "listing", is_flag=True, help="Print the questions, stop.")
@workspace_option
@accelerator_option
@data_dir_option
@time_limit_option
@json_option
def audit(
    names: tuple[str, ...],
    seeds: int | None,
    listing: bool,
    root: Path,
    accelerator: str,
    data_dir: Path | None,
    time_limit_s: float | None,
    as_json: bool,
) -> None:
    """Change one choice of the experiment at a time, and say what it changes.

    The paper's code makes choices that the paper does not mention: UAPs crafted on the test images,
    batch norm in train mode, ResNet-20 for the quantised models, one training seed a method. Each
    is an arm: a workspace in audit/ that differs by that choice, built as far as a question needs
    it, and asked at every budget of craft.transfer_eps. Writes audit/audit.md and audit/audit.json
    after every question, each over the most seeds it was measured for.

    Works on any workspace, and takes from `harness run` what that has built. All arms together
    train as long as some forty models do; every further seed as some ten.

    \b
    Examples:
      harness audit --list
      harness audit --question split --question seeds
      harness audit --question methods --seeds 5     over five training runs of every method
      harness audit --time-limit 9m                  again and again, while it ends with 124
    """
    from harness.audit.questions import QUESTIONS, SEEDS
    from harness.pipeline.audit import Audit
    from harness.workspace import open_workspace
    from reports.audit import json_text

    if listing and as_json:
        questions = [{"name": name, "title": make(SEEDS).title} for name, make in QUESTIONS.items()]
        click.echo(json.dumps(questions, indent=2))
        return
    if listing:
        for name, make in QUESTIONS.items():
            click.echo(f"{name:14} {make(SEEDS).title}")
        return
    chosen = _chosen(names, SEEDS if seeds is None else seeds)
    workspace = open_workspace(root)
    context = make_context(
        workspace, accelerator=accelerator, data_dir=data_dir, time_limit_s=time_limit_s
    )
    measured = Audit(context)
    with working_in(workspace):
        for question in chosen:
            context.reporter.note(f"{question.name}: {question.title}")
            measured.run(question)
            _write(context, measured)
        found = _answers(measured)
    if as_json:
        click.echo(json_text(found, facts=_facts(context)), nl=False)
    else:
        click.echo(str(measured.folder / "audit.md"))


def _chosen(names: tuple[str, ...], seeds: int) -> list[Question]:
    from harness.audit.questions import QUESTIONS

    for name in names:
        if name not in QUESTIONS:
            raise UsageError(f"no question {name!r}: choose from {', '.join(QUESTIONS)}")
    return [make(seeds) for name, make in QUESTIONS.items() if not names or name in names]


def _answers(measured: Audit) -> list[Answer]:
    from reports.audit import answers

    return answers(measured.asked(), measured.wrong, budgets=measured.budgets)


def _write(context: Context, measured: Audit) -> None:
    from harness.artefacts import write_atomic
    from reports.audit import json_text, markdown_text

    found, facts = _answers(measured), _facts(context)
    write_atomic(measured.folder / "audit.md", markdown_text(found, facts=facts).encode())
    write_atomic(measured.folder / "audit.json", json_text(found, facts=facts).encode())


def _facts(context: Context) -> list[str]:
    config, data = context.config, context.data
    budgets = " and ".join(f"{eps:g}" for eps in config.craft.transfer_budgets)
    return [
        f"{data.name}, {len(data.evaluation):,} evaluation images; preset {config.preset}: "
        f"{config.arch} of width {config.width}, {config.train.epochs} epochs, seed {config.seed}.",
        f"UAPs at eps {budgets}: attack {config.attack}, protocol "
        f"{config.protocol}, {config.craft.attack_images:,} attack images, {config.craft.epochs} "
        "epochs, unless the contrast says otherwise. Measured with onnxruntime on the exported "
        "models.",
    ]

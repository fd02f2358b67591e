"""Commands that read: `report`, `results`, `doctor`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from harness.cli.options import json_option, workspace_option
from harness.records import DEPLOYABLE, HarnessError, UsageError


@click.command()
@workspace_option
@click.option("--device", "device_name", help="The device of the headline table.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: report."
)
@click.option(
    "--baseline",
    metavar="NAME",
    help="The model that the others are compared with.  [default: full; of your own models alone, "
    "the one measured first]",
)
@click.option(
    "--beside",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="WORKSPACE",
    help="A workspace on the paper's other data set: judges what the paper says of both.",
)
@json_option
def report(
    root: Path,
    device_name: str | None,
    out: Path | None,
    baseline: str | None,
    beside: Path | None,
    as_json: bool,
) -> None:
    """Write the report from the results store: HTML, CSV, JSON, Markdown, LaTeX.

    \b
    Examples:
      harness report
      harness report --device local --out /tmp/report
      harness report --baseline mynet
      harness report --beside ../svhn
    """
    from contextlib import ExitStack
    from dataclasses import asdict

    from harness.store import open_store
    from harness.workspace import open_workspace
    from reports.report import write_report

    workspace = open_workspace(root)
    with ExitStack() as opened:
        store = opened.enter_context(open_store(workspace.results, create=False))
        other = None
        if beside is not None:
            there = open_workspace(beside).results
            other = opened.enter_context(open_store(there, create=False))
        paths = write_report(
            store,
            out or workspace.report,
            device=device_name,
            beside=other,
            baseline=baseline,
        )
    if as_json:
        written = {name: str(path) for name, path in asdict(paths).items() if path is not None}
        click.echo(json.dumps(written))
    else:
        click.echo(str(paths.html))


@click.command()
@workspace_option
@click.option("--model", "models", multiple=True, metavar="VARIANT", help="Only these victims.")
@click.option("--runtime", type=click.Choice(["onnxruntime", "torch"]), help="Only this runtime.")
@json_option
def results(root: Path, models: tuple[str, ...], runtime: str | None, as_json: bool) -> None:
    """Print every result: one row per model, device, runtime and perturbation.

    Below, where there is something to say: means over crafting seeds, with an interval that covers
    them too; whether gradient masking makes a white-box number unbelievable. Rates beside each
    other are not tested here: which differences are shown to be real, the report says.

    \b
    Examples:
      harness results
      harness results --model q4 --runtime onnxruntime
      harness results --json > results.json
    """
    from harness.cli.results_table import print_results
    from harness.results import replaced_uaps, result_rows, superseded
    from harness.store import open_store
    from harness.workspace import open_workspace
    from reports.masking_table import rows_of

    workspace = open_workspace(root)
    with open_store(workspace.results, create=False) as store:
        rows = result_rows(store)
        derived = rows_of(store, rows)
        hidden, replaced, current = superseded(store), replaced_uaps(store), store.models()
        kept_uaps = Counter(
            replaced[stored.run.uap_sha256]
            for stored in store.predictions()
            if stored.run.uap_sha256 in replaced and stored.run.model_sha256 in current
        )
    if not rows and not as_json:
        raise HarnessError(f"{workspace.results} has no results yet: run `harness run` first")
    measured = list(dict.fromkeys(row.variant for row in rows))
    for name in models:
        if name not in (*measured, *DEPLOYABLE):
            known = ", ".join(measured or DEPLOYABLE)
            raise UsageError(f"unknown variant {name!r}: choose from {known}")
    kept = [
        (row, values)
        for row, values in zip(rows, derived, strict=True)
        if (not models or row.variant in models) and (runtime is None or row.runtime == runtime)
    ]
    if as_json:
        click.echo(json.dumps([values for _, values in kept], indent=2))
    else:
        print_results([row for row, _ in kept], derived=[values for _, values in kept])
    if hidden:
        runs = ", ".join(f"{count:,} of {name}" for name, count in sorted(hidden.items()))
        click.echo(f"Kept and not shown: runs on files exported earlier ({runs})", err=True)
    if kept_uaps:
        runs = ", ".join(f"{count:,} of {name}" for name, count in sorted(kept_uaps.items()))
        text = f"Kept and not shown: runs under perturbations crafted earlier ({runs})"
        click.echo(text, err=True)


@click.command()
@workspace_option
@json_option
def doctor(root: Path, as_json: bool) -> None:
    """Check this machine: versions, GPU, data, devices, workspace; say what to fix.

    Exit code 1 when something needs fixing.

    \b
    Examples:
      harness doctor
      harness doctor --json
    """
    from dataclasses import asdict

    from harness.doctor import examine

    findings = examine(root)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "note": "note", "problem": "FIX "}[finding.level]
            click.echo(f"{mark} {finding.subject}: {finding.text}")
    problems = [finding for finding in findings if finding.level == "problem"]
    if problems:
        raise HarnessError(f"{len(problems)} to fix: {', '.join(p.subject for p in problems)}")

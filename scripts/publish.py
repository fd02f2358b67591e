"""Keep a finished workspace as a published result: everything the report says, in a few megabytes.

Enters: a workspace that `harness run` finished, and a folder. Leaves in the folder: the
configuration, the results store (raw predictions, timings, perturbations; compressed), the report
made from it, every perturbation file, and how it was made. `--again FOLDER` makes the report of a
published store anew, for when the report itself changed. `--audit` keeps what `harness audit`
wrote.

    python scripts/publish.py workspace reports/published/cifar10 --title "CIFAR-10, full scale"
    python scripts/publish.py --again reports/published/cifar10
    python scripts/publish.py --audit workspace reports/published --command "harness audit"

`--beside FOLDER` names the published run on the paper's other data set, for its claims about both.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path

from harness.records import PredictionRun
from harness.store import Store, open_store
from reports.audit import answers_in, json_text, markdown_text
from reports.report import write_report

STORE = "results.db.xz"
UAPS = "uaps.tar.xz"
TEMPLATE = """\
# {title}

{note}

| | |
|---|---|
| commit | {commits} |
| measured | {first} to {last} |
| hardware | {machines} |
| PyTorch, onnxruntime | {versions} |
| dataset | {dataset}: {images:,} evaluation images, sha256 {digest} |
| prediction runs | {runs:,} |

Made by, with the data file beside `harness.toml`:

```console
$ {command}
$ python scripts/publish.py . {folder}{published_beside}
```

`harness.toml` holds every seed and setting. The report, from the stored predictions alone:

```console
$ xz --decompress --keep --force {store}{other} && harness report --workspace . --out report{beside}
```

- `report/index.html`: the report; beside it CSV, JSON, Markdown, LaTeX
- `{store}`: every raw prediction and timing (SQLite)
- `{uaps}`: every perturbation, as `harness attack-device --uap` takes it
"""


MADE = "\n## How it was made\n"
AUDIT_TEMPLATE = """
## How it was made

With [audit.toml](audit.toml) as `harness.toml`, and the data file beside it:

```console
{commands}
```

| | |
|---|---|
| commit | {commits} |
| measured | {first} to {last} |
| hardware | {machines} |
| PyTorch, onnxruntime | {versions} |
| prediction runs | {runs:,}, those of the audited workspace included |

Every number and contrast as data: [audit.json](audit.json).
"""


def publish(
    workspace: Path,
    folder: Path,
    *,
    title: str,
    note: str,
    beside: Path | None = None,
    command: str = "harness run",
) -> None:
    """Write the folder; an older one of the same name is replaced. `command` made the workspace."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(workspace / "harness.toml", folder / "harness.toml")
    with tempfile.TemporaryDirectory() as scratch:
        compact = Path(scratch) / "results.db"
        source = sqlite3.connect(workspace / "results.db")
        source.execute("VACUUM INTO ?", (str(compact),))
        source.close()
        packed = lzma.compress(compact.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
        (folder / STORE).write_bytes(packed)
        with open_store(compact, create=False) as store:
            facts = _facts([store])
    (folder / UAPS).write_bytes(_uaps(workspace / "cache"))
    again(folder, beside)
    name = beside.name if beside else ""
    text = TEMPLATE.format(
        title=title, note=note, command=command, folder=folder.name, store=STORE, uaps=UAPS,
        **facts,
        published_beside=f" --beside {name}" if name else "",
        beside=f" --beside ../{name}" if name else "",
        other=f" ../{name}/{STORE}" if name else "",
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def again(folder: Path, beside: Path | None = None) -> None:
    """The report of the published store."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:

        def unpacked(where: Path) -> Store:
            file = Path(scratch) / f"{where.name}.db"
            file.write_bytes(lzma.decompress((where / STORE).read_bytes()))
            return opened.enter_context(open_store(file, create=False))

        store, other = unpacked(folder), unpacked(beside) if beside else None
        shutil.rmtree(folder / "report", ignore_errors=True)
        write_report(store, folder / "report", beside=other)


def _uaps(cache: Path) -> bytes:
    """Reproducible: sorted names, no times, no owners."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for path in sorted(cache.glob("*_eps*.pt")):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def publish_audit(workspace: Path, folder: Path, *, commands: list[str]) -> None:
    """`audit.md` and `audit.json`, with how they were made: the configuration as `audit.toml`."""
    audit = workspace / "audit"
    with ExitStack() as opened:
        files = [workspace / "results.db", *sorted(audit.glob("*/results.db"))]
        facts = _facts([opened.enter_context(open_store(f, create=False)) for f in files])
    said = "\n".join(f"$ {command}" for command in commands)
    text = AUDIT_TEMPLATE.format(**{**facts, "commands": said})
    shutil.copyfile(workspace / "harness.toml", folder / "audit.toml")
    written = (audit / "audit.md").read_text(encoding="utf-8")
    (folder / "audit.md").write_text(written + text, encoding="utf-8")
    shutil.copyfile(audit / "audit.json", folder / "audit.json")


def audit_again(published: Path) -> None:
    """`audit.md` and `audit.json` said anew from the published numbers."""
    found, facts = answers_in(published.read_text(encoding="utf-8"))
    written = published.with_name("audit.md")
    made = written.read_text(encoding="utf-8").partition(MADE)[2]
    written.write_text(markdown_text(found, facts=facts) + MADE + made, encoding="utf-8")
    published.write_text(json_text(found, facts=facts), encoding="utf-8")


def _facts(stores: list[Store]) -> dict[str, object]:
    """What they have in common, and every commit and machine behind them."""
    stored = [one for store in stores for one in store.predictions()]
    runs: list[PredictionRun] = [one.run for one in stored]
    newest = list(stores[0].evaluation_sets().values())[-1]
    when = sorted(one.created_at for one in stored)
    return {
        "commits": ", ".join(sorted({one.git_commit or "unknown" for one in stored})),
        "first": when[0][:16],
        "last": when[-1][:16],
        "machines": "; ".join(sorted({_machine(r) for r in runs} - {""})),
        "versions": ", ".join(
            sorted({f"{r.runtime} {r.machine.runtime_version}" for r in runs}, reverse=True)
        ),
        "dataset": newest.dataset,
        "images": len(newest.labels),
        "digest": newest.sha256[:16],
        "runs": len(runs),
    }


def _machine(run: PredictionRun) -> str:
    """What onnxruntime ran on, or the GPU that PyTorch had; else nothing new."""
    if run.runtime == "onnxruntime":
        return f"{run.machine.cpu}, {run.machine.cores} cores"
    return run.machine.cpu if run.machine.extra.get("accelerator") == "cuda" else ""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workspace", nargs="?", type=Path)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--title", default="Published results")
    parser.add_argument("--note", default="")
    parser.add_argument("--again", type=Path, metavar="FOLDER")
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--command", action="append", help="as it was run; may be repeated")
    parser.add_argument("--beside", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if given.again is not None and given.again.name == "audit.json":
        audit_again(given.again)
    elif given.again is not None:
        again(given.again, given.beside)
    elif given.workspace is None or given.folder is None:
        parser.error("name a workspace and a folder, or --again FOLDER")
    elif given.audit:
        publish_audit(given.workspace, given.folder, commands=given.command or ["harness audit"])
    else:
        publish(
            given.workspace,
            given.folder,
            title=given.title,
            note=given.note,
            beside=given.beside,
            command=" && ".join(given.command or ["harness run"]),
        )


if __name__ == "__main__":
    main()

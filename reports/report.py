"""`write_report`: the store in, six files out; two more where the paper has the data set.

Enters: an open `Store` and a folder. Leaves: `index.html`, `results.csv`, `results.json`,
`report.md`, `tables.tex`, `masking.json`, and for CIFAR-10 and SVHN `paper.html` and `paper.json`,
each written whole or not at all. The same store gives the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harness.records import HarnessError
from harness.store import Store


@dataclass(frozen=True)
class ReportPaths:
    """Where the files of a report are."""

    html: Path
    csv: Path
    json: Path
    markdown: Path
    latex: Path
    masking: Path
    paper: Path | None = None
    """The page against the paper, for CIFAR-10 and SVHN."""
    paper_json: Path | None = None


def write_report(
    store: Store,
    out_dir: Path,
    *,
    device: str | None = None,
    beside: Store | None = None,
    baseline: str | None = None,
) -> ReportPaths:
    """Write the report of everything in `store` into `out_dir`, creating it.

    Args:
        store: what to report.
        out_dir: where.
        device: the headline is about it; by default `local`, else the device with most rows.
        baseline: the model that the others are compared with; `build_view` says which by default.
        beside: a run on the other of the paper's two data sets, for its claims about both.

    Raises:
        HarnessError: no results yet, `beside` is not of the other data set, or the folder cannot be
            written.
        UsageError: no results of that device or baseline.
    """
    # matplotlib and jinja2 wait until there is something to draw.
    from reports import masking_table, page, tables
    from reports.paper.page import paper_files
    from reports.selection import build_view

    view = build_view(store, device=device, baseline=baseline)
    against = paper_files(view, build_view(beside, device=device) if beside else None)
    paper, paper_json = out_dir / "paper.html", out_dir / "paper.json"
    paths = ReportPaths(
        html=out_dir / "index.html",
        csv=out_dir / "results.csv",
        json=out_dir / "results.json",
        markdown=out_dir / "report.md",
        latex=out_dir / "tables.tex",
        masking=out_dir / "masking.json",
        paper=paper if against else None,
        paper_json=paper_json if against else None,
    )
    texts = {
        paths.csv: tables.csv_text(view),
        paths.json: tables.json_text(view),
        paths.markdown: tables.markdown_text(view),
        paths.latex: tables.latex_text(view),
        paths.masking: masking_table.masking_text(view),
    }
    if against:
        texts |= {paper_json: against.json, paper: against.html}
    # Last: who sees the page finds what lies beside it.
    texts[paths.html] = page.html_text(view, paper=against.sentence if against else "")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            _write(path, text)
        for path in () if against else (paper, paper_json):
            path.unlink(missing_ok=True)  # of another data set
    except OSError as error:
        reason = error.strerror or str(error)
        raise HarnessError(
            f"cannot write the report to {out_dir} ({reason}): give a folder you can write"
        ) from None
    return paths


def _write(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

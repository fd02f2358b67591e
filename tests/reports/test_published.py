"""What is published is what the stored predictions say: the report comes out of them again."""

from __future__ import annotations

import lzma
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.store import open_store
from reports.audit import answers_in, json_text, markdown_text
from reports.report import write_report

PUBLISHED = Path(__file__).resolve().parents[2] / "reports" / "published"
FOLDERS = sorted(path.parent for path in PUBLISHED.glob("*/results.db.xz"))
BESIDE = {"cifar10_reduced": "svhn_partial", "svhn_partial": "cifar10_reduced"}
"""The run on the paper's other data set that a report was made beside."""
AGAIN = "the report changed: python scripts/publish.py --again reports/published/{}, and look at it"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_published_report_is_made_of_the_published_store(folder: Path, tmp_path: Path) -> None:
    stores = []
    other = BESIDE.get(folder.name)
    for where in (folder, *([PUBLISHED / other] if other else [])):
        stored = tmp_path / f"{where.name}.db"
        stored.write_bytes(lzma.decompress((where / "results.db.xz").read_bytes()))
        stores.append(stored)
    with ExitStack() as opened:
        store, *beside = (opened.enter_context(open_store(s, create=False)) for s in stores)
        write_report(store, tmp_path / "report", beside=beside[0] if beside else None)
    names = {path.name for path in (folder / "report").iterdir()}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    for name in sorted(names):
        same = (tmp_path / "report" / name).read_bytes() == (folder / "report" / name).read_bytes()
        again = AGAIN.format(
            folder.name + (f" --beside reports/published/{other}" if other else "")
        )
        assert same, f"{name}: {again}"


def test_the_published_audit_is_said_of_its_published_numbers() -> None:
    text = (PUBLISHED / "audit.json").read_text(encoding="utf-8")
    found, facts = answers_in(text)
    assert json_text(found, facts=facts) == text, AGAIN.format("audit.json")
    written = (PUBLISHED / "audit.md").read_text(encoding="utf-8")
    said = markdown_text(found, facts=facts)
    assert written.startswith(said), AGAIN.format("audit.json")
    assert written[len(said) :].startswith("\n## How it was made\n")


def test_nothing_large_is_published() -> None:
    size = sum(path.stat().st_size for path in PUBLISHED.rglob("*") if path.is_file())
    assert size < 14 * 2**20, "a clone stays small: leave out what can be made again"

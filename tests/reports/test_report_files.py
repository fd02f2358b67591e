"""The files as written: complete, escaped, offline, deterministic, true to the rows."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.records import HarnessError
from harness.results import result_rows
from reports import tables, tradeoff
from reports.masking_table import DERIVED_COLUMNS
from reports.portable import portable
from reports.report import write_report
from reports.selection import build_view
from tests.reports import synthetic

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, links, resources and table text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.headings: list[int] = []
        self.images_without_alt = 0
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values.get("href")))
        if tag == "img":
            self.images_without_alt += not values.get("alt")
        for name in ("src", "href", "xlink:href"):
            if tag != "a" and values.get(name):
                self.resources.append(str(values[name]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_page_is_well_formed_and_every_anchor_exists_once(full):
    page = parse(full.html)
    assert len(page.ids) == len(set(page.ids))
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(page.ids)
    assert {"answer", "conclude", "curves", "transfer", "targeted", "pictures", "gap"} <= targets
    assert page.images_without_alt == 0
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert '<html lang="en">' in full.html
    assert full.html.count("<svg") == full.html.count('role="img" aria-label="')


def test_page_loads_nothing_from_anywhere(full):
    page = parse(full.html)
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.resources)
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert "http://" not in full.html
    assert "https://" not in full.html
    assert "@import" not in full.html
    assert not re.search(r"url\((?!#)", full.html)
    assert len(full.html) < 3_000_000


def test_sections_come_in_the_promised_order(full):
    order = ["answer", "conclude", "curves", "transfer", "targeted", "pictures", "gap", "method"]
    places = [full.html.index(f'<section id="{anchor}"') for anchor in order]
    assert places == sorted(places)


def test_numbers_of_the_trade_off_table_are_the_rows(full):
    rows = [r for r in result_rows(full.store) if r.runtime == "onnxruntime"]
    head = full.html.index('<table class="tradeoff">')
    table = full.html[head : full.html.index("</table>", head)]
    for name in synthetic.PAPER_ORDER:
        own = [r for r in rows if r.variant == name]
        clean = next(r for r in own if r.uap_source is None)
        white = next(r for r in own if r.uap_source == name and r.eps == 10 and r.target is None)
        others = [
            r for r in own
            if r.eps == 10 and r.target is None and r.uap_source in synthetic.PAPER_ORDER
            and r.uap_source != name
        ]  # fmt: skip
        label = synthetic.variant_named(name).label
        line = table[table.index(f"</span>{label}<") :]
        line = re.sub(r"</?strong>", "", line[: line.index("</tr>")])
        cells = re.findall(r'<td class="[^"]*">([^<]*)(?:<small>([^<]*)</small>)?</td>', line)
        low, high = clean.clean_accuracy_low, clean.clean_accuracy_high
        assert cells[0] == (
            f"{100 * clean.clean_accuracy:.1f}",
            between(low, high),
        )
        assert cells[2][0] == f"{100 * white.uer:.1f}"
        assert cells[2][1] == between(white.uer_low, white.uer_high)
        assert cells[3][0] == f"{100 * max(r.uer for r in others):.1f}"
        assert cells[4][0] == f"{100 * own_uer(own, 'random'):.1f}"
        assert cells[5][0] == f"{100 * own_uer(own, 'chessboard'):.1f}"
        assert cells[6][0] == f"{100 * sum(synthetic.TSR[name]) / 10:.1f}"
        assert cells[7][0] == f"{clean.latency_p50_ms:.2f}"
        assert "unstable" in cells[7][1] if name == "pp3" else "valid" in cells[7][1]


def between(low, high):
    return f"{100 * low:.1f}\u2013{100 * high:.1f}"


def own_uer(rows, source):
    return next(r.uer for r in rows if r.uap_source == source and r.eps == 10)


def test_csv_and_json_give_the_rows_back(full):
    expected = portable([asdict(row) for row in result_rows(full.store)])
    written = json.loads(full.paths.json.read_text())
    assert [{k: row[k] for k in expected[0]} for row in written] == expected
    assert {k for row in written for k in row} - set(expected[0]) == set(DERIVED_COLUMNS)
    # One verdict a variant, on its white-box row at the reference budget; one crafting seed.
    assert "Gradient masking, sign by sign" in full.html
    judged = [row for row in written if row["masking"] is not None]
    assert [row["variant"] for row in judged] == list(synthetic.PAPER_ORDER)
    assert all(row["uap_source"] == row["variant"] and row["eps"] == 10.0 for row in judged)
    assert all(row["seeds"] is None and row["uer_mean"] is None for row in written)
    with full.paths.csv.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(expected)
    for got, row in zip(read, written, strict=True):
        for name, value in row.items():
            if value is None:
                assert got[name] == ""
            elif isinstance(value, bool):
                assert got[name] == str(value)
            else:
                assert type(value)(got[name]) == value


def test_the_same_store_gives_the_same_bytes(full, tmp_path):
    again = write_report(full.store, tmp_path / "again")
    for first, second in zip(asdict(full.paths).values(), asdict(again).values(), strict=True):
        assert (first and first.read_bytes()) == (second and second.read_bytes())
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "index.html", "masking.json", "report.md", "results.csv", "results.json", "tables.tex",
    ]  # fmt: skip


def test_markdown_and_latex_hold_the_same_table(full):
    view = build_view(full.store)
    table = tradeoff.tradeoff_table(view)
    markdown, latex = full.paths.markdown.read_text(), full.paths.latex.read_text()
    for row in table.rows:
        assert f"| {row.label} | {row.cells[0].text}" in markdown
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 2
    body = [line for line in latex.splitlines() if line.endswith(r" \\") and " & " in line]
    assert {line.count(" & ") for line in body if line.startswith("Full")} == {14, 12}


def test_latex_and_markdown_escape_their_special_characters():
    assert tables.escape_latex("50% of a_b & c") == r"50\% of a\_b \& c"
    assert tables.escape_latex("\\{$#~^") == (
        r"\textbackslash{}\{\$\#\textasciitilde{}\textasciicircum{}"
    )
    assert tables.escape_markdown("a|b <i>_x_") == r"a\|b \<i\>\_x\_"


def test_strings_of_the_store_are_never_markup(planter, store, tmp_path):
    evil = '<script>alert("x")</script>--> $x_1$ & %'
    classes = (evil, "\ud800broken", "漢字", "x\ny", *synthetic.NAMES[4:])
    p = planter("full", classes=classes, note=evil, dataset=evil)
    store.add_model(
        synthetic.model("full", sha256=synthetic.sha("evil"), variant=evil, method=evil,
                        manifest={"notes": evil, "slimming": {evil: [evil]}})
    )  # fmt: skip
    synthetic.add_variant(p, "full")
    runs = [p.run("full", u, p.erring(0.4, "evil")) for u in (None, synthetic.uap("full", 10.0))]
    changed = [type(run)(**{**run.__dict__, "model_sha256": synthetic.sha("evil")}) for run in runs]
    store.add_prediction_runs(changed)
    paths = write_report(store, tmp_path / "report")
    html = paths.html.read_text(encoding="utf-8")
    page = parse(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "漢字" in html
    assert r"\&" in paths.latex.read_text(encoding="utf-8")
    assert "<script" not in paths.markdown.read_text(encoding="utf-8").replace(r"\<script", "")


@pytest.fixture
def small(planter, store):
    p = planter("full")
    store.add_prediction_runs([p.run("full", None, p.erring(0.1, "clean"))])
    return store


def test_unwritable_folder_is_one_line_and_leaves_nothing(small, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(HarnessError, match="cannot write the report") as caught:
        write_report(small, blocked / "report")
    assert "\n" not in str(caught.value)
    assert blocked.read_text() == "in the way"


def test_a_failed_replace_keeps_the_old_page_and_no_scraps(small, tmp_path, monkeypatch):
    out = tmp_path / "report"
    out.mkdir()
    (out / "index.html").write_text("old")

    def refuse(self: Path, target: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(HarnessError, match="No space left"):
        write_report(small, out)
    assert [p.name for p in out.iterdir()] == ["index.html"]
    assert (out / "index.html").read_text() == "old"

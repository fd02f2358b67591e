"""The files beside the page: CSV, JSON, Markdown, LaTeX.

Enters: a `View` and its sentences. Leaves: text. CSV and JSON hold every row of the store to 12
digits; Markdown and LaTeX hold the tables a person copies.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import fields

from harness.records import ResultRow
from harness.sources import LEAVE_ONE_OUT
from reports.advice import latency_caveat
from reports.black_box import black_box_table, black_box_text
from reports.estimates import where_measured
from reports.headline import headline
from reports.masking import Sentence
from reports.masking_table import DERIVED_COLUMNS, derived_columns, masking_table
from reports.method import TextTable
from reports.runtimes import runtime_table, runtime_text
from reports.tradeoff import Cell, Table, tradeoff_table
from reports.verdicts import conclusions
from reports.view import View
from reports.words import DASH, clean_text, epsilon, label_of, paper_rank, percent

Escape = Callable[[str], str]
COLUMNS = (*(field.name for field in fields(ResultRow)), *DERIVED_COLUMNS)


def csv_text(view: View) -> str:
    """Every field of every row, and what is derived of it; absent is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    rows = derived_columns(view, view.rows)
    writer.writerows({k: _inert(v) for k, v in row.items()} for row in rows)
    return buffer.getvalue()


def _inert(value: object) -> object:
    """Text a spreadsheet would run as a formula, quoted: names come from untrusted files."""
    starts_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if starts_formula else value


def json_text(view: View) -> str:
    """The array `harness results --json` prints."""
    return json.dumps(derived_columns(view, view.rows), indent=1) + "\n"


def transfer_matrix(
    view: View, eps: float | None
) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """(sources, [(victim, UER per source)]) at an eps.

    The baseline and the variants first, then the fleet and, under `LEAVE_ONE_OUT`, the fleet
    without the victim; controls last.
    """
    rows = {v.name: dict(v.by_eps.get(eps or 0.0, {})) for v in view.variants}
    for v in view.variants:
        if eps in v.left_out:
            rows[v.name][LEAVE_ONE_OUT] = v.left_out[eps]
    found = {source for attacked in rows.values() for source in attacked}
    sources = sorted(found, key=lambda s: (s != view.baseline_name, paper_rank(s)))
    return sources, [
        (name, [attacked[s].uer if s in attacked else None for s in sources])
        for name, attacked in rows.items()
    ]


# --- Markdown ------------------------------------------------------------------------------------


def escape_markdown(text: str) -> str:
    """Text that Markdown prints as it is, also inside a table."""
    for mark in "\\`*_{}[]<>#|!":
        text = text.replace(mark, "\\" + mark)
    return text


def markdown_text(view: View) -> str:
    """The page's words and tables, without its pictures."""
    parts = [
        f"# Robustness of {'compressed ' * (view.baseline_name == 'full')}models on the device",
        escape_markdown(headline(view)),
    ]
    parts.append(escape_markdown(where_measured(view)))
    parts += ["## Trade-off", _markdown_table(tradeoff_table(view))]
    for group in conclusions(view):
        lines = "\n".join(f"- {_bullet(sentence)}" for sentence in group.sentences)
        parts += [f"## {escape_markdown(group.title)}", lines]
        if group.anchor == "masking" and (signals := masking_table(view)) is not None:
            parts.append(_text_table(signals))
    for eps in view.transfer_budgets:
        sources, matrix = transfer_matrix(view, eps)
        head = ["Victim \\\\ source", *(escape_markdown(label_of(s)) for s in sources)]
        body = [
            [escape_markdown(label_of(victim)), *(percent(u, unit=False) for u in uers)]
            for victim, uers in matrix
        ]
        parts += [f"## Transfer: UER at {epsilon(eps)}, %", _pipes(head, body)]
        if (table := black_box_table(view, eps)) is not None:
            cells = [[escape_markdown(cell) for cell in row] for row in (table.head, *table.rows)]
            title = f"## Black box: the fleet without the victim, at {epsilon(eps)}"
            parts += [
                title,
                escape_markdown(black_box_text(view, eps)),
                _pipes(cells[0], cells[1:]),
            ]
    if (runtimes := runtime_table(view)) is not None:
        parts += ["## PyTorch, here, on other devices", escape_markdown(runtime_text(view))]
        parts.append(_text_table(runtimes))
    parts += [escape_markdown(note) for note in view.notes]
    return "\n\n".join(parts) + "\n"


def _bullet(sentence: Sentence) -> str:
    lead = f"**{escape_markdown(sentence.lead)}.** " if sentence.lead else ""
    return lead + escape_markdown(sentence.text)


def _markdown_table(table: Table) -> str:
    head = ["Variant"]
    for column in table.columns:
        title = f"{column.group.split(' (')[0]}: {column.title}".replace("\u00ad", "")
        head.append(escape_markdown(title + (f" ({column.note})" if column.note else "")))
    body = [
        [escape_markdown(row.label), *(_plain(cell, escape_markdown) for cell in row.cells)]
        for row in table.rows
    ]
    return _pipes(head, body)


def _text_table(table: TextTable) -> str:
    head = [escape_markdown(title) for title in table.head]
    return _pipes(head, [[escape_markdown(cell) for cell in row] for row in table.rows])


def _plain(cell: Cell, escape: Escape) -> str:
    return escape(cell.text + (f" ({cell.sub})" if cell.sub else ""))


def _pipes(head: list[str], body: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


# --- LaTeX ---------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\u00a0": "~",
    "\u00ad": r"\-",
    "\u2013": "--",
    "\u2212": "$-$",
    "\u2019": "'",
    "\u2026": r"\dots{}",
    "\u03b5": r"$\varepsilon$",
    "\u2713": r"(valid)",
    "\u2248": r"$\approx$",
    "\u2717": r"$\times$",
}


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def latex_text(view: View) -> str:
    """Booktabs tables: the trade-off, a transfer matrix for every eps. Needs graphicx too."""
    table = tradeoff_table(view)
    caption = f"Robustness and cost on {view.device.label}, {clean_text(view.evaluation.dataset)}."
    caption += f" {where_measured(view)}"
    caption += " Bold is the best of its column, not a tested difference."
    if caveat := latency_caveat(view):
        caption += f" Latency: {caveat}."
    head = " & ".join(["Variant", *(escape_latex(column.title) for column in table.columns)])
    groups, rules, start = [""], [], 2
    for title, span in table.groups:
        groups.append(rf"\multicolumn{{{span}}}{{c}}{{{escape_latex(title)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + span - 1}}}")
        start += span
    body = []
    for row in table.rows:
        cells = [_bold(cell) for cell in row.cells]
        body.append(" & ".join([escape_latex(row.label), *cells]) + r" \\")
    text = _float(
        caption,
        "tab:tradeoff",
        "l" + "r" * len(table.columns),
        [" & ".join(groups) + r" \\", "".join(rules), head + r" \\"],
        body,
    )
    for eps in view.transfer_budgets:
        sources, matrix = transfer_matrix(view, eps)
        head = " & ".join(["Victim", *(escape_latex(label_of(s)) for s in sources)])
        body = [
            " & ".join([escape_latex(label_of(v)), *(percent(u, unit=False) for u in uers)])
            .replace(DASH, "--") + r" \\"
            for v, uers in matrix
        ]  # fmt: skip
        caption = f"UER in % of each source's perturbation at {epsilon(eps)}."
        label = "tab:transfer" + ("" if eps == view.reference_eps else f"-eps{eps:g}")
        text += "\n" + _float(caption, label, "l" + "r" * len(sources), [head + r" \\"], body)
    if (runtimes := runtime_table(view)) is not None:
        text += "\n" + _text_float(runtimes, escape_latex(runtime_text(view)), "tab:runtimes")
    return "% Written by `harness report`; needs booktabs and graphicx.\n" + text


def _text_float(table: TextTable, caption: str, label: str) -> str:
    head, *body = (
        " & ".join(escape_latex(cell) for cell in row).replace(DASH, "--") + r" \\"
        for row in (table.head, *table.rows)
    )
    return _float(caption, label, "l" * len(table.head), [head], body)


def _bold(cell: Cell) -> str:
    text = escape_latex(cell.text)
    return rf"\textbf{{{text}}}" if cell.best else text


def _float(caption: str, label: str, columns: str, head: list[str], body: list[str]) -> str:
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"

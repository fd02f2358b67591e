"""The trade-off table, once, for the page, Markdown and LaTeX.

Enters: a `View`. Leaves: columns and formatted cells. Absent numbers are dashes, never zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from harness.records import ResultRow
from reports import words
from reports.advice import latency_caveat
from reports.masking import short_verdict
from reports.signals import masking_verdicts
from reports.view import GRADIENT_FREE, VariantView, View
from reports.words import DASH, epsilon, interval, label_of, percent, plural

VERDICT_MARKS = {"VALID": "\u2713", "UNSTABLE": "\u2248", "INVALID": "\u2717"}
MAX_TIED_BEST = 2
"""More variants than this sharing the best value: nobody stands out, so nobody is marked."""


@dataclass(frozen=True)
class Cell:
    """What is printed, a smaller second line, and whether it is the best of its column."""

    text: str
    sub: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column's heading; `group` heads several columns."""

    group: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class TableRow:
    """One variant."""

    name: str
    label: str
    colour: str
    method: str
    flags: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """The whole table; `groups` are (heading, number of columns)."""

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return tuple(spans)


Value = Callable[[VariantView], float | None]


@dataclass(frozen=True)
class _Spec:
    column: Column
    cell: Callable[[VariantView], Cell]
    value: Value | None = None
    """Given where the best (lowest) value is worth marking."""


def tradeoff_table(view: View) -> Table:
    """One row per variant, one column per thing a reader weighs."""
    specs = _specs(view)
    best = [_best(spec, view.variants) for spec in specs]
    doubts = {v.variant.name: short_verdict(v) for v in masking_verdicts(view)}
    return Table(
        columns=tuple(spec.column for spec in specs),
        rows=tuple(
            TableRow(
                name=variant.name,
                label=variant.label,
                colour=words.method_css(variant.method),
                method=words.method_name(variant.method),
                flags=(doubts[variant.name],) if doubts.get(variant.name) else (),
                cells=tuple(
                    replace(spec.cell(variant), best=variant.name in names)
                    for spec, names in zip(specs, best, strict=True)
                ),
            )
            for variant in view.variants
        ),
    )


def _specs(view: View) -> list[_Spec]:
    eps = "" if view.reference_eps is None else f" at {epsilon(view.reference_eps)}"
    caveat = latency_caveat(view)
    uer = f"UER{eps}, % (lower is better)"
    cost = f"Cost on {view.device.label}"
    targeted = ""
    if view.targeted_eps is not None and view.targeted_eps != view.reference_eps:
        targeted = f"at {epsilon(view.targeted_eps)}"
    classes = len(view.evaluation.classes)
    all_quick = caveat == words.QUICK and all(
        v.any_row.latency_mode == "quick"
        for v in view.variants
        if v.any_row.latency_p50_ms is not None
    )
    return [
        _Spec(Column("Clean", "Accuracy, %"), _accuracy, _negative_accuracy),
        _Spec(Column(uer, "Worst untar\u00adgeted"), lambda v: _uer(v.worst, source=True), _worst),
        _Spec(Column(uer, "White-box"), lambda v: _uer(v.white_box)),
        _Spec(Column(uer, "Worst transfer"), lambda v: _uer(v.worst_transfer, source=True)),
        _Spec(Column(uer, "Random sign"), lambda v: _uer(v.attacked.get("random"), brief=True)),
        _Spec(
            Column(uer, "Chess\u00adboard"),
            lambda v: _uer(v.attacked.get("chessboard"), brief=True),
        ),
        _Spec(Column("Targeted", "Mean TSR, %", targeted), lambda v: _mean_tsr(v, classes)),
        _Spec(
            Column(cost, "Latency p50, ms", words.QUICK if all_quick else ""),
            lambda v: _latency(v, label_quick=not all_quick),
            None if caveat else lambda v: v.any_row.latency_p50_ms,
        ),
        _Spec(
            Column(cost, "File"),
            lambda v: Cell(words.size(v.any_row.file_bytes)),
            lambda v: v.any_row.file_bytes,
        ),
        _Spec(Column(cost, "Params"), lambda v: Cell(words.count(v.any_row.params))),
        _Spec(
            Column(cost, "MACs"),
            lambda v: Cell(words.count(v.any_row.macs)),
            lambda v: v.any_row.macs,
        ),
        _Spec(Column(cost, "BOPs"), lambda v: Cell(words.count(v.any_row.bops))),
        _Spec(Column(cost, "Peak RSS"), lambda v: Cell(words.size(v.any_row.peak_rss_bytes))),
        _Spec(
            Column("Fidelity", "Torch agree\u00adment, %", "lowest"),
            lambda v: Cell(percent(v.lowest_agreement, unit=False)),
        ),
    ]


def _best(spec: _Spec, variants: Sequence[VariantView]) -> set[str]:
    if spec.value is None:
        return set()
    values = {v.name: value for v in variants if (value := spec.value(v)) is not None}
    if len(values) < 2:
        return set()
    lowest = min(values.values())
    names = {name for name, value in values.items() if value == lowest}
    return names if len(names) <= MAX_TIED_BEST else set()


def _accuracy(variant: VariantView) -> Cell:
    row = variant.clean
    if row is None:
        return Cell(DASH)
    return Cell(
        percent(row.clean_accuracy, unit=False),
        interval(row.clean_accuracy_low, row.clean_accuracy_high),
    )


def _negative_accuracy(variant: VariantView) -> float | None:
    row = variant.clean
    return None if row is None or row.clean_accuracy is None else -row.clean_accuracy


def _worst(variant: VariantView) -> float | None:
    return variant.worst.uer if variant.worst else None


def _uer(row: ResultRow | None, *, source: bool = False, brief: bool = False) -> Cell:
    if row is None:
        return Cell(DASH)
    text = percent(row.uer, unit=False)
    if source:
        if row.uap_source != row.variant:
            return Cell(text, label_of(row.uap_source or ""))
        return Cell(text, "no gradient" if row.attack in GRADIENT_FREE else "its own")
    return Cell(text, "" if brief else interval(row.uer_low, row.uer_high))


def _mean_tsr(variant: VariantView, classes: int) -> Cell:
    """The second line says over how few targets, when not over all."""
    n = len(variant.targeted)
    partial = f"of {plural(n, 'target')}" if 0 < n < classes else ""
    return Cell(percent(variant.mean_tsr, unit=False), partial)


def _latency(variant: VariantView, *, label_quick: bool) -> Cell:
    row = variant.any_row
    if row.latency_p50_ms is None and row.latency_verdict is None:
        return Cell(DASH)
    mark = VERDICT_MARKS.get(row.latency_verdict or "", "")
    verdict = (row.latency_verdict or "").lower()
    if label_quick and row.latency_mode == "quick":
        verdict = f"{verdict}; {words.QUICK}"
    text = words.milliseconds(row.latency_p50_ms, unit=False)
    return Cell(text, f"{mark}{words.NBSP}{verdict}".strip())

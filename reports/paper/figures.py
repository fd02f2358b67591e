"""The paper's table and figures with this run's numbers beside them.

Enters: a `Study`. Leaves: tables of text, panels and heat maps for the page.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from scipy import stats

from harness.records import CONTROLS, PAPER_ORDER
from reports import figures
from reports.figures import Line
from reports.heat import HeatCell, HeatMap
from reports.method import TextTable
from reports.panels import Figure, Panel
from reports.paper.study import Cell, Study
from reports.words import (
    DASH,
    clean_text,
    epsilon,
    interval,
    label_of,
    listed,
    method_colour,
    method_css,
    percent,
    plural,
    points,
)

MIN_RANKED = 5
"""A rank correlation of fewer cells says nothing."""


def measured(study: Study) -> list[str]:
    """The paper's variants that this run has, in the paper's order."""
    return [name for name in PAPER_ORDER if study.variant(name) is not None]


def difference(cell: Cell) -> float | None:
    """Here minus the paper."""
    return None if cell.here is None else cell.here - cell.published


# --- Table 1 -------------------------------------------------------------------------------------


def accuracy_table(study: Study) -> TextTable:
    """Clean accuracy; a variant that was not measured keeps the paper's number."""
    rows = []
    for name in PAPER_ORDER:
        cell = study.clean(name)
        row = cell.row
        low, high = (row.clean_accuracy_low, row.clean_accuracy_high) if row else (None, None)
        found = difference(cell)
        rows.append(
            (
                label_of(name),
                percent(1 - cell.published),
                percent(row.clean_accuracy if row else None),
                interval(low, high) or DASH,
                points(None if found is None else -found),
            )
        )
    return TextTable(("Variant", "Paper", "Here", "95 %", "Difference"), tuple(rows))


# --- Figure 1 ------------------------------------------------------------------------------------


def curves(study: Study) -> Figure:
    """White-box UER against eps: the paper's line and this run's."""
    attacked = [v for name in measured(study) if (v := study.variant(name)) and v.curve]
    if not attacked:
        return Figure("No variant was attacked with perturbations crafted on itself.")
    theirs = study.published.white_box_uer
    budgets = sorted({*theirs, *(row.eps for v in attacked for row in v.curve if row.eps)})
    panels = []
    for i, v in enumerate(attacked):
        lines = [
            Line("paper", tuple(theirs), tuple(rates[v.name] for rates in theirs.values())),
            Line(
                "white-box",
                tuple(row.eps or 0.0 for row in v.curve),
                tuple(row.uer or 0.0 for row in v.curve),
                tuple((row.uer_low or 0.0, row.uer_high or 0.0) for row in v.curve),
            ),
        ]
        cells = [study.white_box(v.name, e) for e in theirs]
        found = [d for cell in cells if (d := difference(cell)) is not None]
        said = ", ".join(f"{percent(row.uer)} at {row.eps:g}" for row in v.curve)
        panels.append(
            Panel(
                v.label,
                figures.curve_panel(
                    f"paper-curve-{i}", lines, method_colour(v.method), eps=budgets,
                    alt=f"White-box UER of {v.label} by epsilon, here: {said}",
                ),
                method_css(v.method),
                f"{points(min(found))} to {points(max(found))} points" if found else "",
            )
        )  # fmt: skip
    keys = (("line-own", "here"), ("line-random", "the paper"))
    text = "Bands are 95 % intervals; the paper gives none. Beside each name: here minus the paper."
    return Figure(text, tuple(panels), keys)


def curve_table(study: Study) -> TextTable:
    """Figure 1 in numbers: paper / here, by eps."""
    budgets = list(study.published.white_box_uer)
    rows = [
        (label_of(name), *(_both(study.white_box(name, eps)) for eps in budgets))
        for name in PAPER_ORDER
    ]
    return TextTable(("Variant", *(f"\u03b5 = {eps:g}" for eps in budgets)), tuple(rows))


def _both(cell: Cell) -> str:
    return f"{percent(cell.published, unit=False)} / {percent(cell.here, unit=False)}"


# --- Figure 2 ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """One budget's transfer matrix of differences, as the page's macro takes it."""

    heat: HeatMap
    black_box: None = None
    black_box_text: str = ""


def matrices(study: Study) -> list[Matrix]:
    """At every budget that both have, the judged one first."""
    found = [Matrix(_heat_map(study, eps)) for eps in study.budgets]
    return found or [Matrix(HeatMap("No perturbation was transferred at a budget of the paper."))]


def _heat_map(study: Study, eps: float) -> HeatMap:
    names = [n for n in measured(study) if any(_cell(study, n, s, eps).row for s in PAPER_ORDER)]
    sources = [s for s in PAPER_ORDER if any(_cell(study, n, s, eps).row for n in names)]
    rows = tuple(
        (label_of(n), tuple(_heat_cell(_cell(study, n, s, eps), own=n == s) for s in sources))
        for n in names
    )
    return HeatMap(
        _heat_caption(study, eps),
        epsilon(eps),
        tuple(label_of(s) for s in sources),
        (("crafted on", len(sources)),),
        rows,
    )


def _cell(study: Study, victim: str, source: str, eps: float) -> Cell:
    return study.attacked(victim, source, eps)


def _heat_caption(study: Study, eps: float) -> str:
    found = [
        d
        for n in PAPER_ORDER
        for s in PAPER_ORDER
        if (d := difference(_cell(study, n, s, eps))) is not None
    ]
    mean = sum(found) / len(found)
    text = (
        "Here minus the paper, in points; below, the paper / here in %. Orange: errs more here;"
        f" blue: less. White-box is outlined. {plural(len(found), 'cell')}, on average"
        f" {points(mean)} points."
    )
    cells, rho = rank_correlation(study, eps)
    if rho is None:
        return text + " Too few transfers, or all alike, for a rank correlation."
    return text + (
        f" Spearman\u2019s rank correlation of the two matrices, white-box left out, is"
        f" {rho:.2f} over {cells:,} cells. Mind that the cells share models, perturbations and"
        " images, so it has no p-value here: it says whether the order looks alike, not why."
    )


def rank_correlation(study: Study, eps: float) -> tuple[int, float | None]:
    """(cells, Spearman's rho) of both matrices off the diagonal; None where it is undefined."""
    pairs = [
        (cell.published, cell.here)
        for victim in PAPER_ORDER
        for source in PAPER_ORDER
        if victim != source and (cell := _cell(study, victim, source, eps)).here is not None
    ]
    if len(pairs) < MIN_RANKED:
        return len(pairs), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # all alike: nan, below
        rho = float(stats.spearmanr([p for p, _ in pairs], [h for _, h in pairs]).statistic)
    return len(pairs), None if math.isnan(rho) else rho


_LESS, _LEVEL, _MORE = (74, 132, 196), (250, 248, 244), (226, 122, 52)
_FULL_COLOUR = 0.5
"""The difference that has the full colour."""


def difference_colour(value: float) -> str:
    """CSS colour of a difference of fractions: blue below zero, orange above."""
    part = min(1.0, abs(value) / _FULL_COLOUR)
    end = _MORE if value > 0 else _LESS
    rgb = [round(a + part * (b - a)) for a, b in zip(_LEVEL, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _heat_cell(cell: Cell, *, own: bool) -> HeatCell:
    found = difference(cell)
    if found is None or cell.here is None:
        return HeatCell(DASH, "transparent", dark=False, own=own)
    both = f"{100 * cell.published:.0f} / {100 * cell.here:.0f}"
    text = points(round(found, 2)).partition(".")[0]  # whole points: the tenths are noise
    return HeatCell(text, difference_colour(found), dark=False, own=own, sub=both)


# --- Figures 3 and 4 -----------------------------------------------------------------------------


def bars(study: Study) -> Figure:
    """TSR by target class: the paper's bar above this run's."""
    panels = []
    means: list[tuple[float, str]] = []
    for i, name in enumerate(measured(study)):
        cells = {t: study.targeted(name, t) for t in range(10)}
        shown = {t: cell for t, cell in cells.items() if cell.here is not None}
        variant = study.variant(name)
        if not shown or variant is None:
            continue
        names = [clean_text(study.view.evaluation.classes[t], 14) for t in shown]
        here = [cell.here or 0.0 for cell in shown.values()]
        theirs = [cell.published for cell in shown.values()]
        mean = (sum(here) - sum(theirs)) / len(here)
        means.append((mean, variant.label))
        said = ", ".join(f"{n} {percent(v)}" for n, v in zip(names, here, strict=True))
        panels.append(
            Panel(
                variant.label,
                figures.bars_panel(
                    f"paper-tsr-{i}", names, theirs, here,
                    alt=f"Targeted success on {variant.label} by target class, here: {said}",
                ),
                method_css(variant.method),
                f"mean {points(mean)} points",
            )
        )  # fmt: skip
    if not panels:
        return Figure("No targeted perturbation was measured at a budget of the paper.")
    low, high = min(means), max(means)
    text = (
        f"All at {epsilon(study.targeted_eps)}. Beside each name: mean here minus the paper\u2019s,"
        f" from {points(low[0])} ({low[1]}) to {points(high[0])} ({high[1]}) points."
    )
    keys = (("box-full", "the paper"), ("box-own", "here"))
    return Figure(text, tuple(panels), keys)


# --- controls ------------------------------------------------------------------------------------


def controls_table(study: Study) -> TextTable:
    """UER under patterns made without any model, beside white-box, at the judged budget."""
    head: tuple[str, ...] = ("Variant",)
    for title in ("Chessboard", "Random sign", "White-box"):
        head += (f"{title}: paper", "here", "difference")
    rows = []
    for name in PAPER_ORDER:
        cells = [study.control(name, c, study.eps) for c in reversed(CONTROLS)]
        cells.append(study.white_box(name, study.eps))
        row = [label_of(name)]
        for cell in cells:
            row += [percent(cell.published), percent(cell.here), points(difference(cell))]
        rows.append(tuple(row))
    return TextTable(head, tuple(rows))


def controls_text(study: Study) -> str:
    """Where the chessboard does more than the crafted perturbation, there and here."""
    theirs, ours = [], []
    for name in PAPER_ORDER:
        pattern = study.control(name, "chessboard", study.eps)
        own = study.white_box(name, study.eps)
        if pattern.published > own.published:
            theirs.append(label_of(name))
        if pattern.here is not None and own.here is not None and pattern.here > own.here:
            ours.append(label_of(name))
    return (
        f"At {epsilon(study.eps)} the chessboard does more than the white-box perturbation for"
        f" {listed(theirs) or 'no variant'} in the paper\u2019s numbers, and for"
        f" {listed(ours) or 'no variant'} here (not tested; the report\u2019s masking section is)."
    )

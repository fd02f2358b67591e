"""The drawings, as SVG text to be placed inside the page. The only module that uses matplotlib.

Enters: numbers and labels. Leaves: `<svg>` elements: deterministic, ids prefixed with the figure's
name so that many fit in one page, text kept as text (searchable, drawn in the page's own font),
ink colours as CSS variables so that the page's light and dark schemes reach into them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.labels import place_labels
from reports.words import FULL_BLUE, METHOD_COLOURS, NBSP, VARIANT_ORANGE, clean_text, count, size

_INK, _SOFT, _GRID, _PAPER = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _GRID: "--grid", _PAPER: "--card"} | {
    colour: f"--{method}" for method, colour in METHOD_COLOURS.items()
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $x$
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.8,
    "axes.labelsize": 9.0,
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
_MARKERS = {"full": "o", "sfp": "s", "pp": "^", "apot": "D", "int8": "v"}


@dataclass(frozen=True)
class Point:
    """A model in a trade-off panel. `y` is a fraction."""

    label: str
    method: str
    colour: str
    x: float
    y: float
    front: bool
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A curve of fractions over eps; `band` holds (low, high) of each point."""

    kind: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    band: tuple[tuple[float, float], ...] = ()


def curve_panel(
    name: str, lines: Sequence[Line], colour: str, *, eps: Sequence[float], alt: str
) -> Markup:
    """UER against eps for one variant: its own line strong, the rest as context."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.17, 0.235, 0.8, 0.7))
        styles: dict[str, dict[str, Any]] = {
            "white-box": {"color": colour, "lw": 2.2, "marker": "o", "ms": 4, "zorder": 4},
            "full": {"color": METHOD_COLOURS["full"], "lw": 1.1, "zorder": 2},
            "search": {
                "color": _INK,
                "ls": "",
                "marker": "o",
                "ms": 4.2,
                "mfc": _PAPER,
                "mew": 1.0,
                "zorder": 5,
            },
            "chessboard": {"color": _SOFT, "lw": 1.3, "ls": (0, (1.2, 1.6)), "zorder": 3},
            "random": {"color": _SOFT, "lw": 1.2, "ls": (0, (5, 2.5)), "zorder": 3},
            "paper": {"color": _INK, "lw": 1.3, "ls": (0, (5, 2.5)), "zorder": 5},
        }
        for line in lines:
            axes.plot(line.xs, [100 * y for y in line.ys], **styles[line.kind])
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(
                    line.xs, [100 * v for v in low], [100 * v for v in high],
                    color=colour, alpha=0.18, lw=0,
                )  # fmt: skip
        _percent_axis(axes)
        axes.set_xlim(min(eps) - 0.6, max(eps) + 0.6)
        axes.set_xticks(list(eps), [f"{e:g}" for e in eps])
        axes.set_xlabel("\u03b5 (1/255)", labelpad=0)

    return _svg(name, draw, (2.25, 1.85), alt)


def pareto_panel(
    name: str,
    points: Sequence[Point],
    *,
    xlabel: str,
    tick: Callable[[float], str],
    alt: str,
    dashed: bool = False,
) -> Markup:
    """Worst-case UER against a cost; the front as a staircase, every point named beside itself."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.125, 0.15, 0.85, 0.78))
        xs = [p.x for p in points]
        low, high = min(xs), max(xs)
        log = low > 0 and high / low > 4
        if log:
            axes.set_xscale("log")
            factor = (high / low) ** 0.14
            axes.set_xlim(low / factor, high * factor)
        else:
            pad = 0.16 * (high - low) or 0.2 * high or 1.0
            axes.set_xlim(low - pad, high + pad)
        bottom, top = 100 * min(p.low for p in points), 100 * max(p.high for p in points)
        spread = top - bottom or 10.0
        axes.set_ylim(max(-3.0, bottom - 0.1 * spread), min(104.0, top + 0.1 * spread))
        front = sorted((p.x, 100 * p.y) for p in points if p.front)
        stairs_x = [*(x for x, _ in front), axes.get_xlim()[1]]
        stairs_y = [*(y for _, y in front), front[-1][1]]
        axes.step(
            stairs_x, stairs_y, where="post", color=_SOFT, lw=1.2, zorder=2,
            ls="--" if dashed else "-",
        )  # fmt: skip
        for p in points:
            axes.plot([p.x, p.x], [100 * p.low, 100 * p.high], color=p.colour, lw=1.0, zorder=3)
            axes.plot(
                [p.x], [100 * p.y], marker=_MARKERS.get(p.method, "P"), ms=7.5, ls="",
                mfc=p.colour if p.front else _PAPER, mec=p.colour, mew=1.6, zorder=5,
            )  # fmt: skip
        axes.set_xlabel(xlabel, labelpad=3)
        _ticks(axes, log=log, tick=tick)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        _label_points(axes, points)

    return _svg(name, draw, (4.0, 3.3), alt)


def bars_panel(
    name: str, classes: Sequence[str], full: Sequence[float], own: Sequence[float], *, alt: str
) -> Markup:
    """TSR per class: the uncompressed model's bar above the compressed variant's."""

    def draw(figure: Figure) -> None:
        height = 0.26 * len(classes) + 0.5
        axes = figure.add_axes((0.2, 0.36 / height, 0.74, 1 - 0.42 / height))
        rows = range(len(classes))
        if full:
            axes.barh([r - 0.19 for r in rows], [100 * v for v in full], 0.36, color=FULL_BLUE)
        axes.barh([r + 0.19 for r in rows], [100 * v for v in own], 0.36, color=VARIANT_ORANGE)
        axes.set_yticks(list(rows), [clean_text(c, 12) for c in classes])
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")

    return _svg(name, draw, (4.0, 0.26 * len(classes) + 0.5), alt)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])


def _ticks(axes: Axes, *, log: bool, tick: Callable[[float], str]) -> None:
    if log:
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))


def tick_size(value: float) -> str:
    return _tick(value, size(value))


def tick_count(value: float) -> str:
    return _tick(value, count(value))


def _tick(value: float, text: str) -> str:
    """A round number without the digits that only a measurement needs."""
    number, _, unit = text.partition(NBSP)
    return f"{float(number):g}{NBSP}{unit}" if unit and value > 0 else f"{value:g}"


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Name every point beside itself; those on the front choose their places first."""
    scale = axes.figure.dpi / 72
    place = axes.transData.transform
    corners = [place((p.x, 100 * p.y)) for p in points]
    spots = [(float(x) / scale, float(y) / scale) for x, y in corners]
    left, bottom, right, top = (float(v) / scale for v in axes.bbox.extents)
    frame = (left, bottom, right, top)
    order = sorted(range(len(points)), key=lambda i: (not points[i].front, spots[i]))
    sizes = [(5.6 * len(p.label) + 2, 10.5) for p in points]
    for p, (x, y), label in zip(
        points, spots, place_labels(spots, sizes, frame, order=order), strict=True
    ):
        line = {"arrowstyle": "-", "color": p.colour, "lw": 0.6, "shrinkB": 4}
        axes.annotate(
            p.label, (p.x, 100 * p.y),
            (label.centre[0] - x, label.centre[1] - y), textcoords="offset points",
            ha="center", va="center_baseline", color=p.colour, zorder=6, weight="bold",
            arrowprops=line if label.led else None,
        )  # fmt: skip


def _svg(
    name: str, draw: Callable[[Figure], None], inches: tuple[float, float], alt: str
) -> Markup:
    style: Any = {**_STYLE, "svg.hashsalt": name}  # keys are checked by matplotlib itself
    with mpl.rc_context(style), warnings.catch_warnings():
        # A class name in a script our measuring font lacks: the browser's fonts will have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure = Figure(figsize=inches)
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _inline(buffer.getvalue(), name, inches, alt)


def _inline(document: str, name: str, inches: tuple[float, float], alt: str) -> Markup:
    body = document[document.index("<svg") :]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    for pattern in (r'(\bid=")', r"(url\(#)", r'(xlink:href="#)'):
        body = re.sub(pattern, rf"\g<1>{name}-", body)
    for sentinel, variable in _VARIABLES.items():
        body = body.replace(sentinel, f"var({variable})")
    body = re.sub(r"\s*\n\s*", " ", body)
    width, height = inches
    opening = (
        f'<svg class="plot" role="img" aria-label="{escape(alt)}"'
        f' viewBox="0 0 {72 * width:g} {72 * height:g}">'
    )
    return Markup(opening + body[body.index(">") + 1 :])  # noqa: S704 - escaped by matplotlib

"""Figure 2: the transfer matrix as coloured cells of a real table, readable by eye and by machine.

Enters: a `View`. Leaves: a `HeatMap` of formatted cells and its caption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.records import CONTROLS, ResultRow
from harness.sources import FLEET, LEAVE_ONE_OUT
from reports import words
from reports.inference import ALPHA, mean_difference, rate_of
from reports.tables import transfer_matrix
from reports.view import View
from reports.words import epsilon, label_of, p_value, percent, points


@dataclass(frozen=True)
class HeatCell:
    """A number on its colour; `own` marks white-box."""

    text: str
    background: str
    dark: bool
    own: bool
    sub: str = ""
    """Small print below."""


@dataclass(frozen=True)
class HeatMap:
    """Victims down, sources across; empty `rows` when nothing was attacked."""

    caption: str
    eps: str = ""
    sources: tuple[str, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()
    """(heading, how many of the sources): variants, then the fleet, then controls."""
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...] = ()

    @property
    def apart(self) -> tuple[int, ...]:
        """The place of each source's group among the groups."""
        return tuple(i for i, (_, size) in enumerate(self.groups) for _ in range(size))


_RAMP = ((253, 246, 236), (250, 205, 160), (235, 128, 107), (176, 54, 107), (84, 22, 92))
"""Light to dark, so that it also reads in grey and without red-green vision."""


def heat_colour(value: float) -> tuple[str, bool]:
    """(CSS colour, whether light text is needed on it) of a fraction."""
    place = min(max(value, 0.0), 1.0) * (len(_RAMP) - 1)
    step = min(int(place), len(_RAMP) - 2)
    part = place - step
    rgb = [round(a + part * (b - a)) for a, b in zip(_RAMP[step], _RAMP[step + 1], strict=True)]
    luminance = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return "#{:02x}{:02x}{:02x}".format(*rgb), luminance < 140


def heat_maps(view: View) -> list[HeatMap]:
    """Figure 2: UER of every source's perturbation on every victim, the reference eps first."""
    found = [heat_map(view, eps) for eps in view.transfer_budgets]
    return found or [HeatMap("No crafted perturbation was applied to any variant.")]


def heat_map(view: View, eps: float) -> HeatMap:
    """The matrix of one budget."""
    sources, matrix = transfer_matrix(view, eps)
    ensembles = [s for s in sources if s in (FLEET, LEAVE_ONE_OUT)]
    crafted = [s for s in sources if s not in (*CONTROLS, *ensembles)]
    if not crafted and not ensembles:
        return HeatMap("No crafted perturbation was applied to any variant.")
    rows = tuple(
        (
            label_of(victim),
            tuple(
                _heat_cell(uer, own=source == victim)
                for source, uer in zip(sources, uers, strict=True)
            ),
        )
        for victim, uers in matrix
    )
    at_eps = {v.name: v.by_eps.get(eps, {}) for v in view.variants}
    own = [attacked[name] for name, attacked in at_eps.items() if name in attacked]
    other = [row for v in view.variants for row in v.transfers_at(at_eps[v.name])]
    text = "Each row is a model under attack, each column a source. "
    if LEAVE_ONE_OUT in ensembles:
        text += "Leave-one-out is crafted on the fleet without the model in the row. "
    if not other:
        text += "No perturbation was applied to a variant other than its own source."
    else:
        text += f"Transferred perturbations reach {percent(_mean(other))} UER on average"
        text += f"; white-box (outlined) {percent(_mean(own))}" if own else ""
        text += f"{_tested(view, own, other)}."
    sizes = (len(crafted), len(ensembles), len(sources) - len(crafted) - len(ensembles))
    headings = ("crafted on", "on many", "controls")
    groups = tuple((h, n) for h, n in zip(headings, sizes, strict=True) if n)
    return HeatMap(text, epsilon(eps), tuple(label_of(s) for s in sources), groups, rows)


def _mean(rows: list[ResultRow]) -> float:
    return sum(rate_of(row) for row in rows) / len(rows)


def _tested(view: View, own: list[ResultRow], other: list[ResultRow]) -> str:
    """The difference of the two means, over images."""
    if not own:
        return ""
    found = mean_difference(view, own, other)
    if found.p >= ALPHA:
        return ", no difference shown"
    return f", a difference of {points(found.value)} points ({p_value(found.p)}, paired by image)"


def _heat_cell(uer: float | None, *, own: bool) -> HeatCell:
    if uer is None:
        return HeatCell(words.DASH, "transparent", dark=False, own=own)
    colour, dark = heat_colour(uer)
    return HeatCell(f"{math.floor(100 * uer + 0.5)}", colour, dark, own)

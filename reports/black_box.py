"""Black box: what an attacker achieves who lacks the deployed model but has the rest of the fleet.

Enters: a `View`. Leaves: a table and a sentence for each budget. A perturbation crafted on all
variants but the victim (leave-one-out) stands beside the white-box one and the best that was
crafted on a single other variant.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.records import VARIANTS, ResultRow
from harness.sources import FLEET
from reports.inference import ALPHA, paired
from reports.method import TextTable
from reports.view import VariantView, View
from reports.words import DASH, interval, label_of, listed, p_value, percent, points


@dataclass(frozen=True)
class BlackBox:
    """One victim at one budget; p-values are Holm-adjusted over the victims of a column."""

    victim: VariantView
    left_out: ResultRow
    white_box: ResultRow | None
    fleet: ResultRow | None
    best_single: ResultRow | None
    p_single: float | None
    """Of the leave-one-out perturbation against `best_single`, paired."""
    p_white_box: float | None


def black_boxes(view: View, eps: float) -> list[BlackBox]:
    """Every victim that faced the fleet without it."""
    victims = [v for v in view.variants if eps in v.left_out]
    rows = {v.name: v.by_eps.get(eps, {}) for v in victims}
    best = {
        v.name: max(v.transfers_at(rows[v.name]), key=_uer, default=None)  # the first of equals
        for v in victims
    }
    single = _tests(view, eps, victims, best)
    white = _tests(view, eps, victims, {v.name: rows[v.name].get(v.name) for v in victims})
    return [
        BlackBox(
            victim=v,
            left_out=v.left_out[eps],
            white_box=rows[v.name].get(v.name),
            fleet=rows[v.name].get(FLEET),
            best_single=best[v.name],
            p_single=single.get(v.name),
            p_white_box=white.get(v.name),
        )
        for v in victims
    ]


def _tests(
    view: View, eps: float, victims: list[VariantView], others: dict[str, ResultRow | None]
) -> dict[str, float]:
    """Victim -> p of its leave-one-out row against the other one."""
    pairs = {v.name: (v.left_out[eps], row) for v in victims if (row := others[v.name]) is not None}
    return dict(zip(pairs, paired(view, list(pairs.values())), strict=True))


def black_box_table(view: View, eps: float) -> TextTable | None:
    """A row a victim; None where no victim faced the fleet without it."""
    found = black_boxes(view, eps)
    if not found:
        return None
    head = (
        "Victim", "White-box UER", "Fleet with it", "Best single source",
        "Leave-one-out", "95 %", "Against best single", "Against white-box",
    )  # fmt: skip
    return TextTable(head, tuple(_cells(box) for box in found))


def _cells(box: BlackBox) -> tuple[str, ...]:
    best = box.best_single
    source = f" ({label_of(best.uap_source or '')})" if best is not None else ""
    return (
        box.victim.label,
        percent(box.white_box.uer if box.white_box else None),
        percent(box.fleet.uer if box.fleet else None),
        percent(best.uer if best else None) + source,
        percent(box.left_out.uer),
        interval(box.left_out.uer_low, box.left_out.uer_high),
        _difference(box.left_out, best, box.p_single),
        _difference(box.left_out, box.white_box, box.p_white_box),
    )


def _difference(row: ResultRow, other: ResultRow | None, p: float | None) -> str:
    if other is None or p is None:
        return DASH
    shown = p_value(p) if p < ALPHA else f"none shown, {p_value(p)}"
    return f"{points(_uer(row) - _uer(other))} points ({shown})"


def black_box_text(view: View, eps: float) -> str:
    """What the table says, and what it cannot say."""
    found = black_boxes(view, eps)
    if not found:
        return ""
    rates = [_uer(box.left_out) for box in found]
    text = (
        f"Who has every other variant but not the deployed one makes it err on"
        f" {percent(sum(rates) / len(rates))} of the images on average over the victims"
        f" ({percent(min(rates))} to {percent(max(rates))})"
    )
    white = [(_uer(b.left_out), _uer(b.white_box)) for b in found if b.white_box is not None]
    text += f", white-box {percent(sum(w for _, w in white) / len(white))}" if white else ""
    text += "."
    better = [b.victim.label for b in found if _shown(b.left_out, b.best_single, b.p_single) > 0]
    worse = [b.victim.label for b in found if _shown(b.left_out, b.best_single, b.p_single) < 0]
    compared = any(b.best_single is not None for b in found)
    if better:
        text += f" It is shown to beat the best single source on {listed(better)}."
    if worse:
        text += f" The best single source is shown to beat it on {listed(worse)}."
    if compared and not better and not worse:
        text += " Against the best single source no difference is shown."
    stronger = [b.victim.label for b in found if _shown(b.left_out, b.white_box, b.p_white_box) > 0]
    if stronger:
        text += (
            f" On {listed(stronger)} it is shown to beat the white-box perturbation, which was"
            " therefore too weak."
        )
    if eps != view.reference_eps:
        return text  # said once
    text += (
        " Paired tests, Holm-adjusted over the victims of a column. The best single source"
        " is picked on these same images, which favours it."
    )
    kin = [
        label_of(v.name) for v in VARIANTS if v.parent and v.name in {b.victim.name for b in found}
    ]
    if kin:
        text += (
            f" {listed(kin)} started from Full\u2019s weights, directly or through one another: the"
            " rest of the fleet holds kin of each of these and of Full, and an attacker without any"
            " of them may achieve less."
        )
    return text


def _shown(row: ResultRow, other: ResultRow | None, p: float | None) -> int:
    """The sign of a difference that a test shows; 0 where none does."""
    if other is None or p is None or p >= ALPHA:
        return 0
    return 1 if _uer(row) > _uer(other) else -1


def _uer(row: ResultRow) -> float:
    return row.uer if row.uer is not None else -1.0

"""The figures as the page places them: each a grid of panels, with its takeaway in words.

Enters: a `View`. Leaves: SVG panels, heat-map cells, captions; an empty figure says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from harness.records import CONTROLS, ResultRow
from reports import figures
from reports.advice import COSTS, Cost, latency_caveat, rated
from reports.choosing import pareto_front
from reports.figures import Line, Point
from reports.inference import ALPHA, adjusted_apart, compare_apart, mean_difference, rate_of
from reports.signals import masking_verdicts
from reports.view import VariantView, View
from reports.words import clean_text, epsilon, listed, method_colour, method_css, percent

MAX_CLASSES = 20
"""Bars beyond this are unreadable: the classes with the highest rates are drawn."""


@dataclass(frozen=True)
class Panel:
    """One small picture of a grid."""

    title: str
    svg: Markup
    colour: str = ""
    tag: str = ""
    """A few words beside the title."""
    note: str = ""
    """A caveat below the picture."""


@dataclass(frozen=True)
class Figure:
    """Panels and a caption; without panels, `caption` says what is missing."""

    caption: str
    panels: tuple[Panel, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()
    """(CSS class of the swatch, words)."""


def pareto(view: View) -> Figure:
    """Worst-case UER against latency, size and MACs."""
    panels = tuple(p for cost in COSTS if (p := _pareto_panel(view, cost)) is not None)
    if not panels:
        return Figure("No Pareto picture: fewer than two variants have both an attack and a cost.")
    fronts = []
    for cost in COSTS:
        points = rated(view, cost)
        if len(points) > 1:
            front = pareto_front([(value, uer) for _, value, uer in points])
            labels = listed([points[i][0].label for i in front])
            fronts.append(f"{cost.phrase}: {labels}")
    return Figure(
        "Lower and further left is better. Filled marks lie on the Pareto front (line): no other"
        f" variant was measured to be both cheaper and less often wrong; neighbours need not be"
        " shown to differ (see what to conclude). Bars are 95 % intervals."
        f" On the front, {'; '.join(fronts)}." + _unequal(view),
        panels,
    )


def _pareto_panel(view: View, cost: Cost) -> Panel | None:
    found = rated(view, cost)
    if len(found) < 2:
        return None
    front = pareto_front([(value, uer) for _, value, uer in found])
    points = [
        Point(v.label, v.method, method_colour(v.method), value, uer, i in front, *_interval(v))
        for i, (v, value, uer) in enumerate(found)
    ]
    said = [f"{p.label} {cost.show(p.x)}, {percent(p.y)}" for p in points]
    caveat = latency_caveat(view) if cost.key == "latency" else ""
    ticks: dict[str, Callable[[float], str]] = {
        "latency": lambda x: f"{x:g}",
        "size": figures.tick_size,
        "macs": figures.tick_count,
    }
    svg = figures.pareto_panel(
        f"pareto-{cost.key}",
        points,
        xlabel=cost.title,
        tick=ticks[cost.key],
        alt=f"Worst UER against {cost.title}: {'; '.join(said)}",
        dashed=bool(caveat),
    )
    return Panel(f"Worst UER against {cost.title.split(',')[0].lower().replace('macs', 'MACs')}",
                 svg, note=caveat[:1].upper() + caveat[1:])  # fmt: skip


def _interval(variant: VariantView) -> tuple[float, float]:
    worst = variant.worst
    assert worst is not None, "rated variants have one"
    low = worst.uer_low if worst.uer_low is not None else worst.uer
    high = worst.uer_high if worst.uer_high is not None else worst.uer
    return low or 0.0, high or 0.0


def _unequal(view: View) -> str:
    """A worst case over fewer attacks is a weaker claim: say whose is not drawn."""
    apart = [v.label for v in view.set_apart]
    return f" Not drawn, attacked with other perturbations: {listed(apart)}." if apart else ""


def curves(view: View) -> Figure:
    """Figure 1: UER against eps, one panel a variant."""
    attacked = [v for v in view.variants if v.curve]
    if not attacked:
        return Figure("No variant was attacked with perturbations crafted on itself.")
    drawn = [r for v in attacked for r in (*v.curve, *v.searches, *_controls(v))]
    budgets = sorted({row.eps for row in drawn if row.eps is not None})
    full = view.baseline
    panels = tuple(
        Panel(
            v.label,
            figures.curve_panel(
                f"curve-{i}",
                _lines(v, full if full is not v else None),
                method_colour(v.method),
                eps=budgets,
                alt=_curve_alt(v),
            ),
            method_css(v.method),
        )
        for i, v in enumerate(attacked)
    )
    low, high = _range(attacked, budgets[0]), _range(attacked, budgets[-1])
    text = "White-box UER"
    text += f" is {low} at \u03b5 = {budgets[0]:g}" if low else ""
    if high and len(budgets) > 1:
        text += f" and {high} at \u03b5 = {budgets[-1]:g}"
    text += "; bands, where they are wide enough to be seen, are 95 % intervals."
    if view.reference_eps is not None:
        controls = {v.variant.name: v.signals["control"] for v in masking_verdicts(view)}
        by_state = {
            state: [v.label for v in attacked if (c := controls.get(v.name)) and c.state == state]
            for state in ("raised", "unclear")
        }
        at = f"At {epsilon(view.reference_eps)}"
        if by_state["raised"]:
            text += f" {at} a control is shown to do more than the crafted perturbation on"
            text += f" {listed(by_state['raised'])}."
        if by_state["unclear"]:
            text += f" {at} the crafted perturbation is not shown to do more than every control on"
            text += f" {listed(by_state['unclear'])}."
    keys = [("line-own", "white-box, the variant itself")]
    if full is not None and any(v is not full for v in attacked):
        keys.append(("line-full", f"{full.label}, white-box"))
    if any(v.searches for v in attacked):
        text += _searches(view, attacked)
        keys.append(("line-search", "on the variant itself, without gradients"))
    if any(_controls(v) for v in attacked):
        keys += [("line-chess", "chessboard control"), ("line-random", "random-sign control")]
    else:
        text += " No controls were measured, so nothing shows what an arbitrary pattern would do."
    return Figure(text, panels, tuple(keys))


def _searches(view: View, attacked: list[VariantView]) -> str:
    """At which budgets no gradient is needed; one family of paired tests over all that is drawn."""
    pairs = [
        (variant, search, own)
        for variant in attacked
        for search in variant.searches
        for own in variant.curve
        if own.eps == search.eps
    ]
    tests, adjusted = compare_apart(
        view, [v for v, _, _ in pairs], [(search, own) for _, search, own in pairs]
    )
    asked = Counter(search.eps or 0.0 for _, search, _ in pairs)
    more = Counter(
        search.eps or 0.0
        for (_, search, _), test, p in zip(pairs, tests, adjusted, strict=True)
        if p < ALPHA and test.value > 0
    )
    if not more:
        return " No search without gradients is shown to do more than these perturbations."
    where = [
        f"{more[eps]} of {asked[eps]} at \u03b5 = {eps:g}" for eps in sorted(asked) if more[eps]
    ]
    return (
        " Of the variants, perturbations found without a single gradient are shown to do more on"
        f" {listed(where)}."
    )


def _controls(variant: VariantView) -> list[ResultRow]:
    return [row for control in CONTROLS for row in variant.controls[control]]


def _lines(variant: VariantView, full: VariantView | None) -> list[Line]:
    lines = [_line("chessboard", variant.controls["chessboard"])]
    lines.append(_line("random", variant.controls["random"]))
    if full is not None:
        lines.append(_line("full", full.curve))
    lines.append(_line("white-box", variant.curve, band=True))
    lines.append(_line("search", variant.searches))
    return [line for line in lines if line.xs]


def _line(kind: str, rows: tuple[ResultRow, ...], *, band: bool = False) -> Line:
    return Line(
        kind,
        tuple(row.eps or 0.0 for row in rows),
        tuple(row.uer or 0.0 for row in rows),
        tuple((row.uer_low or 0.0, row.uer_high or 0.0) for row in rows) if band else (),
    )


def _curve_alt(variant: VariantView) -> str:
    said = ", ".join(f"{percent(row.uer)} at {row.eps:g}" for row in variant.curve)
    return f"White-box UER of {variant.label} by epsilon: {said}"


def _range(variants: list[VariantView], eps: float) -> str:
    rates = [r.uer for v in variants for r in v.curve if r.eps == eps and r.uer is not None]
    if not rates:
        return ""
    if len(rates) == 1:
        return percent(rates[0])
    return f"{percent(min(rates), unit=False)} to {percent(max(rates))}"


# --- Figures 3 and 4 -----------------------------------------------------------------------------


def bars(view: View) -> Figure:
    """Targeted success by target class: each compressed variant against Full."""
    full = view.baseline
    base = full.targeted if full is not None else {}
    shown = [v for v in view.variants if v.targeted and v is not full]
    if not shown and not base:
        return Figure("No targeted perturbation was measured.")
    if not shown and full is not None:
        shown, base = [full], {}
    panels = []
    for i, variant in enumerate(shown):
        targets = [t for t in variant.targeted if not base or t in base]
        if not targets:
            continue
        cut = len(targets) > MAX_CLASSES
        if cut:
            targets = sorted(
                sorted(targets, key=lambda t: -_tsr(variant.targeted[t]))[:MAX_CLASSES]
            )
        names = [_class_name(view, t) for t in targets]
        own = [_tsr(variant.targeted[t]) for t in targets]
        reference = [_tsr(base[t]) for t in targets] if base else []
        said = ", ".join(f"{n} {percent(v)}" for n, v in zip(names, own, strict=True))
        panels.append(
            Panel(
                variant.label,
                figures.bars_panel(
                    f"tsr-{i}",
                    names,
                    reference,
                    own,
                    alt=f"Targeted success on {variant.label} by target class: {said}",
                ),
                method_css(variant.method),
                f"mean {percent(variant.mean_tsr)}"
                + (f"; {MAX_CLASSES} highest classes" if cut else ""),
            )
        )
    keys = [("box-full", view.baseline_label)] if base else []
    keys.append(("box-own", f"the {view.other}" if base else "the variant"))
    return Figure(_bars_caption(view, shown, full if base else None), tuple(panels), tuple(keys))


def _bars_caption(view: View, shown: list[VariantView], full: VariantView | None) -> str:
    means = [(v.mean_tsr, v.label) for v in shown if v.mean_tsr is not None]
    low, high = min(means), max(means)
    text = (
        f"Blue above orange: {view.baseline_label} was steered to that class more often than the"
        f" {view.other};"
    )
    text += " orange above blue: less often. Single bars are not tested. "
    text = text if full is not None else ""
    text += f"Mean TSR goes from {percent(low[0])} ({low[1]}) to {percent(high[0])} ({high[1]})"
    if full is not None:
        text += f"; {full.label} has {percent(full.mean_tsr)}"
    if view.targeted_eps is not None:
        text += f", all at {epsilon(view.targeted_eps)}"
    text += "." + (_mean_tests(view, shown, full) if full is not None else "")
    return text + _beyond_the_untargeted(view)


def _mean_tests(view: View, shown: list[VariantView], full: VariantView) -> str:
    """Whose mean TSR is shown to differ from Full's: over images, on the targets both have."""
    pairs = []
    for variant in shown:
        targets = [t for t in variant.targeted if t in full.targeted]
        rows = [[v.targeted[t] for t in targets] for v in (variant, full)]
        pairs.append(mean_difference(view, *rows))
    p_values = adjusted_apart(shown, [pair.p for pair in pairs])
    said = {"lower": [], "higher": []}  # type: dict[str, list[str]]
    for variant, pair, p in zip(shown, pairs, p_values, strict=True):
        if p < ALPHA and pair.value:
            said["lower" if pair.value < 0 else "higher"].append(variant.label)
    text = "".join(f" Shown to be {way}: {listed(who)}." for way, who in said.items() if who)
    return text or f" No mean is shown to differ from {full.label}\u2019s."


def _beyond_the_untargeted(view: View) -> str:
    """Who errs more under a targeted perturbation than in the table's worst case."""
    found = []
    for variant in view.variants:
        worst = variant.worst
        if worst is None or not variant.targeted:
            continue
        target, row = max(variant.targeted.items(), key=lambda item: rate_of(item[1]))
        if row.eps == worst.eps and rate_of(row) > rate_of(worst):
            name = _class_name(view, target)
            found.append(f"{variant.label} ({percent(rate_of(row))}, {name})")
    if not found:
        return ""
    return f" Measured to do more than any untargeted one, whatever is predicted: {listed(found)}."


def _tsr(row: ResultRow) -> float:
    return row.tsr or 0.0


def _class_name(view: View, index: int) -> str:
    classes = view.evaluation.classes
    return clean_text(classes[index] if index < len(classes) else str(index), 14)

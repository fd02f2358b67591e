"""The page: everything the report says, poured into one self-contained HTML file.

Enters: a `View`. Leaves: HTML text. Every string goes through Jinja's escaping; only the drawings
of `reports.figures`, whose text matplotlib escapes, are passed as markup.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.seeds import METHOD
from reports import method, panels
from reports.black_box import black_box_table, black_box_text
from reports.estimates import sample_of, where_measured
from reports.headline import headline
from reports.heat import HeatMap, heat_maps
from reports.inference import ALPHA, GapRow, bound_of_none, deployment_gaps
from reports.masking_table import masking_table
from reports.method import TextTable
from reports.pictures import gallery
from reports.runtimes import runtime_table, runtime_text
from reports.tradeoff import VERDICT_MARKS, tradeoff_table
from reports.verdicts import conclusions
from reports.view import View
from reports.words import clean_text, epsilon, listed, p_value, percent, plural, points, span

TEMPLATES = Path(__file__).parent / "templates"

SECTIONS = (
    ("answer", "The answer"),
    ("conclude", "What to conclude"),
    ("curves", "Strength of attack"),
    ("transfer", "Transfer"),
    ("targeted", "Targeted attacks"),
    ("pictures", "The perturbations"),
    ("gap", "Deployment gap"),
    ("method", "How it was measured"),
)


def environment() -> Environment:
    """How every page is rendered: escaped, and an unknown name is an error."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def html_text(view: View, *, paper: str = "") -> str:
    """The whole page.

    Args:
        view: what it is about.
        paper: what the page against the paper says, in a sentence; empty where there is none.
    """
    template = environment().get_template("report.html")
    return template.render(
        paper=paper,
        sections=SECTIONS,
        headline=headline(view),
        chips=_chips(view),
        where=where_measured(view),
        table=tradeoff_table(view),
        marks=[(mark, verdict.lower()) for verdict, mark in VERDICT_MARKS.items()],
        pareto=panels.pareto(view),
        groups=conclusions(view),
        signals=masking_table(view),
        curves=panels.curves(view),
        matrices=_matrices(view),
        bars=panels.bars(view),
        gallery=gallery(view),
        baseline=view.baseline_label,
        compressed="compressed " if view.baseline_name == "full" else "",
        reference=epsilon(view.reference_eps) if view.reference_eps is not None else "",
        gap=_gap_table(view),
        gap_text=_gap_text(view),
        runtimes=runtime_table(view),
        runtimes_text=runtime_text(view),
        devices=method.device_comparison(view),
        facts=method.facts(view),
        machines=method.machines(view),
        latencies=method.latencies(view),
        compression=method.compression(view),
        commands=method.commands(view),
        definitions=method.DEFINITIONS,
        notes=view.notes,
        seeds_method=_seeds_method(view),
        dataset=clean_text(view.evaluation.dataset),
        device=view.device.label,
    )


@dataclass(frozen=True)
class Matrix:
    """The transfer section of one budget."""

    heat: HeatMap
    black_box: TextTable | None
    black_box_text: str


def _matrices(view: View) -> list[Matrix]:
    """The reference budget's first; one without numbers where nothing was attacked."""
    budgets: list[float | None] = [*view.transfer_budgets] or [None]
    return [
        Matrix(
            heat, *((black_box_table(view, eps), black_box_text(view, eps)) if eps else (None, ""))
        )
        for heat, eps in zip(heat_maps(view), budgets, strict=True)
    ]


def _seeds_method(view: View) -> str:
    if not view.seeds:
        return "Every perturbation has one crafting seed, so intervals cover images only."
    return f"Rates of perturbations crafted with several seeds are their mean; {METHOD}."


def _chips(view: View) -> list[tuple[str, str]]:
    """The facts a reader needs before the first number."""
    found = [
        ("data set", clean_text(view.evaluation.dataset)),
        ("images", _images(view)),
        ("device", view.device.label),
        ("runtime", "onnxruntime"),
        ("models", str(len(view.variants))),
    ]
    if view.reference_eps is not None:
        found.append(("reference budget", epsilon(view.reference_eps)))
    if view.craft is not None:
        found.append(("protocol", clean_text(view.craft[0])))
    return found


def _images(view: View) -> str:
    """How many images the numbers are of; a sample says so."""
    whole, sample = len(view.evaluation.labels), sample_of(view)
    if sample is None:
        return f"{whole:,}"
    return f"a sample: {span(sample.fewest, sample.most)} of {whole:,}"


def _gap_table(view: View) -> TextTable | None:
    rows = deployment_gaps(view)
    if not rows:
        return None
    head = (
        "Variant", "Agreement, clean", "Agreement, attacked", "Images that differ",
        "UER PyTorch", "UER device", "Gap, points", "Paired test",
    )  # fmt: skip
    return TextTable(head, tuple(_gap_cells(row) for row in rows))


def _gap_cells(row: GapRow) -> tuple[str, ...]:
    verdict = p_value(row.p) if row.p < ALPHA else f"no difference shown ({p_value(row.p)})"
    return (
        row.variant.label,
        percent(row.clean_agreement),
        percent(row.attacked_agreement),
        f"{row.disagreements:,} of {row.n:,}",
        percent(row.torch_uer),
        percent(row.uer),
        points(row.gap),
        _identical(row.n) if row.disagreements == 0 else verdict,
    )


def _identical(n: int) -> str:
    return f"identical; at most {percent(bound_of_none(n))} can differ"


def _gap_text(view: View) -> str:
    rows = deployment_gaps(view)
    if not rows:
        return (
            "PyTorch was not run on the same images, so the gap between the trained model and the"
            " deployed file is unknown."
        )
    same = [row.variant.label for row in rows if row.disagreements == 0]
    shown = [row.variant.label for row in rows if row.p < ALPHA]
    widest = max(rows, key=lambda row: row.disagreements)
    text = (
        f"PyTorch and {view.device.label} ran on the same 8-bit images under each variant\u2019s"
        f" own perturbation. "
    )
    if len(same) == len(rows):
        return text + (
            f"{'All' if len(rows) > 1 else 'The'} {plural(len(rows), 'variant')}"
            f" {'predict' if len(rows) > 1 else 'predicts'} exactly the same classes: what was"
            " attacked is what was deployed."
        )
    text += (
        f"{listed(shown)} {'has' if len(shown) == 1 else 'have'} a UER shown to differ."
        if shown
        else "No variant\u2019s UER is shown to differ."
    )
    if same:
        text += f" {listed(same)} {'predicts' if len(same) == 1 else 'predict'} identically."
    return text + (
        f" The largest disagreement is {widest.variant.label}\u2019s:"
        f" {widest.disagreements:,} of {plural(widest.n, 'image')}."
    )

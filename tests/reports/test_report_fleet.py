"""The fleet's perturbation, the leave-one-out black box, and a transfer matrix for every budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness import metrics
from harness.records import PAPER_ORDER
from harness.store import Store, open_store
from reports.black_box import black_box_table, black_box_text, black_boxes
from reports.choosing import fleet_mix
from reports.heat import heat_maps
from reports.inference import holm
from reports.page import html_text
from reports.pictures import gallery
from reports.selection import build_view
from reports.tables import latex_text, markdown_text, transfer_matrix
from reports.verdicts import conclusions
from reports.view import View
from tests.reports import synthetic
from tests.reports.synthetic import add_variant, uap

LEFT_OUT = {"full": 0.81, "sfp": 0.62, "pp2": 0.80, "q2": 0.66}
FLEET = {"full": 0.80, "sfp": 0.70, "pp2": 0.80, "q2": 0.64}
VICTIMS = tuple(LEFT_OUT)


def planted(path: Path) -> Store:
    store = open_store(path)
    evaluation = synthetic.evaluation_set()
    synthetic.register(store, evaluation, VICTIMS)
    p = synthetic.Planter(store, evaluation)
    for eps in (4.0, 10.0):
        for source in ("fleet", *(f"fleet_without_{v}" for v in VICTIMS)):
            store.add_uap(uap(source, eps))
    for name in VICTIMS:
        add_variant(p, name, torch=False)
        runs = []
        for source in set(VICTIMS) - {name}:
            rate = 0.3 if source == "full" else 0.2
            runs.append(p.run(name, uap(source, 4.0), p.erring(rate, name, source)))
        for eps, part in ((4.0, 0.5), (10.0, 1.0)):
            rates = {"fleet": FLEET[name], f"fleet_without_{name}": LEFT_OUT[name]}
            for source, rate in rates.items():
                runs.append(p.run(name, uap(source, eps), p.erring(part * rate, name, source)))
        # What a user applied to a model that took part in it: no black box, and no column.
        other = "fleet_without_sfp" if name != "sfp" else "fleet_without_full"
        runs.append(p.run(name, uap(other, 10.0), p.erring(0.99, name, other)))
        store.add_prediction_runs(runs)
    return store


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> Iterator[View]:
    with planted(tmp_path_factory.mktemp("fleet") / "results.db") as store:
        yield build_view(store)


def test_the_black_box_is_the_victims_own_and_tested_in_pairs(view):
    found = {box.victim.name: box for box in black_boxes(view, 10.0)}
    assert found.keys() == LEFT_OUT.keys()
    raw = []
    for name, box in found.items():
        assert box.left_out.uer == pytest.approx(LEFT_OUT[name], abs=1 / 600)
        assert box.fleet.uer == pytest.approx(FLEET[name], abs=1 / 600)
        assert box.white_box.uap_source == name
        sources = {s: r for s, r in zip(PAPER_ORDER, synthetic.TRANSFER[name], strict=True)
                   if s != name}  # fmt: skip
        assert box.best_single.uer == pytest.approx(max(sources.values()), abs=1 / 600)
        labels = np.asarray(view.evaluation.labels)
        pair = [view.predictions(row) != labels for row in (box.left_out, box.best_single)]
        raw.append(metrics.mcnemar(*pair))
    assert [box.p_single for box in found.values()] == pytest.approx(holm(raw))
    table = black_box_table(view, 10.0)
    assert [row[0] for row in table.rows] == ["Full", "SFP", "PP2", "Q2"]
    sfp = table.rows[1]
    assert sfp[1:5] == ("78.0\u00a0%", "70.0\u00a0%", "46.0\u00a0% (SFP+C)", "62.0\u00a0%")
    assert sfp[6].startswith("+16.0 points (p\u00a0<\u00a00.001")
    assert sfp[7].startswith("\u221216.0 points")


def test_words_follow_from_the_tests(view):
    text = black_box_text(view, 10.0)
    mean = 100 * sum(LEFT_OUT.values()) / len(LEFT_OUT)
    assert f"{mean:.1f}\u00a0% of the images on average" in text
    assert "shown to beat the best single source on SFP" in text
    assert "best single source is shown to beat it" not in text or "Q2" in text
    assert "PP2 and Q2 started from Full" in text
    said = " ".join(s.text for g in conclusions(view) for s in g.sentences if g.anchor == "fleet")
    assert "One perturbation crafted on all variants at once reaches 64.0\u00a0% UER on Q2" in said


def test_only_the_own_leave_one_out_stands_in_the_matrix(view):
    sources, matrix = transfer_matrix(view, 10.0)
    assert sources == [*PAPER_ORDER, "fleet", "fleet_without", "chessboard", "random"]
    column = sources.index("fleet_without")
    for name, uers in matrix:
        assert uers[column] == pytest.approx(LEFT_OUT[name], abs=1 / 600)
    full = view.baseline
    assert not any("without" in source for source in full.attacked)
    assert {row.uap_source for row in full.transfers} == set(PAPER_ORDER) - {"full"}
    assert all(view.comparable(v) for v in view.variants)


def test_the_worst_case_knows_the_fleet_and_the_leave_one_out(view, tmp_path):
    assert {v.name: v.worst.uap_source for v in view.variants} == {
        "full": "chessboard", "sfp": "sfp", "pp2": "pp2", "q2": "pp2"
    }  # fmt: skip
    with planted(tmp_path / "results.db") as store:
        p = synthetic.Planter(store, view.evaluation)
        strong = [("q2", "fleet_without_q2", 0.9), ("sfp", "fleet", 0.95)]
        store.add_prediction_runs(
            [p.run(name, uap(s, 10.0), p.erring(rate, name, "strong")) for name, s, rate in strong]
        )
        worst = {v.name: v.worst.uap_source for v in build_view(store).variants}
    assert (worst["q2"], worst["sfp"]) == ("fleet_without_q2", "fleet")


def test_a_mix_of_variants_faces_the_fleets_perturbation_too(view):
    mix = fleet_mix(view)
    assert mix is not None
    assert mix.worst >= min(FLEET.values())  # under it, no mix errs less than its best part


def test_a_matrix_for_every_budget_without_javascript(view):
    assert view.transfer_budgets == [10.0, 4.0]
    first, second = heat_maps(view)
    assert first.eps == "\u03b5\u00a0=\u00a010/255"
    assert first.groups == (("crafted on", 10), ("on many", 2), ("controls", 2))
    assert second.groups == (("crafted on", 4), ("on many", 2), ("controls", 2))
    page = html_text(view)
    assert "<script" not in page
    assert page.count('<table class="heat">') == 2
    assert page.count("<details") == 1
    assert "<summary>The same at \u03b5\u00a0=\u00a04/255</summary>" in page
    assert page.count("Without the deployed model: crafted on the rest of the fleet") == 2
    markdown = markdown_text(view)
    assert markdown.count("## Transfer: UER at") == 2
    assert markdown.count("## Black box") == 2
    latex = latex_text(view)
    assert r"\label{tab:transfer}" in latex
    assert r"\label{tab:transfer-eps4}" in latex


def test_one_picture_of_the_fleet_and_none_of_its_parts(view):
    labels = [strip.label for strip in gallery(view).strips]
    assert labels.count("fleet") == 1
    assert not any("without" in label for label in labels)


def test_without_a_fleet_nothing_is_said_of_one(full):
    view = build_view(full.store)
    assert black_box_table(view, 10.0) is None
    assert black_box_text(view, 10.0) == ""
    assert "rest of the fleet" not in full.html
    assert "<details" not in full.html
    assert "on many" not in full.html

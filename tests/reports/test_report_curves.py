"""UER against the budget: what is drawn, and said, of perturbations that took no gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.store import Store, open_store
from reports import panels
from reports.selection import build_view
from reports.view import View
from tests.reports import synthetic
from tests.reports.synthetic import uap

OWN = {4.0: 0.4, 10.0: 0.9}
SEARCHED = {4.0: 0.6, 10.0: 0.9}


def store_with(folder: Path, searched: dict[str, dict[float, float]]) -> Store:
    """Two models that err alike under their own perturbations; `searched`: name -> eps -> UER."""
    store = open_store(folder / "r.db")
    evaluation = synthetic.evaluation_set()
    store.add_evaluation_set(evaluation)
    planter = synthetic.Planter(store, evaluation)
    for name in ("full", "q4"):
        store.add_model(synthetic.model(name))
        runs = [planter.run(name, None, planter.erring(0.02, name))]
        crafted = [(uap(name, eps), rate) for eps, rate in OWN.items()]
        crafted += [
            (uap(name, eps, sha256=synthetic.sha("f", name, eps), attack="fourier"), rate)
            for eps, rate in searched.get(name, {}).items()
        ]
        for record, rate in crafted:
            store.add_uap(record)
            wrong = planter.erring(rate, name, record.sha256)
            runs.append(planter.run(name, record, wrong))
        store.add_prediction_runs(runs)
    return store


def drawn(monkeypatch: pytest.MonkeyPatch, view: View) -> tuple[str, list[str], list[list[str]]]:
    """(caption, legend, kinds of lines a panel)."""
    kinds: list[list[str]] = []

    def panel(_name: str, lines: list[panels.Line], *_args: object, **_kw: object) -> str:
        kinds.append([line.kind for line in lines])
        return ""

    monkeypatch.setattr(panels.figures, "curve_panel", panel)
    figure = panels.curves(view)
    return figure.caption.replace("\u00a0", " "), [words for _, words in figure.keys], kinds


def test_a_search_is_a_line_of_every_budget(tmp_path, monkeypatch):
    with store_with(tmp_path, {"full": SEARCHED}) as store:
        view = build_view(store)
    full, q4 = view.variants
    assert [row.eps for row in full.searches] == [4.0, 10.0]
    assert full.gradient_free == full.searches[1]
    assert q4.searches == ()
    assert [row.attack for row in full.curve] == ["sgd", "sgd"]
    _, legend, kinds = drawn(monkeypatch, view)
    assert "on the variant itself, without gradients" in legend
    assert [("search" in lines) for lines in kinds] == [True, False]


def test_where_a_search_does_more_is_said_by_budget(tmp_path, monkeypatch):
    less = {4.0: 0.3, 10.0: 0.9}
    with store_with(tmp_path, {"full": SEARCHED, "q4": less}) as store:
        caption, _, _ = drawn(monkeypatch, build_view(store))
    assert (
        "Of the variants, perturbations found without a single gradient are shown to do more on"
        " 1 of 2 at ε = 4." in caption
    )


def test_what_is_not_shown_is_denied(tmp_path, monkeypatch):
    same = {"full": {10.0: 0.9}, "q4": {4.0: 0.4}}
    with store_with(tmp_path, same) as store:
        caption, _, _ = drawn(monkeypatch, build_view(store))
    assert caption.endswith("what an arbitrary pattern would do.")
    assert "No search without gradients is shown to do more than these perturbations." in caption


def test_without_a_search_nothing_is_said_of_one(tmp_path, monkeypatch):
    with store_with(tmp_path, {}) as store:
        caption, legend, _ = drawn(monkeypatch, build_view(store))
    assert "without" not in caption
    assert not any("without" in words for words in legend)


def test_of_two_searches_of_a_budget_the_newer_is_drawn(tmp_path):
    with store_with(tmp_path, {"full": SEARCHED}) as store:
        planter = synthetic.Planter(store, synthetic.evaluation_set())
        newer = uap("full", 4.0, sha256=synthetic.sha("newer"), attack="fourier")
        store.add_uap(newer)
        predictions = planter.erring(0.25, "newer")
        store.add_prediction_runs([planter.run("full", newer, predictions)])
        (row, _) = build_view(store).variants[0].searches
    labels = np.asarray(synthetic.evaluation_set().labels)
    assert row.uer == pytest.approx(float(np.mean(predictions != labels)))


def test_a_workspace_whose_attack_is_the_search_has_it_as_its_own(tmp_path):
    with store_with(tmp_path, {"full": SEARCHED, "q4": SEARCHED}) as store:
        planter = synthetic.Planter(store, synthetic.evaluation_set())
        # What makes it more than a check: it is applied to another variant, too.
        crossed = [r for r in store.uaps().values() if (r.source, r.attack) == ("full", "fourier")]
        runs = [planter.run("q4", r, planter.erring(0.5, "crossed", r.eps)) for r in crossed]
        store.add_prediction_runs(runs)
        view = build_view(store)
    assert view.craft is not None
    assert view.craft[1] == "fourier"
    assert all(v.searches == () for v in view.variants)

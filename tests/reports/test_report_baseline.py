"""What the others are compared with: Full, or of the user's own models the first, or as asked."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from harness.records import HarnessError
from harness.store import Store, open_store
from reports import heat, panels, verdicts
from reports.advice import by_constraint
from reports.headline import headline
from reports.inference import against_baseline
from reports.report import write_report
from reports.selection import build_view
from reports.signals import masking_verdicts
from tests.reports import synthetic
from tests.reports.synthetic import uap

RATES = {"zeta": 0.8, "alpha": 0.5, "mid": 0.8}
"""In the order they are measured; UER at eps 10."""
CLEAN = {"zeta": 0.02, "alpha": 0.10, "mid": 0.30}


def store_of(folder: Path, *, variants: tuple[str, ...] = ()) -> Store:
    """Models of the user's own, each under its own perturbation and the others'."""
    store = open_store(folder / "r.db")
    evaluation = synthetic.evaluation_set()
    store.add_evaluation_set(evaluation)
    planter = synthetic.Planter(store, evaluation)
    for name in (*RATES, *variants):
        record = synthetic.model("full", sha256=synthetic.sha("model", name), variant=name)
        store.add_model(record if name in RATES else synthetic.model(name))
        runs = [planter.run(name, None, planter.erring(CLEAN.get(name, 0.02), name))]
        for source in RATES:
            made = uap(source, 10.0)
            store.add_uap(made)
            rate = RATES.get(name, 0.8) if source == name else CLEAN.get(name, 0.02) + 0.1
            runs.append(planter.run(name, made, planter.erring(rate, name, source)))
        store.add_prediction_runs(runs)
    return store


def test_of_models_of_their_own_the_first_measured_is_the_baseline(tmp_path):
    with store_of(tmp_path) as store:
        view = build_view(store)
    assert view.baseline_name == "zeta"
    assert [v.name for v in view.variants] == ["zeta", "alpha", "mid"]
    assert {test.variant.name for test in against_baseline(view, "worst")} == {"alpha", "mid"}
    said = headline(view)
    assert said.startswith("alpha survives better than zeta, though not well: ")
    assert "Full" not in said
    assert verdicts.conclusions(view)[0].title == "Against zeta"
    sources = heat.heat_map(view, 10.0).sources
    assert sources == ("zeta", "alpha", "mid")


def test_a_perturbation_of_ones_own_on_one_variant_leaves_the_answer(tmp_path):
    with synthetic.full_store(tmp_path / "r.db") as store:
        before = headline(build_view(store))
        planter = synthetic.Planter(store, synthetic.evaluation_set())
        mine = uap("mine", 10.0)
        store.add_uap(mine)
        store.add_prediction_runs([planter.run("full", mine, planter.erring(0.99, "mine"))])
        view = build_view(store)
    assert headline(view) == before
    (full,) = (v for v in view.variants if v.name == "full")
    assert "mine" in full.attacked
    assert full.worst is not None
    assert full.worst.uap_source != "mine"
    assert any("leave out mine" in note for note in view.notes)


def test_it_stays_the_baseline_when_it_is_measured_again(tmp_path):
    with store_of(tmp_path) as store:
        evaluation = synthetic.evaluation_set()
        planter = synthetic.Planter(store, evaluation)
        newer = synthetic.model("full", sha256=synthetic.sha("zeta 2"), variant="zeta")
        store.add_model(newer)
        predictions = planter.erring(0.5, "again")
        run = planter.run("zeta", uap("zeta", 10.0), predictions)
        store.add_prediction_runs([run.__class__(**{**vars(run), "model_sha256": newer.sha256})])
        assert build_view(store).baseline_name == "zeta"


def test_one_can_be_asked_for_and_must_be_there(tmp_path):
    with store_of(tmp_path) as store:
        view = build_view(store, baseline="mid")
        assert [v.name for v in view.variants] == ["mid", "alpha", "zeta"]
        with pytest.raises(HarnessError, match=r"no results of .full. .*: choose from .*alpha"):
            build_view(store, baseline="full")
        html = write_report(store, tmp_path / "report", baseline="mid").html.read_text()
    assert "Against mid" in html
    assert "The baseline is mid" not in html
    assert "Blue above orange: Full" not in html


def test_beside_a_variant_it_is_full_whatever_was_measured_first(tmp_path):
    with store_of(tmp_path, variants=("full",)) as store:
        assert build_view(store).baseline_name == "full"
    (tmp_path / "other").mkdir()
    with store_of(tmp_path / "other", variants=("q4",)) as store:
        view = build_view(store)
    assert view.baseline is None
    assert "There is no attacked Full model to compare with" in headline(view)


def test_their_models_are_masked_or_not_by_each_others_transfer(tmp_path):
    with store_of(tmp_path) as store:
        signals = {v.variant.name: v.signals for v in masking_verdicts(build_view(store))}
    assert {s["transfer"].state for s in signals.values()} == {"clear"}


def test_of_equal_cost_and_no_difference_shown_the_more_accurate_is_advised(tmp_path):
    with store_of(tmp_path) as store:
        said = " ".join(by_constraint(build_view(store, baseline="mid")))
    # All three cost the same; alpha errs least, and is set apart from the other two.
    assert "take alpha" in said
    (tmp_path / "b").mkdir()
    with store_of(tmp_path / "b") as store:
        view = build_view(store)
        two = tuple(v for v in view.variants if v.name != "alpha")
        view = view.__class__(**{**vars(view), "variants": two, "memo": {}})
        said = " ".join(by_constraint(view))
    assert "take zeta" in said
    assert "less often than zeta by 5 points or more: mid" in said
    view = view.__class__(**{**vars(view), "baseline_name": "mid", "memo": {}})
    assert "mid costs the same, with no difference shown" in " ".join(by_constraint(view))
    assert "None that costs more was measured to err less" in said


def cheapest_of(rows):
    """The advice on size for models of (kB, UER, right on clean images) of 600 images."""
    images = 600
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "r.db") as store:
        evaluation = synthetic.evaluation_set(labels=tuple(i % 10 for i in range(images)))
        store.add_evaluation_set(evaluation)
        planter = synthetic.Planter(store, evaluation)
        made = uap("anybody", 10.0)
        store.add_uap(made)
        for name, (size, uer, right) in rows.items():
            record = synthetic.model("full", sha256=synthetic.sha("model", name), variant=name)
            store.add_model(replace(record, cost=replace(record.cost, file_bytes=1000 * size)))
            runs = [planter.run(name, None, planter.erring(1 - right / images, "clean"))]
            runs.append(planter.run(name, made, planter.erring(uer, "attacked")))
            store.add_prediction_runs(runs)
        (said,) = [text for text in by_constraint(build_view(store)) if "file size" in text]
    return said.replace("\u00a0", " ")


def test_what_errs_less_for_more_is_named_beside_the_more_accurate_one():
    said = cheapest_of({"a": (1, 0.80, 480), "b": (1, 0.80, 570), "c": (2, 0.70, 480)})
    assert "take b" in said
    assert "c for 2.00 kB lowers that to 70.0 %" in said


def test_one_image_more_is_no_reason_to_take_the_more_fragile():
    said = cheapest_of({"a": (1, 0.60, 500), "b": (1, 0.625, 501)})
    assert "take a" in said


def test_far_more_accurate_does_not_pay_for_five_points_under_attack():
    said = cheapest_of({"a": (1, 0.60, 400), "b": (1, 0.66, 570)})
    assert "take a" in said


def test_the_legend_names_the_line_that_is_drawn(tmp_path):
    with store_of(tmp_path) as store:
        view = build_view(store)
        assert ("line-full", "zeta, white-box") in panels.curves(view).keys
        alone = view.__class__(**{**vars(view), "variants": view.variants[:1], "memo": {}})
    assert not [key for key, _ in panels.curves(alone).keys if key == "line-full"]


def test_wide_intervals_are_said_in_words(tmp_path, monkeypatch):
    def reach() -> str:
        groups = verdicts.conclusions(view)
        return " ".join(s.text for g in groups if g.anchor == "reach" for s in g.sentences)

    with store_of(tmp_path) as store:
        view = build_view(store)
    points = 100 * 1.96 * (0.5 * 0.5 / synthetic.N) ** 0.5  # alpha errs on a half
    monkeypatch.setattr(verdicts, "WIDE", points / 100 + 0.001)
    assert "are known to about" not in reach()
    monkeypatch.setattr(verdicts, "WIDE", points / 100 - 0.001)
    assert f"Error rates here are known to about \u00b1{points:.0f} points only." in reach()


def test_one_more_perturbation_on_one_model_sets_nobody_apart(tmp_path):
    with store_of(tmp_path) as store:
        before = headline(build_view(store))
        planter = synthetic.Planter(store, synthetic.evaluation_set())
        more = uap("from elsewhere", 10.0)
        store.add_uap(more)
        store.add_prediction_runs([planter.run("mid", more, planter.erring(0.99, "more"))])
        view = build_view(store)
    assert view.set_apart == []
    assert headline(view) == before
    assert view.variants[2].worst.uer == pytest.approx(0.8)
    assert any("leave out from elsewhere" in note for note in view.notes)
    sources = heat.heat_map(view, 10.0).sources
    assert "from elsewhere" in sources  # it is shown, where it was applied


def test_a_model_that_did_not_meet_another_is_compared_on_what_both_met(tmp_path):
    with store_of(tmp_path) as store:
        planter = synthetic.Planter(store, synthetic.evaluation_set())
        late = synthetic.model("full", sha256=synthetic.sha("model", "late"), variant="late")
        store.add_model(late)
        own = uap("late", 10.0)
        store.add_uap(own)
        runs = [planter.run("late", None, planter.erring(0.02, "late"))]
        runs.append(planter.run("late", own, planter.erring(0.3, "late", "own")))
        runs.append(planter.run("late", uap("zeta", 10.0), planter.erring(0.2, "late", "zeta")))
        store.add_prediction_runs(runs)
        view = build_view(store)
    assert view.set_apart == []
    assert headline(view).startswith("late and alpha survive better than zeta")

"""Several crafting seeds: means, intervals that cover them, and what the words then say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from harness.bootstrap import mean_over_seeds
from reports import words
from reports.inference import against_baseline, compare
from reports.masking_table import rows_of
from reports.report import write_report
from reports.selection import build_view
from reports.tradeoff import tradeoff_table
from reports.verdicts import conclusions
from tests.reports import synthetic
from tests.reports.synthetic import uap

RATES = {"full": (0.80, 0.70, 0.75), "q4": (0.60, 0.66, 0.63)}
"""White-box UER by crafting seed."""


@pytest.fixture
def seeded(planter, store):
    p = planter("full", "q4")
    for name, rates in RATES.items():
        runs = [p.run(name, None, p.erring(0.05, name))]
        for seed, rate in enumerate(rates):
            record = uap(name, 10.0, sha256=synthetic.sha(name, seed), seed=seed)
            store.add_uap(record)
            runs.append(p.run(name, record, p.erring(rate, name, seed)))
        # One budget has one seed only, and the first seed has the most rows: it is the headline's.
        runs.append(p.run(name, uap(name, 8.0), p.erring(0.5, name)))
        store.add_prediction_runs(runs)
    return p


def test_the_white_box_number_is_the_mean_over_seeds(seeded, store):
    view = build_view(store)
    assert view.craft is not None
    assert view.craft[2] == 0
    for variant in view.variants:
        own = variant.white_box
        assert own is not None
        wrong = np.stack([
            view.predictions(row) != np.asarray(view.evaluation.labels)
            for row in view.repeats(own)
        ])  # fmt: skip
        expected = mean_over_seeds(wrong)
        assert own.uer == pytest.approx(np.mean(RATES[variant.name]))
        assert (own.uer_low, own.uer_high) == (expected.low, expected.high)
        # Wider than images alone would have it.
        assert own.uer_high - own.uer_low > 0.1 > 4 * np.sqrt(0.25 / 600)
        (single,) = [row for row in variant.curve if row.eps == 8.0]
        assert view.repeats(single) == (single,)


def test_a_difference_between_methods_is_tested_over_seeds_too(seeded, store):
    view = build_view(store)
    full, q4 = (v.white_box for v in view.variants)
    found = compare(view, q4, full)
    assert found.value == pytest.approx(np.mean(RATES["q4"]) - np.mean(RATES["full"]))
    (test,) = against_baseline(view, "white_box")
    assert test.p == found.p
    # The same two perturbations alone would have been called different with far more certainty.
    alone = compare(replace(view, seeds={}, memo={}), q4, full)
    assert alone.p < 1e-6 < found.p


def test_the_report_says_what_its_intervals_cover(seeded, store, tmp_path):
    view = build_view(store)
    said = " ".join(s.text for g in conclusions(view) for s in g.sentences if g.anchor == "reach")
    said = said.replace(words.NBSP, " ")
    assert "White-box UER over crafting seeds, mean and 95 % interval: Full 75.0 %" in said
    assert "(3 seeds)" in said
    assert "drawn together with replacement (B = 2,000)" in said
    assert "one crafting seed" not in said
    cell = tradeoff_table(view).rows[0].cells[2]
    assert cell.text == "75.0"
    html = write_report(store, tmp_path / "out").html.read_text(encoding="utf-8")
    assert "hierarchical bootstrap" in html
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    repeated = [row for row in rows if row["seeds"]]
    assert {(row["variant"], row["seed"]) for row in repeated} == {
        (name, seed) for name in RATES for seed in range(3)
    }
    for row in repeated:  # each keeps its own numbers beside the mean
        assert row["uer"] == pytest.approx(RATES[row["variant"]][row["seed"]], abs=1e-3)
        assert row["uer_mean"] == pytest.approx(np.mean(RATES[row["variant"]]))
        assert row["uer_mean_low"] < row["uer_mean"] < row["uer_mean_high"]
    assert rows_of(store, view.rows) == rows
    assert not any("crafting seeds" in note for note in view.notes)  # none is left undrawn


def test_a_source_that_was_trained_anew_is_no_other_seed(planter, store):
    p = planter("full")
    runs = [p.run("full", None, p.erring(0.05, "c"))]
    for seed, checkpoint in enumerate(("a", "b")):
        meta = {"checkpoint_sha256": checkpoint}
        record = uap("full", 10.0, sha256=synthetic.sha("r", seed), seed=seed, meta=meta)
        store.add_uap(record)
        runs.append(p.run("full", record, p.erring(0.5 + 0.2 * seed, seed)))
    store.add_prediction_runs(runs)
    view = build_view(store)
    assert view.seeds == {}
    assert any("crafting seeds" in note for note in view.notes)

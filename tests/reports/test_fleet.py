"""What carries over from one model to others, and what is said where nothing does."""

from __future__ import annotations

import pytest

from harness.store import open_store
from reports import words
from reports.fleet import fleet
from reports.selection import build_view
from tests.reports import synthetic
from tests.reports.synthetic import uap

NAMES = ("full", "pp2", "q4")
CLEAN = 0.05
THEIRS = synthetic.model(
    "full", sha256=synthetic.sha("model", "theirs"), variant="theirs", method="other"
)


def plant(p, name, rates, *, clean=CLEAN):
    """One model's runs: {source: UER at eps 10}; a higher rate errs on a superset."""
    runs = [p.run(name, None, p.erring(clean, "same"))]
    runs += [p.run(name, uap(source, 10.0), p.erring(r, "same")) for source, r in rates.items()]
    p.store.add_prediction_runs(runs)


def said(store) -> str:
    return fleet(build_view(store))[0].replace(words.NBSP, " ")


@pytest.fixture
def three(planter, store):
    p = planter(*NAMES)
    plant(p, "full", {"full": 0.80, "pp2": 0.40, "q4": 0.60})
    plant(p, "pp2", {"full": 0.40, "pp2": 0.80, "q4": 0.60})
    plant(p, "q4", {"full": 0.40, "pp2": 0.40, "q4": 0.80})
    return p


def test_the_source_that_carries_over_most_is_named_with_its_test(three, store):
    text = said(store)
    assert text.startswith("An attacker who extracts one device attacks the others too")
    assert "crafted on Q4 reaches 60.0 % UER on average over the other variants" in text
    assert "shown to be more than any other source" in text


def test_a_file_that_met_one_perturbation_does_not_decide_which_carries_over(three, store):
    before = said(store)
    store.add_model(THEIRS)
    plant(three, "theirs", {"full": 0.95})
    assert said(store) == before


def test_nor_does_a_model_that_guesses(three, store):
    before = said(store)
    store.add_model(THEIRS)
    plant(three, "theirs", {"full": 0.95, "pp2": 0.91, "q4": 0.90}, clean=0.90)
    assert said(store) == before


def test_nor_does_a_perturbation_that_only_one_model_met(three, store):
    before = said(store)
    three.store.add_prediction_runs(
        [three.run("full", uap("sfp", 10.0), three.erring(0.95, "same"))]
    )
    assert said(store) == before


def test_where_no_model_met_all_the_matrix_is_said_to_be_incomplete(planter, store):
    p = planter(*NAMES)
    for victim, source in (("full", "pp2"), ("pp2", "q4"), ("q4", "full")):
        plant(p, victim, {victim: 0.80, source: 0.50})
    texts = fleet(build_view(store))
    assert texts[0].startswith("An attacker who extracts one device")
    assert "the transfer matrix is incomplete" in texts[1]


def test_a_mix_needs_two_models_that_keep_the_clean_accuracy(planter, store):
    p = planter("full", "q4")
    plant(p, "full", {"full": 0.80, "q4": 0.40})
    plant(p, "q4", {"full": 0.60, "q4": 0.80}, clean=0.40)
    assert "keep the baseline\u2019s clean accuracy" in " ".join(fleet(build_view(store)))


def test_without_clean_images_nothing_is_said_to_carry_over(planter, store):
    p = planter("full", "q4")
    for name, other in (("full", "q4"), ("q4", "full")):
        runs = [p.run(name, uap(s, 10.0), p.erring(0.6, "same")) for s in (name, other)]
        store.add_prediction_runs(runs)
    assert said(store).endswith("; not compared with clean images.")


def test_where_nothing_carries_over_that_is_said(planter, store):
    p = planter("full", "q4")
    plant(p, "full", {"full": 0.80, "q4": CLEAN})
    plant(p, "q4", {"full": CLEAN, "q4": 0.80})
    text = said(store)
    assert text.startswith("No perturbation is shown to carry over: the strongest, crafted on")
    assert "where 5.0 % are wrong on clean images." in text


def test_noise_is_seldom_said_to_carry_over(tmp_path):
    """Eight models that no perturbation harms; the strongest of their transfers is picked."""
    names = ("full", "sfp", "pp2", "pp3", "pp4", "q2", "q3", "q4")
    claimed = 0
    for seed in range(20):
        with open_store(tmp_path / f"{seed}.db") as store:
            evaluation = synthetic.evaluation_set()
            store.add_evaluation_set(evaluation)
            p = synthetic.Planter(store, evaluation)
            for name in names:
                store.add_model(synthetic.model(name))
                store.add_uap(uap(name, 10.0))
            for name in names:
                runs = [p.run(name, None, p.erring(0.2, seed, name))]
                runs += [p.run(name, uap(s, 10.0), p.erring(0.2, seed, name, s)) for s in names]
                store.add_prediction_runs(runs)
            claimed += said(store).startswith("An attacker")
    assert claimed <= 3  # of 20, each at 2.5 % or less

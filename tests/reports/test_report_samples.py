"""Models of which a device saw different parts of the images: what is said is of the whole set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.records import PredictionRun
from reports.page import html_text
from reports.selection import build_view
from reports.tables import latex_text, markdown_text
from reports.tradeoff import tradeoff_table
from reports.words import percent
from tests.reports import synthetic
from tests.reports.synthetic import uap

SIZES = {"full": 100, "q4": 330}
RATES = {"full": 0.8, "q4": 0.6}


def biased(run: PredictionRun, wrong: np.ndarray, count: int) -> PredictionRun:
    """A sample in which the images that went wrong are twice as frequent as in the set."""
    rng = np.random.default_rng(3)
    weights = np.where(wrong, 2.0, 1.0)
    order = rng.choice(len(wrong), size=count, replace=False, p=weights / weights.sum())
    seen = tuple(int(i) for i in order)
    return replace(run, predictions=tuple(run.predictions[i] for i in seen), indices=seen)


@pytest.fixture
def sampled(planter, store):
    p = planter(*SIZES)
    arm = replace(synthetic.MACHINE, arch="aarch64", cpu="Cortex-A72")
    board = synthetic.Planter(store, p.evaluation, device="rpi4", emulated=True, machine=arm)
    labels = np.asarray(p.evaluation.labels)
    for name, size in SIZES.items():
        perturbation = uap(name, 10.0)
        clean, attacked = p.erring(0.05, name), p.erring(RATES[name], name)
        store.add_prediction_runs(
            [
                p.run(name, None, clean, "torch"),
                p.run(name, perturbation, attacked, "torch"),
                biased(board.run(name, None, clean), attacked != labels, size),
                biased(board.run(name, perturbation, attacked), attacked != labels, size),
            ]
        )
    return build_view(store)


def test_rates_are_of_the_whole_set_not_of_the_sample(sampled):
    for variant in sampled.variants:
        row = variant.white_box
        assert row.n == SIZES[variant.name]
        # The device agrees with PyTorch everywhere, so PyTorch's rate is the estimate, exactly.
        assert row.uer == pytest.approx(RATES[variant.name], abs=1e-3)
        assert row.uer_low < row.uer < row.uer_high
        assert variant.clean.clean_accuracy == pytest.approx(0.95, abs=1e-3)
    raw = {r.variant: r.uer for r in sampled.rows if r.device == "rpi4" and r.eps == 10.0}
    assert all(raw[name] > RATES[name] + 0.03 for name in SIZES), "the sample is biased"


@pytest.mark.parametrize("text_of", [html_text, markdown_text, latex_text])
def test_every_output_says_that_it_is_emulated_and_a_sample(sampled, text_of):
    text = text_of(sampled).replace("--", "\u2013").replace("\\-", "")
    assert "an emulated rpi4" in text
    assert "a sample of 100\u2013330 of 600 images" in text


def test_the_headline_and_the_table_agree_on_the_estimate(sampled):
    text = markdown_text(sampled).replace("\\", "")
    assert percent(RATES["full"]) in text.split("## Trade-off")[0]
    table = tradeoff_table(sampled)
    column = [c.title for c in table.columns].index("White-box")
    cells = {row.name: row.cells[column].text for row in table.rows}
    assert cells == {name: percent(rate, unit=False) for name, rate in RATES.items()}


def test_no_sentence_claims_tests_on_images_a_model_did_not_see(sampled):
    text = markdown_text(sampled).replace("\\", "")
    assert "on these 600 images" not in text
    assert "the images that both were given (100\u2013330 a model; all where files agree)" in text


def test_without_pytorch_a_sample_stands_for_itself(planter, store):
    p = planter("full")
    board = synthetic.Planter(store, p.evaluation, device="pi", machine=synthetic.MACHINE)
    attacked = p.erring(0.5, "full")
    labels = np.asarray(p.evaluation.labels)
    run = biased(board.run("full", uap("full", 10.0), attacked), attacked != labels, 200)
    store.add_prediction_runs([run])
    view = build_view(store)
    row = view.variants[0].white_box
    assert row.uer == pytest.approx(np.mean((attacked != labels)[list(run.indices)]))
    assert f"pi ({synthetic.MACHINE.arch}, " in markdown_text(view).replace("\\", "")

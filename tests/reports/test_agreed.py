"""By which predictions models are compared that a device gave only some of the images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.metrics import UNSEEN
from reports import inference
from reports.agreed import agreed
from reports.estimates import where_measured
from reports.selection import build_view
from tests.reports.synthetic import uap

N = 10_000
TORCH = ("m", "u", "local", False, "torch")
FILE = ("m", "u", "local", False, "onnxruntime")
CLEAN_TORCH = ("m", None, "local", False, "torch")
CLEAN_FILE = ("m", None, "local", False, "onnxruntime")


def sample(answers: np.ndarray, n: int) -> np.ndarray:
    seen = np.random.default_rng(0).permutation(answers.size)[:n]
    found = np.full(answers.size, UNSEEN)
    found[seen] = answers[seen]
    return found


@pytest.fixture
def torch() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 10, N)


def test_a_file_that_agrees_is_judged_by_pytorch_on_all_images(torch):
    answers = {TORCH: torch, FILE: sample(torch, 250)}
    assert agreed(answers)[FILE] is torch


def test_one_answer_otherwise_and_all_of_the_files_samples_speak_for_themselves(torch):
    other = sample(torch, 250)
    seen = np.flatnonzero(other != UNSEEN)[0]
    other[seen] = (other[seen] + 1) % 10
    answers = {TORCH: torch, FILE: sample(torch, 250), CLEAN_TORCH: torch, CLEAN_FILE: other}
    judged = agreed(answers)
    assert judged[FILE] is answers[FILE]
    assert judged[CLEAN_FILE] is other


def test_a_file_that_differs_anywhere_speaks_by_its_samples_everywhere(torch):
    board, another = ("m", "u", "rpi4", True, "onnxruntime"), ("n", "u", *FILE[2:])
    there = sample(torch, 250)
    seen = np.flatnonzero(there != UNSEEN)[0]
    there[seen] = (there[seen] + 1) % 10
    answers = {TORCH: torch, FILE: sample(torch, 250), board: there}
    answers |= {("n", *TORCH[1:]): torch, another: sample(torch, 250)}
    judged = agreed(answers)
    assert judged[FILE] is answers[FILE]
    assert judged[board] is there
    assert judged[another] is torch


@pytest.mark.parametrize(("n", "enough"), [(117, False), (118, True)])
def test_so_few_that_a_difference_to_choose_by_could_hide_are_not_enough(torch, n, enough):
    answers = {TORCH: torch, FILE: sample(torch, n)}
    assert (agreed(answers)[FILE] is torch) == enough


def test_without_all_of_pytorchs_answers_there_is_nothing_to_take(torch):
    alone = {FILE: sample(torch, 250)}
    assert agreed(alone)[FILE] is alone[FILE]
    partly = {TORCH: sample(torch, 5_000), FILE: sample(torch, 250)}
    assert agreed(partly)[FILE] is partly[FILE]


def plant(planter, store, *, differing: int):
    """Full and Q4, right on twelve more, on 600 images by PyTorch and on 200 by their files."""
    p = planter("full", "q4")
    seen = np.arange(0, 600, 3)
    attacked = p.erring(0.60, "full")
    fewer = attacked.copy()
    spared = np.flatnonzero(attacked != p.labels)[:12]
    fewer[spared] = p.labels[spared]
    for name, under_attack in (("full", attacked), ("q4", fewer)):
        clean = p.erring(0.05, "clean")
        for under, answers in ((None, clean), (uap(name, 10.0), under_attack)):
            there = answers[seen].copy()
            there[:differing] = (there[:differing] + 1) % 10
            store.add_prediction_runs(
                [
                    p.run(name, under, answers, "torch"),
                    replace(
                        p.run(name, under, answers),
                        predictions=tuple(int(v) for v in there),
                        indices=tuple(int(i) for i in seen),
                    ),
                ]
            )
    return build_view(store)


def test_a_difference_that_the_sample_is_too_small_for_is_shown_by_all_images(planter, store):
    view = plant(planter, store, differing=0)
    (test,) = inference.against_baseline(view, "white_box")
    assert test.shown
    assert test.difference == pytest.approx(-0.02, abs=1e-3)
    said = where_measured(view)
    assert "a sample of 200 of 600 images" in said
    assert "every time (800 predictions)" in said
    assert "all 600" in said


def test_files_that_differ_from_pytorch_are_compared_on_what_they_saw(planter, store):
    view = plant(planter, store, differing=3)
    (test,) = inference.against_baseline(view, "white_box")
    assert not test.shown
    assert "(12 of 800 predictions)" in where_measured(view)


def test_a_model_run_on_all_images_is_judged_by_its_own_answers(planter, store):
    p = planter("full", "q4")
    answers = p.erring(0.60, "full")
    own = answers.copy()
    own[:30] = (own[:30] + 1) % 10
    part = tuple(range(0, 600, 3))
    for under in (None, uap("full", 10.0)):
        store.add_prediction_runs(
            [p.run("full", under, answers, "torch"), p.run("full", under, own)]
        )
    for under in (None, uap("q4", 10.0)):
        run = p.run("q4", under, answers)
        some = tuple(run.predictions[i] for i in part)
        store.add_prediction_runs(
            [p.run("q4", under, answers, "torch"), replace(run, predictions=some, indices=part)]
        )
    said = where_measured(build_view(store))
    assert "a sample of 200\u2013600 of 600 images" in said
    assert "every time" not in said
    assert "(60 of 1,600 predictions)" in said


def test_a_row_that_pytorch_did_not_see_keeps_the_page_from_saying_all(planter, store):
    plant(planter, store, differing=0)
    assert "every time" in where_measured(build_view(store))
    p = planter("full", "q4")
    run = p.run("full", uap("full", 10.0, target=3), p.steered(0.4, 3, "full"))
    part = tuple(range(0, 600, 3))
    some = replace(run, predictions=tuple(run.predictions[i] for i in part), indices=part)
    store.add_uap(uap("full", 10.0, target=3))
    store.add_prediction_runs([some])
    assert "every time" not in where_measured(build_view(store))


def test_a_sample_that_leans_the_other_way_than_the_estimates_shows_nothing(planter, store):
    """Q4 errs less on the images that its file saw, and more by the estimate of all."""
    p = planter("full", "q4")
    part = np.arange(0, 600, 3)
    right = p.labels.copy()
    full, q4 = right.copy(), right.copy()
    full[part[:60]] = (right[part[:60]] + 1) % 10
    other = np.setdiff1d(np.arange(600), part)[:200]
    q4[other] = (right[other] + 1) % 10
    device = q4[part].copy()
    device[0] = (right[0] + 1) % 10  # otherwise than PyTorch, so the sample speaks for itself
    for name, torch, there in (("full", full, full[part]), ("q4", q4, device)):
        for under in (None, uap(name, 10.0)):
            some = replace(
                p.run(name, under, torch),
                predictions=tuple(int(v) for v in there),
                indices=tuple(int(i) for i in part),
            )
            store.add_prediction_runs([p.run(name, under, torch, "torch"), some])
    (test,) = inference.against_baseline(build_view(store), "white_box")
    sample = float(np.mean(device != right[part]) - np.mean(full[part] != right[part]))
    assert sample * test.difference < 0
    assert not test.shown


def test_the_deployment_gap_is_of_the_images_that_the_device_saw(planter, store):
    for gap in inference.deployment_gaps(plant(planter, store, differing=3)):
        assert gap.n == 200
        assert gap.disagreements == 3

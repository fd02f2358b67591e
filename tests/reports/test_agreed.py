"""By which predictions models are compared that a device gave only some of the images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.metrics import UNSEEN
from reports import inference
from reports.agreed import agreed, agreements
from reports.estimates import where_measured
from reports.selection import build_view
from reports.view import DeviceId
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
    assert agreements(answers, DeviceId("local", False)) == (250, 0)


def test_one_answer_otherwise_and_all_of_the_files_samples_speak_for_themselves(torch):
    other = sample(torch, 250)
    seen = np.flatnonzero(other != UNSEEN)[0]
    other[seen] = (other[seen] + 1) % 10
    answers = {TORCH: torch, FILE: sample(torch, 250), CLEAN_TORCH: torch, CLEAN_FILE: other}
    judged = agreed(answers)
    assert judged[FILE] is answers[FILE]
    assert judged[CLEAN_FILE] is other
    assert agreements(answers, DeviceId("local", False)) == (500, 1)


def test_another_place_where_it_differs_says_nothing_of_this_one(torch):
    board = ("m", "u", "rpi4", True, "onnxruntime")
    answers = {TORCH: torch, FILE: sample(torch, 250), board: (sample(torch, 250) + 1) % 10}
    judged = agreed(answers)
    assert judged[FILE] is torch
    assert judged[board] is answers[board]


@pytest.mark.parametrize(("n", "enough"), [(117, False), (118, True)])
def test_so_few_that_a_difference_to_choose_by_could_hide_are_not_enough(torch, n, enough):
    answers = {TORCH: torch, FILE: sample(torch, n)}
    assert (agreed(answers)[FILE] is torch) == enough


def test_without_all_of_pytorchs_answers_there_is_nothing_to_take(torch):
    alone = {FILE: sample(torch, 250)}
    assert agreed(alone)[FILE] is alone[FILE]
    partly = {TORCH: sample(torch, 5_000), FILE: sample(torch, 250)}
    assert agreed(partly)[FILE] is partly[FILE]
    assert agreements(alone, DeviceId("local", False)) == (0, 0)


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


def test_the_deployment_gap_is_of_the_images_that_the_device_saw(planter, store):
    for gap in inference.deployment_gaps(plant(planter, store, differing=3)):
        assert gap.n == 200
        assert gap.disagreements == 3

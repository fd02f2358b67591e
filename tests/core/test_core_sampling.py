"""Samples: one order for all, parts put together, a budget shared by what is behind."""

from __future__ import annotations

import numpy as np
from core_cases import digest, machine, prediction_run
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.metrics import UNSEEN
from harness.records import PredictionRun
from harness.sampling import Budget, behind, by_machine, key_of, lead, merged, sample_order
from harness.store_rows import StoredPrediction

IMAGES = {digest("evaluation"): 8}


def stored(*runs: PredictionRun) -> list[StoredPrediction]:
    return [StoredPrediction(i, run, f"2026-01-01T00:00:0{i}", "abc") for i, run in enumerate(runs)]


# --- the order ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.integers(0, 2**31))
def test_every_prefix_has_the_classes_in_their_proportion(labels: list[int], seed: int) -> None:
    classes = np.array(labels)
    order = sample_order(classes, seed=seed)
    assert sorted(order.tolist()) == list(range(classes.size))
    kinds = np.unique(classes).size
    for n in range(1, classes.size + 1):
        for label in np.unique(classes):
            share = np.mean(classes == label)
            assert abs(np.count_nonzero(classes[order[:n]] == label) - n * share) <= kinds + 1


def test_the_order_is_fixed_by_the_seed_alone() -> None:
    labels = np.arange(200) % 7
    first, again, other = (sample_order(labels, seed=seed) for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()


def test_every_image_is_as_likely_to_be_in_a_sample() -> None:
    labels = np.repeat([0, 1, 2], [30, 12, 18])
    n, draws = 20, 4000
    times = np.zeros(labels.size)
    for seed in range(draws):
        times[sample_order(labels, seed=seed)[:n]] += 1
    expected = draws * n / labels.size
    # Six standard deviations of a binomial count.
    assert np.abs(times - expected).max() < 6 * np.sqrt(expected * (1 - n / labels.size))


# --- parts ---------------------------------------------------------------------------------------


def test_parts_add_up_and_the_last_word_counts() -> None:
    runs = [
        prediction_run((1, 2), indices=(6, 0), seconds=1.0),
        prediction_run((3, 9), indices=(2, 6), seconds=2.0),
        prediction_run((5,), indices=(1,), uap="u"),
    ]
    found = merged(stored(*runs), images=IMAGES)
    assert found.keys() == {key_of(runs[0]), key_of(runs[2])}
    clean = found[key_of(runs[0])]
    assert clean.predictions.tolist() == [2, UNSEEN, 3, *[UNSEEN] * 3, 9, UNSEEN]
    assert clean.seen.tolist() == [0, 2, 6]
    assert (clean.seconds, clean.created_at) == (3.0, "2026-01-01T00:00:01")


def test_a_complete_run_starts_anew_and_a_part_of_it_takes_nothing_away() -> None:
    part = prediction_run((1, 2), indices=(6, 0))
    whole = prediction_run(tuple(range(8)))
    key = key_of(part)
    assert merged(stored(part, whole), images=IMAGES)[key].predictions.tolist() == [*range(8)]
    # A complete run that grows by a part of itself stays complete.
    assert merged(stored(whole, part), images=IMAGES)[key].complete


def test_machines_are_kept_apart_and_a_small_sample_hides_no_complete_run() -> None:
    part = prediction_run((1, 2), indices=(6, 0))
    whole = prediction_run(tuple(range(8)))
    other = prediction_run((4,), indices=(3,), machine=machine(runtime_version="9"))
    key = key_of(part)
    seen = [run.seen.size for run in by_machine(stored(whole, other), images=IMAGES)[key]]
    assert seen == [8, 1]
    # Where none is complete the newest counts, and the other's part is there to go on with.
    runs = by_machine(stored(part, other, part), images=IMAGES)[key]
    assert [run.seen.tolist() for run in runs] == [[0, 6], [3]]
    assert [run.machine.runtime_version for run in runs] == [machine().runtime_version, "9"]
    # Of two complete ones the newest.
    newer = prediction_run((5,) * 8, machine=machine(runtime_version="9"))
    assert merged(stored(whole, newer), images=IMAGES)[key].predictions.tolist() == [5] * 8
    third = prediction_run((4,), indices=(3,), machine=machine(runtime_version="8"))
    assert merged(stored(newer, whole, third), images=IMAGES)[key].predictions[0] == 0


# --- how far to go -------------------------------------------------------------------------------


def test_the_lead_is_the_head_of_the_order_that_is_known() -> None:
    order = np.array([3, 1, 0, 2])
    for seen, expected in (((), 0), ((3,), 1), ((1, 0), 0), ((3, 1, 2), 2), ((0, 1, 2, 3), 4)):
        predictions = np.full(4, UNSEEN)
        predictions[list(seen)] = 5
        assert lead(order, predictions) == expected


def test_who_is_behind_goes_on_while_one_image_more_fits() -> None:
    budget = Budget(seconds=20.0)
    assert behind([0, 0], [0.0, 0.0], images=9, budget=budget) == [0, 1]
    assert behind([4, 4], [8.0, 8.0], images=9, budget=budget) == [0, 1]  # 16 + 4 fit
    assert behind([4, 4], [8.1, 8.1], images=9, budget=budget) == []
    # A perturbation more has its own third; what is ahead waits.
    assert behind([4, 4, 0], [8.0, 8.0, 0.0], images=9, budget=budget) == [2]
    assert behind([4, 4, 3], [8.0, 8.0, 4.9], images=9, budget=budget) == [2]
    assert behind([4, 4, 3], [8.0, 8.0, 6.0], images=9, budget=budget) == []
    # However small the budget, something is measured; however large, not more than there is.
    assert behind([0], [5.0], images=9, budget=Budget(seconds=0.001)) == [0]
    assert behind([9, 9], [0.0, 0.0], images=9, budget=Budget()) == []
    assert behind([8, 8], [1e9, 1e9], images=9, budget=Budget()) == [0, 1]


def test_so_many_images_are_enough() -> None:
    few = Budget(images=5)
    assert behind([4, 5], [1e9, 1e9], images=9, budget=few) == [0]
    assert behind([5, 7], [1.0, 1.0], images=9, budget=few) == []
    assert behind([3], [1.0], images=3, budget=few) == []
    assert (few.of(9), few.of(3), Budget().of(9)) == (5, 3, 9)
    assert not few.limited  # how fast it goes decides nothing

"""`--until-ci` looks at its interval again and again: what it stops with must still hold."""

from __future__ import annotations

import numpy as np
import pytest
from core_cases import machine

from harness.metrics import UNSEEN, Classes, wilson
from harness.pipeline.on_device import Sample, _next_size
from harness.results import corrected_uer
from harness.sampling import Budget, Merged, RunKey, sample_order

IMAGES, RUNS = 2000, 150
KEYS = {
    uap: RunKey("m", "e", uap, "rpi4", emulated=True, runtime="onnxruntime") for uap in (None, "u")
}


def complete(predictions: Classes) -> Merged:
    return Merged(KEYS["u"], machine(), predictions, 1.0, "", None)


def stopped(
    truth: dict[str | None, Classes], in_torch: Classes | None, *, until_ci: float, seed: int
) -> Sample:
    """The sample with which the command stops; predictions are 0 where right, 1 where wrong."""
    labels = np.zeros(IMAGES, dtype=np.int64)
    sample = Sample.of(
        {uap: KEYS[uap] for uap in truth},
        labels=labels,
        order=sample_order(labels, seed=seed),
        known={},
        in_torch={} if in_torch is None else {"u": complete(in_torch)},
        budget=Budget(until_ci=until_ci),
    )
    size = 0
    while uaps := sample.behind():
        size = _next_size(sample, uaps, size=size, rate=1e-4, batch_size=128)
        start = min(sample.leads)
        where = sample.order[start : start + size]
        for uap in uaps:
            sample.predictions[uap][where] = truth[uap][where]
    return sample


@pytest.mark.parametrize(
    ("rate", "until_ci", "differing"),
    [(0.9, 5.0, None), (0.1, 5.0, None), (0.3, 8.0, None), (0.4, 1.0, 0.01), (0.4, 3.0, 0.05)],
)
def test_the_interval_it_stops_with_covers_the_truth(
    rate: float, until_ci: float, differing: float | None
) -> None:
    generator = np.random.default_rng(7)
    covered, early = 0, 0
    for run in range(RUNS):
        wrong = (generator.random(IMAGES) < rate).astype(np.int64)
        flipped = generator.random(IMAGES) < (differing or 0.0)
        in_torch = None if differing is None else np.where(flipped, 1 - wrong, wrong)
        truth = {None: np.zeros(IMAGES, dtype=np.int64), "u": wrong}
        sample = stopped(truth, in_torch, until_ci=until_ci, seed=run)
        reached = complete(sample.predictions["u"])
        early += reached.seen.size < IMAGES
        if differing is None:
            low, high = wilson(int(wrong[reached.seen].sum()), reached.seen.size)
            covered += low <= wrong.mean() <= high
        else:
            assert in_torch is not None
            labels = np.zeros(IMAGES, dtype=np.int64)
            corrected = corrected_uer(reached, complete(in_torch), labels)
            if corrected is not None:
                covered += corrected.low <= wrong.mean() <= corrected.high
            else:
                covered += 1
        # Clean and attacked are the same images.
        both = [sample.predictions[uap] != UNSEEN for uap in (None, "u")]
        assert (both[0] == both[1]).all()
    assert early > RUNS / 2  # it does stop before the end
    # 95 %, less four standard deviations of 150 runs.
    assert covered / RUNS > 0.95 - 4 * (0.95 * 0.05 / RUNS) ** 0.5


def test_without_a_perturbation_the_clean_error_must_be_as_precise() -> None:
    wrong = (np.random.default_rng(1).random(IMAGES) < 0.3).astype(np.int64)
    sample = stopped({None: wrong}, None, until_ci=5.0, seed=0)
    assert 250 < np.count_nonzero(sample.predictions[None] != UNSEEN) < IMAGES

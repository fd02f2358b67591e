"""Metrics against values counted by hand, and against published intervals and tests."""

from __future__ import annotations

import math
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from core_cases import latency_process
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness import metrics
from harness.metrics import (
    PERCENTILE_MIN_N,
    Rate,
    corrected_rate,
    most_unseen,
    paired_difference,
    summarise_latency,
    wilson,
)

# Ten images. Clean mistakes: 2 and 7. Under attack: 0, 2, 4, 6, 7, 9 are wrong; 2 keeps its wrong
# class, 7 moves to another wrong class, and 5 is right in both.
LABELS = np.array([0, 0, 1, 1, 2, 2, 3, 3, 0, 1])
CLEAN = np.array([0, 0, 3, 1, 2, 2, 3, 1, 0, 1])
ATTACKED = np.array([3, 0, 3, 1, 3, 2, 2, 2, 0, 3])


def test_rates_counted_by_hand() -> None:
    assert metrics.accuracy(LABELS, CLEAN) == Rate(8, 10)
    assert metrics.uer(LABELS, ATTACKED) == Rate(6, 10)  # 2 and 7 were wrong before: they count
    assert metrics.evasion_on_correct(LABELS, CLEAN, ATTACKED) == Rate(4, 8)
    assert metrics.fooling_rate(CLEAN, ATTACKED) == Rate(5, 10)  # 0 4 6 9, and 7: wrong to wrong
    assert metrics.agreement(CLEAN, ATTACKED) == Rate(5, 10)


def test_targeted_rates_counted_by_hand() -> None:
    assert metrics.tsr(ATTACKED, 3) == Rate(4, 10)
    assert metrics.tsr_excluding_target(LABELS, ATTACKED, 3) == Rate(4, 8)
    assert metrics.tsr(ATTACKED, 0) == Rate(2, 10)  # both are images of class 0
    assert metrics.tsr_excluding_target(LABELS, ATTACKED, 0) == Rate(0, 7)


def test_a_harmless_perturbation_still_has_the_uer_of_clean_mistakes() -> None:
    assert metrics.uer(LABELS, CLEAN).value == 0.2
    assert metrics.evasion_on_correct(LABELS, CLEAN, CLEAN).value == 0.0


def test_nothing_counted_is_none_not_zero() -> None:
    none_correct = metrics.evasion_on_correct(LABELS, (LABELS + 1) % 4, ATTACKED)
    assert (none_correct.value, none_correct.interval) == (None, (None, None))
    only_target = metrics.tsr_excluding_target(np.array([1, 1]), np.array([1, 0]), 1)
    assert only_target.value is None


def test_wilson_known_values() -> None:
    # z^2 = 3.8415: with no success the upper bound is z^2 / (n + z^2).
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-7)
    assert wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=5e-5)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_wilson_is_scipys_and_holds_the_rate(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 10**6))
    successes = data.draw(st.integers(0, n))
    confidence = data.draw(st.sampled_from([0.9, 0.95, 0.99]))
    low, high = wilson(successes, n, confidence=confidence)
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 600, 10_000])
def test_wilson_ends_exactly_at_zero_and_one(n: int) -> None:
    assert wilson(0, n)[0] == 0.0
    assert wilson(n, n)[1] == 1.0
    assert wilson(0, n)[1] == pytest.approx(1 - wilson(n, n)[0], abs=1e-15)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)


# --- a sample beside the whole set ---------------------------------------------------------------


def wrong(gained: int, lost: int, both: int, n: int) -> tuple[Any, Any]:
    """(PyTorch wrong, device wrong), bool [n]."""
    torch, device = np.zeros(n, bool), np.zeros(n, bool)
    device[:gained] = True
    torch[gained : gained + lost] = True
    torch[gained + lost :][:both] = device[gained + lost :][:both] = True
    return torch, device


def score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango 1998, equation of the score statistic, with half a count of continuity."""
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    p_lost = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)
    variance = n * (2 * p_lost + difference * (1 - difference))
    return (gained - lost - n * difference - 0.5) / math.sqrt(variance)


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 2, 50), (1, 0, 30), (7, 7, 400)])
def test_the_limits_are_where_the_score_test_turns(gained: int, lost: int, n: int) -> None:
    low, high = paired_difference(gained, lost, n, population=10**9)
    z = stats.norm.ppf(0.975)
    assert score(gained, lost, n, low) == pytest.approx(z, rel=1e-4)
    assert score(lost, gained, n, -high) == pytest.approx(z, rel=1e-4)


@given(st.integers(1, 400), st.integers(0, 400), st.data())
def test_the_interval_holds_its_estimate_and_mirrors(
    n: int, more: int, data: st.DataObject
) -> None:
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    population = n + more
    low, high = paired_difference(gained, lost, n, population=population)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    mirrored = paired_difference(lost, gained, n, population=population)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)
    # Only a whole set is known exactly.
    assert (low == high) == (more == 0)


def test_without_a_disagreement_the_bound_is_exact() -> None:
    assert paired_difference(0, 0, 300, population=10**6)[1] == pytest.approx(3 / 300, rel=0.01)
    for n, population in ((10, 40), (100, 600), (599, 600)):
        most = most_unseen(n, population=population)
        unseen = stats.hypergeom.pmf(0, population, [most, most + 1], n)
        assert most == 1 or unseen[0] >= 0.05
        assert unseen[1] < 0.05
        assert paired_difference(0, 0, n, population=population) == (
            -most / population,
            most / population,
        )


@pytest.mark.parametrize("numbers", [(0, 0, 0, 5), (0, 0, 6, 5), (-1, 0, 3, 5), (2, 2, 3, 5)])
def test_impossible_samples_are_refused(numbers: tuple[int, int, int, int]) -> None:
    gained, lost, n, population = numbers
    with pytest.raises(ValueError, match="no sample"):
        paired_difference(gained, lost, n, population=population)


def test_the_whole_set_needs_no_estimate() -> None:
    torch, device = wrong(3, 1, 40, 100)
    found = corrected_rate(torch, device, np.arange(100))
    assert found.value == found.low == found.high == pytest.approx(43 / 100)


@pytest.mark.parametrize("population", [300, 1500])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.9])
@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (0.005, 0), (0.01, 0.01), (0.05, 0.0), (0.1, 0.02)]
)
def test_the_interval_covers_the_truth(
    population: int, fraction: float, gained: float, lost: float
) -> None:
    """Drawn as the harness draws: at least 95 % of the samples, less what 400 draws may miss."""
    rng = np.random.default_rng(5)
    torch, device = wrong(
        round(gained * population), round(lost * population), population // 3, population
    )
    truth = device.mean()
    n, draws, held = round(fraction * population), 400, 0
    for _ in range(draws):
        indices = rng.choice(population, size=n, replace=False)
        found = corrected_rate(torch, device[indices], indices)
        held += found.low - 1e-12 <= truth <= found.high + 1e-12
    assert stats.binomtest(held, draws, 0.95, alternative="less").pvalue > 1e-3


def test_it_is_far_more_precise_than_the_samples_own_rate() -> None:
    """FACTS H: about 1,500 of 10,000 images give +-0.5 points at 1 % disagreement."""
    low, high = paired_difference(8, 7, 1500, population=10_000)
    assert 0.004 < (high - low) / 2 < 0.006
    sampled = wilson(750, 1500)
    assert (sampled[1] - sampled[0]) / 2 > 0.02


@pytest.mark.parametrize(("only_first", "only_second"), [(1, 0), (5, 1), (2, 9), (7, 7), (0, 12)])
def test_mcnemar_is_the_two_sided_binomial(only_first: int, only_second: int) -> None:
    both, neither = 3, 4
    first = np.array([1] * only_first + [0] * only_second + [1] * both + [0] * neither, dtype=bool)
    second = np.array([0] * only_first + [1] * only_second + [1] * both + [0] * neither, dtype=bool)
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(Fraction(comb(n, i), 2**n) for i in range(k + 1))
    assert metrics.mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_mcnemar_without_disagreement_is_one() -> None:
    wrong = np.array([True, False, True])
    assert metrics.mcnemar(wrong, wrong) == 1.0


# --- latency ------------------------------------------------------------------------------------


def process_of(n: int, **changes: Any) -> Any:
    """n samples, 1 to n ms."""
    return latency_process(tuple(range(1_000_000, (n + 1) * 1_000_000, 1_000_000)), **changes)


@pytest.mark.parametrize(
    ("name", "least"), [("p50_ms", 11), ("p90_ms", 64), ("p99_ms", 662)], ids=["p50", "p90", "p99"]
)
def test_a_percentile_needs_its_number_of_samples(name: str, least: int) -> None:
    assert getattr(summarise_latency([process_of(least - 1)], cores=2), name) is None
    q = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}[name]
    expected = np.percentile(np.arange(1, least + 1), q)
    value = getattr(summarise_latency([process_of(least)], cores=2), name)
    assert value == pytest.approx(expected, rel=1e-12)


def test_thresholds_are_those_of_the_protocol() -> None:
    assert [PERCENTILE_MIN_N[q] for q in (90, 95, 99, 99.9)] == [64, 130, 662, 6636]


def test_samples_of_all_processes_are_pooled() -> None:
    half = [latency_process((1_000_000,) * 32), latency_process((1_000_000,) * 32)]
    summary = summarise_latency(half, cores=2)
    assert (summary.n, summary.p50_ms, summary.p90_ms) == (64, 1.0, 1.0)
    assert (summary.load_ms, summary.first_ms, summary.rss_peak_bytes) == (5.0, 3.0, 200)
    assert (summary.verdict, summary.reasons) == ("VALID", ())


def test_peak_memory_is_the_largest_known() -> None:
    known = [process_of(3, rss_peak_bytes=b) for b in (None, 500, 300)]
    assert summarise_latency(known, cores=2).rss_peak_bytes == 500
    assert summarise_latency(known[:1], cores=2).rss_peak_bytes is None


@pytest.mark.parametrize(
    ("telemetry", "medians_ms", "verdict", "reasons"),
    [
        ([{}], (100, 100), "VALID", ()),
        ([{}], (100, 105), "VALID", ()),  # spread 5/102.5
        ([{}], (100, 106), "UNSTABLE", ("medians of processes spread 6% (limit 5%)",)),
        ([{"frequency_mhz": 1500}, {"frequency_mhz": 1470}], (100, 100), "VALID", ()),
        (
            [{"frequency_mhz": 1500}, {"frequency_mhz": 1200}],
            (100, 100),
            "UNSTABLE",
            ("CPU frequency drifted 20% (limit 2%)",),
        ),
        ([{"load_1m": 2.0}], (100, 100), "VALID", ()),
        ([{"load_1m": 2.5}], (100, 100), "UNSTABLE", ("load 2.5 on 2 cores",)),
        (
            [{"throttled": True, "load_1m": 3.0}],
            (100, 100),
            "INVALID",
            ("the board throttled its clock", "load 3.0 on 2 cores"),
        ),
        ([{"throttled": False, "frequency_mhz": None, "load_1m": None}], (100, 100), "VALID", ()),
    ],
)
def test_verdicts_and_their_reasons(
    telemetry: list[dict[str, Any]],
    medians_ms: tuple[int, ...],
    verdict: str,
    reasons: tuple[str, ...],
) -> None:
    processes = [
        latency_process((m * 1_000_000,) * 3, telemetry=tuple(telemetry)) for m in medians_ms
    ]
    summary = summarise_latency(processes, cores=2)
    assert (summary.verdict, summary.reasons) == (verdict, reasons)
    middle = sum(medians_ms) / len(medians_ms)
    assert summary.spread == pytest.approx((max(medians_ms) - min(medians_ms)) / middle)


@pytest.mark.parametrize("processes", [[], [latency_process(())]], ids=["none", "no samples"])
def test_a_latency_run_without_samples_is_refused(processes: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least one process"):
        summarise_latency(processes, cores=2)


# --- energy --------------------------------------------------------------------------------------


def test_energy_is_per_run_and_only_from_a_sensor() -> None:
    assert summarise_latency([process_of(4)], cores=2).energy_mj is None
    counter = [{"energy_uj": 1_000}, {"energy_uj": 5_000}, {"energy_uj": 9_000}]
    counted = process_of(4, telemetry=tuple(counter))
    assert summarise_latency([counted], cores=2).energy_mj == pytest.approx(8_000 / 4 / 1e3)
    # 2 W under load for 6 s, four runs: 3 J each. At the edges the board was idle.
    watts = [0, 1, 3, 2, 2, 2, 0]
    power = [{"power_uw": w * 1_000_000, "elapsed_ns": i * 10**9} for i, w in enumerate(watts)]
    measured = process_of(4, telemetry=tuple(power))
    assert summarise_latency([measured], cores=2).energy_mj == pytest.approx(3_000.0)
    edges = process_of(4, telemetry=(power[0], power[-1]))
    assert summarise_latency([edges], cores=2).energy_mj is None
    # A counter that wrapped, or a process without the sensor: nothing is claimed.
    wrapped = process_of(4, telemetry=({"energy_uj": 9_000}, {"energy_uj": 10}))
    assert summarise_latency([wrapped], cores=2).energy_mj is None
    assert summarise_latency([counted, process_of(4)], cores=2).energy_mj is None


@given(st.integers(21, 400), st.sampled_from([0.95, 0.998]))
def test_the_bound_is_the_largest_that_the_sample_leaves_possible(
    n: int, confidence: float
) -> None:
    population = 1_000
    most = most_unseen(n, population=population, confidence=confidence)
    assert stats.hypergeom.cdf(0, population, most, n) >= 1 - confidence
    if most < population - n:
        assert stats.hypergeom.cdf(0, population, most + 1, n) < 1 - confidence

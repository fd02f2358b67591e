"""Every metric, derived from raw predictions and raw timings, in this one place.

Enters: arrays of labels and predictions, lists of nanoseconds. Leaves: fractions, intervals,
percentiles, verdicts. Definitions: paper section 3 ("Attacks & Metrics") and DESIGN section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

from harness.records import LatencyProcess, Verdict

Classes = npt.NDArray[np.int64]
UNSEEN = -1
"""In place of a class, where an image was not evaluated."""

PERCENTILE_MIN_N = {50: 11, 90: 64, 95: 130, 99: 662, 99.9: 6636}
"""Samples below which no 99 % confidence bound exists for the percentile (FACTS G)."""
MIN_POWER_READINGS = 5
"""While the model runs, about one a second; a mean of fewer is the luck of the moment."""
MIN_PROCESSES = 3
MAX_SPREAD = 0.05
MAX_FREQUENCY_DRIFT = 0.02
MAX_LOAD_PER_CORE = 1.0


@dataclass(frozen=True)
class Rate:
    """`successes` of `n`, with its Wilson 95 % interval; `value` is None when n is 0."""

    successes: int
    n: int

    @property
    def value(self) -> float | None:
        return self.successes / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        return wilson(self.successes, self.n) if self.n else (None, None)


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927).

    Raises:
        ValueError: n is not positive, or successes is outside [0, n].
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the bound is exactly 0 and 1; rounding must not move it past them.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def fraction(value: object) -> float | None:
    """A share in [0, 1] that somebody wrote down; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= 1 else None


def accuracy(labels: Classes, clean: Classes) -> Rate:
    """Share of images predicted as their label, without a perturbation."""
    return Rate(int(np.count_nonzero(clean == labels)), labels.size)


def uer(labels: Classes, attacked: Classes) -> Rate:
    """Universal evasion rate: share of ALL images misclassified under the UAP (paper, eq. 1)."""
    return Rate(int(np.count_nonzero(attacked != labels)), labels.size)


def evasion_on_correct(labels: Classes, clean: Classes, attacked: Classes) -> Rate:
    """UER over the images that the model classified correctly before the perturbation."""
    correct = clean == labels
    return Rate(int(np.count_nonzero((attacked != labels) & correct)), int(correct.sum()))


def fooling_rate(clean: Classes, attacked: Classes) -> Rate:
    """Share of images whose prediction the perturbation changed, right or wrong."""
    return Rate(int(np.count_nonzero(clean != attacked)), clean.size)


def tsr(attacked: Classes, target: int) -> Rate:
    """Targeted success rate: share of ALL images predicted as the target (paper, eq. 2)."""
    return Rate(int(np.count_nonzero(attacked == target)), attacked.size)


def tsr_excluding_target(labels: Classes, attacked: Classes, target: int) -> Rate:
    """TSR over the images that are not of the target class: a model right on them earns 0."""
    others = labels != target
    return Rate(int(np.count_nonzero((attacked == target) & others)), int(others.sum()))


def agreement(first: Classes, second: Classes) -> Rate:
    """Share of images on which two runs predict the same class."""
    return Rate(int(np.count_nonzero(first == second)), first.size)


def mcnemar(first_wrong: npt.NDArray[np.bool_], second_wrong: npt.NDArray[np.bool_]) -> float:
    """Exact two-sided McNemar p-value for two error vectors on the same images."""
    only_first = int(np.count_nonzero(first_wrong & ~second_wrong))
    only_second = int(np.count_nonzero(~first_wrong & second_wrong))
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return float(stats.binomtest(only_first, discordant, 0.5).pvalue)


# --- a sample beside the whole set ---------------------------------------------------------------


@dataclass(frozen=True)
class Corrected:
    """An estimate for a whole evaluation set from a sample of it, with its 95 % interval."""

    value: float
    low: float
    high: float


def corrected_rate(
    torch_hits: npt.NDArray[np.bool_],
    device_hits: npt.NDArray[np.bool_],
    indices: npt.NDArray[np.int64],
) -> Corrected:
    """The device's rate (UER, TSR) on the whole set, from PyTorch's and the device's of a sample.

    PyTorch's rate plus the mean of (device's hit - PyTorch's hit) over the sample: both mostly hit
    the same images, so that this is far more precise than the sample's rate (FACTS H).

    Args:
        torch_hits: bool [N], of the whole set.
        device_hits: bool [n], of the sample.
        indices: int64 [n], positions of the sample in the set, drawn at random.
    """
    there = torch_hits[indices]
    gained = int(np.count_nonzero(device_hits & ~there))
    lost = int(np.count_nonzero(~device_hits & there))
    low, high = paired_difference(gained, lost, indices.size, population=torch_hits.size)
    base = float(np.mean(torch_hits))
    return Corrected(
        value=min(1.0, max(0.0, base + (gained - lost) / indices.size)),
        low=min(1.0, max(0.0, base + low)),
        high=min(1.0, max(0.0, base + high)),
    )


def paired_difference(
    gained: int, lost: int, n: int, *, population: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of a population's mean paired difference (gained - lost) / N from a sample of n.

    Tango's score interval (1998), which holds also for few disagreements, with its z shrunk by
    the finite-population factor sqrt((N - n) / (N - 1)), and half a count of continuity. Where
    the sample has no disagreement the bound is exact instead: as many disagreements among the N as
    a sample without any leaves possible (hypergeometric; 3 / n for a large set), all one way. Of
    the whole set it is a point.

    Raises:
        ValueError: counts that do not fit each other.
    """
    if not 0 < n <= population or min(gained, lost) < 0 or gained + lost > n:
        raise ValueError(f"no sample: +{gained} -{lost} of {n}, of {population}")
    estimate = (gained - lost) / n
    if n == population:
        return estimate, estimate
    if gained + lost == 0:
        most = most_unseen(n, population=population, confidence=confidence) / population
        return -most, most
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    z *= math.sqrt((population - n) / (population - 1))
    low = _tango_limit(gained, lost, n, z=z)
    return low, -_tango_limit(lost, gained, n, z=z)


@cache  # some thirty slow sums each, asked for the same few samples by every test of a report
def most_unseen(n: int, *, population: int, confidence: float = 0.95) -> int:
    """The most of a population that may differ though none of a sample of n does (exact)."""
    low, high = 0, population - n  # the sample itself shows what its n do
    while low < high:
        middle = (low + high + 1) // 2
        found = stats.hypergeom.cdf(0, population, middle, n)
        if found >= 1 - confidence:
            low = middle
        else:
            high = middle - 1
    # None would be a claim about images nobody looked at.
    return max(low, 1)


def _tango_limit(gained: int, lost: int, n: int, *, z: float) -> float:
    """The lower limit: the smallest difference the score test does not reject."""

    def score(difference: float) -> float:
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        p_lost = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * p_lost + difference * (1 - difference))
        excess = gained - lost - n * difference - 0.5  # counts are whole: continuity
        return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess)

    # The score falls from above z towards 0 at the estimate.
    low, high = -1.0, (gained - lost) / n
    for _ in range(60):
        middle = (low + high) / 2
        if score(middle) > z:
            low = middle
        else:
            high = middle
    return low


# --- latency -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """What is reported of a latency run. Milliseconds; a percentile without enough n is None."""

    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    n: int
    spread: float | None
    """(max - min) / median of the processes' medians."""
    verdict: Verdict
    reasons: tuple[str, ...]
    load_ms: float
    first_ms: float
    rss_peak_bytes: int | None
    medians_ms: tuple[float, ...]
    """Of each process: what latencies are compared by."""
    energy_mj: float | None
    """Of one inference, whatever else the board did meanwhile included; None without a sensor."""


def summarise_latency(processes: Sequence[LatencyProcess], *, cores: int) -> Latency:
    """Percentiles over all samples of all processes, and whether they can be believed.

    Raises:
        ValueError: no process, or a process without samples.
    """
    if not processes or any(not process.samples_ns for process in processes):
        raise ValueError("a latency run needs at least one process, each with samples")
    samples_ms = np.concatenate([np.asarray(p.samples_ns, dtype=np.float64) for p in processes])
    samples_ms /= 1e6
    medians = np.array([np.median(p.samples_ns) for p in processes])
    spread = float((medians.max() - medians.min()) / np.median(medians))
    rss = [p.rss_peak_bytes for p in processes if p.rss_peak_bytes is not None]
    verdict, reasons = _latency_verdict(processes, spread=spread, cores=cores)
    return Latency(
        p50_ms=_percentile(samples_ms, 50),
        p90_ms=_percentile(samples_ms, 90),
        p99_ms=_percentile(samples_ms, 99),
        n=samples_ms.size,
        spread=spread,
        verdict=verdict,
        reasons=reasons,
        load_ms=float(np.median([p.load_ns for p in processes])) / 1e6,
        first_ms=float(np.median([p.first_ns for p in processes])) / 1e6,
        rss_peak_bytes=max(rss) if rss else None,
        medians_ms=tuple(float(median) / 1e6 for median in medians),
        energy_mj=_energy_mj(processes),
    )


def latency_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """p-value of two latencies being the same, from the medians of their processes.

    Welch's t-test on logarithms: processes are the repetitions, not their samples, which share a
    process's luck. 1 with fewer than three processes of either.
    """
    if min(len(first), len(second)) < MIN_PROCESSES:
        return 1.0
    one, other = np.log(first), np.log(second)
    if one.std() == other.std() == 0.0:
        return 1.0 if one[0] == other[0] else 0.0
    return float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def _energy_mj(processes: Sequence[LatencyProcess]) -> float | None:
    """Median over processes of the sensor's energy per run, in millijoules."""
    found = [_energy_of(process) for process in processes]
    known = [value for value in found if value is not None]
    return float(np.median(known)) if known and len(known) == len(found) else None


def _energy_of(process: LatencyProcess) -> float | None:
    """A counter's difference, or mean power times the time it was read over, per run.

    The first and last reading of power are of a board about to start and done; a quick run has
    no others, and no energy.
    """
    runs, readings = len(process.samples_ns), process.telemetry
    counted = [r["energy_uj"] for r in readings if r.get("energy_uj") is not None]
    if len(counted) > 1 and counted[-1] > counted[0]:  # a counter that wrapped says nothing
        return float(counted[-1] - counted[0]) / runs / 1e3
    power_uw = [r["power_uw"] for r in readings[1:-1] if r.get("power_uw") is not None]
    if len(power_uw) >= MIN_POWER_READINGS:
        elapsed_ns = float(readings[-1]["elapsed_ns"] - readings[0]["elapsed_ns"])
        return float(np.mean(power_uw)) * elapsed_ns / runs / 1e12
    return None


def _percentile(samples_ms: npt.NDArray[np.float64], q: float) -> float | None:
    if samples_ms.size < PERCENTILE_MIN_N[q]:
        return None
    return float(np.percentile(samples_ms, q))


def _latency_verdict(
    processes: Sequence[LatencyProcess], *, spread: float, cores: int
) -> tuple[Verdict, tuple[str, ...]]:
    unstable: list[str] = []
    invalid: list[str] = []
    if spread > MAX_SPREAD:
        unstable.append(f"medians of processes spread {spread:.0%} (limit {MAX_SPREAD:.0%})")
    readings = [reading for process in processes for reading in process.telemetry]
    frequencies = [r["frequency_mhz"] for r in readings if r.get("frequency_mhz")]
    if frequencies:
        drift = (max(frequencies) - min(frequencies)) / max(frequencies)
        if drift > MAX_FREQUENCY_DRIFT:
            unstable.append(f"CPU frequency drifted {drift:.0%} (limit {MAX_FREQUENCY_DRIFT:.0%})")
    loads = [r["load_1m"] for r in readings if r.get("load_1m") is not None]
    if loads and max(loads) > MAX_LOAD_PER_CORE * cores:
        unstable.append(f"load {max(loads):.1f} on {cores} cores")
    if len({r["boot_id"] for r in readings if r.get("boot_id")}) > 1:
        invalid.append("the device was rebooted while it was measured")
    if any(r.get("throttled") for r in readings):
        invalid.append("the board throttled its clock")
    if invalid:
        return "INVALID", tuple(invalid + unstable)
    return ("UNSTABLE", tuple(unstable)) if unstable else ("VALID", ())

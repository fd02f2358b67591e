"""Every metric, derived from raw predictions and raw timings, in this one place.

Enters: arrays of labels and predictions, lists of nanoseconds. Leaves: fractions, intervals,
percentiles, verdicts. Definitions: paper section 3 ("Attacks & Metrics") and DESIGN section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from harness.records import LatencyProcess, Verdict

Classes = npt.NDArray[np.int64]

PERCENTILE_MIN_N = {50: 11, 90: 64, 95: 130, 99: 662, 99.9: 6636}
"""Samples below which no 99 % confidence bound exists for the percentile (FACTS G)."""
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
    )


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
    if any(r.get("throttled") for r in readings):
        invalid.append("the board throttled its clock")
    if invalid:
        return "INVALID", tuple(invalid + unstable)
    return ("UNSTABLE", tuple(unstable)) if unstable else ("VALID", ())

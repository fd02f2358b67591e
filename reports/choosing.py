"""Fronts and mixes: which variants no other beats, and what a fleet of several would gain.

Enters: costs, a `View`. Leaves: point estimates, and for the mix whether its gain is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from harness.bootstrap import difference
from harness.metrics import UNSEEN
from reports.inference import ALPHA, inaccurate, rate_of
from reports.view import VariantView, View


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points no other point beats in both coordinates (less is better), by cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if not front or costs[i][1] < costs[front[-1]][1]:
            front.append(i)
    return front


@dataclass(frozen=True)
class FleetMix:
    """Shares of variants that minimise the worst UER of a single perturbation over the fleet."""

    shares: tuple[tuple[str, float], ...]
    worst: float
    best_single: str
    best_single_worst: float
    shown: bool
    """Whether a mix chosen on half of the images is shown to do better on the other half."""


def _matrix(view: View) -> tuple[list[str], list[VariantView]]:
    """(every source, the models that met all of them)."""
    sources = sorted({s for v in view.variants for s in v.attacked})
    return sources, [v for v in view.variants if all(s in v.attacked for s in sources)]


def incomplete(view: View) -> bool:
    """Whether a model that something was crafted on did not meet everything, or few did."""
    sources, victims = _matrix(view)
    lacking = {v.name for v in view.variants} - {v.name for v in victims}
    return len(victims) < 2 or len(sources) < 2 or bool(lacking.intersection(sources))


def fleet_mix(view: View) -> FleetMix | None:
    """The minimax mix over the complete transfer matrix, of models that keep the clean accuracy.

    None where it is incomplete, or fewer than two do.

    A model that nothing was crafted on takes part only if it faced every perturbation.

    Minimise t subject to sum_v w_v UER[v, s] <= t for every perturbation s, sum_v w_v = 1.
    """
    sources, victims = _matrix(view)
    poor = {test.variant.name for test in inaccurate(view)}
    victims = [v for v in victims if v.name not in poor]
    if incomplete(view) or len(victims) < 2:
        return None
    uer = np.array([[rate_of(v.attacked[s]) for s in sources] for v in victims])  # [V, S]
    mix = _minimax(uer)
    if mix is None:
        return None
    worsts = uer.max(axis=1)
    best = int(np.argmin(worsts))
    shares = [(v.name, float(w)) for v, w in zip(victims, mix, strict=True) if w >= 0.005]
    return FleetMix(
        shares=tuple(sorted(shares, key=lambda share: -share[1])),
        worst=float((mix @ uer).max()),
        best_single=victims[best].name,
        best_single_worst=float(worsts[best]),
        shown=_shown(view, victims, sources),
    )


Shares = npt.NDArray[np.float64]


def _minimax(uer: Shares) -> Shares | None:
    """Weights [V] that minimise the largest entry of w @ uer, uer [V, S]."""
    n, m = uer.shape
    solved = linprog(
        c=[0.0] * n + [1.0],
        A_ub=np.hstack([uer.T, -np.ones((m, 1))]),
        b_ub=np.zeros(m),
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
        method="highs",
    )
    return None if not solved.success or solved.x is None else np.asarray(solved.x[:n])


def _shown(view: View, victims: list[VariantView], sources: list[str]) -> bool:
    """A mix and a single variant chosen on every other image, compared on the rest.

    On the images it was chosen on, a mix of equal variants seems to gain by averaging their noise.
    Each side's worst perturbation is the one that is worst on the images it was chosen on.
    """
    labels = np.asarray(view.evaluation.labels, dtype=np.int64)
    runs = [[view.predictions(v.attacked[s]) for s in sources] for v in victims]
    if any(run is None for row in runs for run in row):
        return False
    stacked = np.stack([np.stack([r for r in row if r is not None]) for row in runs])  # [V, S, N]
    seen = np.flatnonzero((stacked != UNSEEN).all(axis=(0, 1)))
    wrong = stacked[:, :, seen] != labels[seen]
    chosen, held_out = wrong[:, :, ::2], wrong[:, :, 1::2]
    if not held_out.size:
        return False
    uer = chosen.mean(axis=2)
    mix = _minimax(uer)
    if mix is None:
        return False
    single = int(np.argmin(uer.max(axis=1)))
    against_mix, against_single = int(np.argmax(mix @ uer)), int(np.argmax(uer[single]))
    mixed = np.tensordot(mix, held_out[:, against_mix], axes=1)
    found = difference(
        mixed[None], held_out[single, against_single].astype(np.float64)[None], same_seeds=True
    )
    return found.value < 0 and found.p < ALPHA

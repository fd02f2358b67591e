"""Results of several crafting seeds, as one: mean and interval over seeds and images together.

Enters: result rows and what the store holds behind them. Leaves: groups of rows that differ in
nothing but the crafting seed, and the estimate over each. Where there is one seed there is no
group: its interval covers the choice of images only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.bootstrap import DRAWS, Estimate, mean_over_seeds
from harness.metrics import UNSEEN, Classes
from harness.records import ResultRow, UapRecord

METHOD = (
    f"hierarchical bootstrap: crafting seeds and images are drawn together with replacement"
    f" (B = {DRAWS:,}), widened to Student's t for few seeds"
)
RowKey = tuple[str, str | None, str, bool, str]
"""(model sha256, UAP sha256, device, emulated, runtime)."""


@dataclass(frozen=True)
class SeedGroup:
    """Rows of one victim under perturbations that differ in their crafting seed only."""

    rows: tuple[ResultRow, ...]
    """By seed; at least two."""
    uer: Estimate
    tsr: Estimate | None


def key_of(row: ResultRow) -> RowKey:
    """What tells rows of one evaluation set apart."""
    return row.model_sha256, row.uap_sha256, row.device, row.emulated, row.runtime


def seed_groups(
    rows: Sequence[ResultRow],
    *,
    uaps: Mapping[str, UapRecord],
    predicted: Mapping[RowKey, Classes],
    labels: Classes,
) -> list[SeedGroup]:
    """Every group of at least two seeds among rows of one evaluation set.

    Args:
        rows: of one evaluation set.
        uaps: by sha256.
        predicted: predictions behind rows, int64 [N], `UNSEEN` outside a sample.
        labels: int64 [N].
    """
    found: dict[tuple[object, ...], dict[int, ResultRow]] = {}
    for row in rows:
        uap = uaps.get(row.uap_sha256 or "")
        if uap is None or row.seed is None or key_of(row) not in predicted:
            continue
        # A source of the same name that was trained anew is another source.
        crafted_on = uap.meta.get("checkpoint_sha256") if uap.own else None
        # So is one of another attack, however it is called.
        facts = [uap.meta.get(key) for key in ("settings", "images", "steps")]
        how = json.dumps(facts, sort_keys=True, default=str)
        same = (row.model_sha256, row.device, row.emulated, row.runtime, row.uap_source, row.eps,
                row.target, row.attack, row.protocol, crafted_on, uap.own, how)  # fmt: skip
        found.setdefault(same, {})[row.seed] = row  # later rows are newer
    groups = []
    for by_seed in found.values():
        # A seed that met a small sample must not shrink the others to it.
        seen_by = {s: np.count_nonzero(predicted[key_of(r)] != UNSEEN) for s, r in by_seed.items()}
        most = max(seen_by.values())
        ordered = tuple(by_seed[seed] for seed in sorted(by_seed) if seen_by[seed] == most)
        stacked = np.stack([predicted[key_of(row)] for row in ordered])  # [S, N]
        seen = (stacked != UNSEEN).all(axis=0)
        if len(ordered) < 2 or not seen.any():
            continue
        target = ordered[0].target
        groups.append(
            SeedGroup(
                rows=ordered,
                uer=mean_over_seeds(stacked[:, seen] != labels[seen]),
                tsr=None if target is None else mean_over_seeds(stacked[:, seen] == target),
            )
        )
    return groups

"""The view model: what the report is about, as frozen numbers; no words, no markup.

`reports.selection` builds it from a store. Enters and leaves: records of `harness.records`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.metrics import UNSEEN, Classes, Latency
from harness.records import (
    CONTROLS,
    DEPLOYABLE,
    EvaluationSet,
    Machine,
    ModelRecord,
    ResultRow,
    UapRecord,
)
from harness.seeds import SeedGroup, key_of
from harness.sources import FLEET
from reports.words import label_of

GRADIENT_FREE = ("fourier", "spsa")
"""Attacks that use no gradients; `spsa` is in stores of before there was `fourier`."""
Craft = tuple[str, str, int]
"""(protocol, attack, seed) of a crafted perturbation."""
RunKey = tuple[str, str | None, str, bool, str]
"""(model, uap, device, emulated, runtime) on the headline evaluation set."""
SeedKey = RunKey


@dataclass(frozen=True, order=True)
class DeviceId:
    """Where rows were measured: an emulated board is another place than the board."""

    name: str
    emulated: bool

    @property
    def label(self) -> str:
        return label_of(self.name) + (" (emulated)" if self.emulated else "")


@dataclass(frozen=True)
class VariantView:
    """Everything measured of one variant on the headline device, deployed runtime."""

    name: str
    model: ModelRecord
    clean: ResultRow | None
    curve: tuple[ResultRow, ...]
    """White-box untargeted rows, by eps."""
    controls: dict[str, tuple[ResultRow, ...]]
    """Control -> its rows by eps."""
    attacked: dict[str, ResultRow]
    """Source -> the untargeted row at the reference eps; controls and the variant itself too, but
    not the fleet without this variant, which no other faces."""
    by_eps: dict[float, dict[str, ResultRow]]
    """The same at every eps that was measured."""
    left_out: dict[float, ResultRow]
    """The row by eps under the perturbation of the fleet without this variant."""
    targeted: dict[int, ResultRow]
    """Target class -> white-box targeted row."""
    any_row: ResultRow
    """Cost and latency are the same on each of its rows: this is one of them."""
    timing: tuple[str, Latency] | None
    lowest_agreement: float | None
    """Lowest agreement with PyTorch over clean and attacked images."""
    searches: tuple[ResultRow, ...] = ()
    """Under perturbations crafted on itself without gradients, by eps."""
    reference_eps: float | None = None
    met_by_all: frozenset[str] | None = None
    """Sources that every model faced, where the worst case is over those and its own; None: over
    all that it faced."""

    @property
    def label(self) -> str:
        return label_of(self.name)

    @property
    def method(self) -> str:
        return self.model.method

    @property
    def white_box(self) -> ResultRow | None:
        return self.attacked.get(self.name)

    @property
    def gradient_free(self) -> ResultRow | None:
        """Under a perturbation crafted on itself without gradients, at the reference eps."""
        return next((row for row in self.searches if row.eps == self.reference_eps), None)

    @property
    def transfers(self) -> list[ResultRow]:
        """Rows under perturbations crafted on other variants."""
        return self.transfers_at(self.attacked)

    def transfers_at(self, attacked: dict[str, ResultRow]) -> list[ResultRow]:
        """Of these rows, by source, those of single other variants."""
        apart = (self.name, FLEET, *CONTROLS)
        return [row for source, row in attacked.items() if source not in apart]

    @property
    def worst_transfer(self) -> ResultRow | None:
        return max(self.transfers, key=_uer, default=None)

    @property
    def worst(self) -> ResultRow | None:
        """The row of the perturbation, of whatever source, under which it errs most, untargeted."""
        budgets = {row.eps for row in self.attacked.values()}
        apart = [row for eps, row in self.left_out.items() if eps in budgets]
        apart += [] if self.gradient_free is None else [self.gradient_free]
        return max([*self.faced.values(), *apart], key=_uer, default=None)

    @property
    def faced(self) -> dict[str, ResultRow]:
        """What its worst case is over, by source, besides what was made for it alone."""
        met = self.met_by_all
        return {
            source: row
            for source, row in self.attacked.items()
            if met is None or source in met or source == self.name
        }

    @property
    def mean_tsr(self) -> float | None:
        rates = [row.tsr for row in self.targeted.values() if row.tsr is not None]
        return sum(rates) / len(rates) if rates else None


@dataclass(frozen=True)
class Together:
    """Two runs on the images that both saw: int64 [n] each."""

    labels: Classes
    first: Classes
    second: Classes


@dataclass(frozen=True)
class View:
    """What the report is about."""

    device: DeviceId
    devices: tuple[DeviceId, ...]
    """Every device with deployed rows on the headline evaluation set; the headline's own first."""
    evaluation: EvaluationSet
    variants: tuple[VariantView, ...]
    by_device: dict[DeviceId, tuple[VariantView, ...]]
    reference_eps: float | None
    targeted_eps: float | None
    craft: Craft | None
    rows: tuple[ResultRow, ...]
    """Every row of the store, as exported beside the page."""
    uaps: dict[str, UapRecord]
    answers: dict[RunKey, Classes]
    """int64 [N] of every run: what was answered where; `UNSEEN` outside a sample."""
    judged: dict[RunKey, Classes]
    """What tests are made of: see `reports.agreed`."""
    machines: tuple[tuple[DeviceId, str, Machine], ...]
    seeds: dict[SeedKey, SeedGroup]
    """Rows that are means over several crafting seeds -> what they are means of."""
    notes: tuple[str, ...]
    baseline_name: str = "full"
    """The model that the others are compared with, measured here or not."""
    memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """Tests already made: the page says the same thing in several places."""

    @property
    def baseline(self) -> VariantView | None:
        return next((v for v in self.variants if v.name == self.baseline_name), None)

    @property
    def baseline_label(self) -> str:
        return label_of(self.baseline_name)

    @property
    def compared_with(self) -> str:
        """The baseline in a sentence: of a model that the user brought only its name is known."""
        full = self.baseline_name == "full"
        return "the uncompressed Full model" if full else self.baseline_label

    @property
    def other(self) -> str:
        """What one that is compared with the baseline is called."""
        return "compressed variant" if self.baseline_name == "full" else "other model"

    def comparable(self, variant: VariantView) -> bool:
        """Whether its worst case stands beside the others'.

        It does when it faced the same perturbations as the baseline, or as many, its own among
        them: a worst case over fewer attacks looks better for no merit of the model.
        """
        base = self.baseline
        if base is None or not base.attacked:
            base = max(self.variants, key=lambda v: len(v.faced))
        if (variant.gradient_free is None) != (base.gradient_free is None):
            return False
        if variant.faced.keys() == base.faced.keys():
            return bool(variant.faced)
        own = variant.white_box is not None and base.white_box is not None
        of_the_experiment = any(v.name in DEPLOYABLE for v in self.variants)
        if variant.met_by_all is not None and not of_the_experiment:
            return own
        return own and len(variant.faced) == len(base.faced)

    @property
    def transfer_budgets(self) -> list[float]:
        """Every eps at which a variant faced more than its own: the reference first, then up."""
        found = {
            eps
            for v in self.variants
            for eps, attacked in v.by_eps.items()
            if v.transfers_at(attacked) or FLEET in attacked or eps in v.left_out
        }
        if self.reference_eps is not None:
            found.add(self.reference_eps)
        return sorted(found, key=lambda eps: (eps != self.reference_eps, eps))

    @property
    def set_apart(self) -> list[VariantView]:
        """Attacked variants whose worst case does not compare."""
        return [v for v in self.variants if v.attacked and not self.comparable(v)]

    def predictions(self, row: ResultRow) -> npt.NDArray[np.int64] | None:
        """What the row is judged by, answers of its own runtime or, where those agree, PyTorch's.

        int64 [N], in the order of the evaluation set; `UNSEEN` for images outside a sample.
        """
        return self.judged.get(run_of(row))

    def repeats(self, row: ResultRow) -> tuple[ResultRow, ...]:
        """The rows of every crafting seed behind a row; itself where there is one seed."""
        group = self.seeds.get(key_of(row))
        return (row,) if group is None else group.rows

    def together(self, first: ResultRow, second: ResultRow) -> Together | None:
        """What two rows are judged by on the images of both; None where there are none."""
        return self._both(self.judged.get(run_of(first)), self.judged.get(run_of(second)))

    def answered(
        self, first: ResultRow, second: ResultRow, *, torch: bool = False
    ) -> Together | None:
        """What was answered where the rows were measured, on the images that both saw.

        With `torch` the second are PyTorch's.
        """
        key = by_torch(run_of(second)) if torch else run_of(second)
        return self._both(self.answers.get(run_of(first)), self.answers.get(key))

    def _both(self, ours: Classes | None, theirs: Classes | None) -> Together | None:
        if ours is None or theirs is None:
            return None
        both = (ours != UNSEEN) & (theirs != UNSEEN)
        if not both.any():
            return None
        labels = np.asarray(self.evaluation.labels, dtype=np.int64)
        return Together(labels[both], ours[both], theirs[both])


def run_of(row: ResultRow) -> RunKey:
    """The key of the run behind a row."""
    return (row.model_sha256, row.uap_sha256, row.device, row.emulated, row.runtime)


def by_torch(key: RunKey) -> RunKey:
    """The run of PyTorch that a run is compared with."""
    return (key[0], key[1], "local", False, "torch")


def _uer(row: ResultRow) -> float:
    return row.uer if row.uer is not None else -1.0

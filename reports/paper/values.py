"""The paper's published numbers, read from `values.json`, which says where they are from.

Enters: the file beside this module. Leaves: frozen records, keyed by this project's variant names;
rates are fractions of the official test images. Facts only: what follows from them is elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("values.json")

ByVariant = Mapping[str, float]


@dataclass(frozen=True)
class Setup:
    """What the numbers are of, in the words of a results store."""

    arch: str
    width: int
    preset: str
    protocol: str
    attack: str


@dataclass(frozen=True)
class Published:
    """One data set's numbers."""

    key: str
    """`cifar10` or `svhn`."""
    title: str
    train_images: int
    test_images: int
    training: str
    """What the paper says of the schedule on this data set."""
    clean_accuracy: ByVariant
    """Table 1."""
    white_box_uer: Mapping[float, ByVariant]
    """Figure 1: eps -> variant."""
    transfer_uer: Mapping[float, Mapping[str, ByVariant]]
    """Figure 2 at every eps: eps -> victim -> source. The diagonal is of other runs than Figure 1
    on CIFAR-10."""
    tsr: Mapping[float, Mapping[str, tuple[float, ...]]]
    """Figures 3 and 4: eps -> variant -> rate by target class."""
    controls: Mapping[str, Mapping[float, ByVariant]]
    """Control -> eps -> variant: UER under a pattern made without looking at any model."""
    caveats: tuple[str, ...]
    """What is known to be wrong with, or particular to, these numbers."""


@dataclass(frozen=True)
class Paper:
    """Everything that was published, and where."""

    title: str
    source: str
    setup: Setup
    datasets: Mapping[str, Published]


@cache
def paper() -> Paper:
    """The file, read once."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    order = tuple(content["variants"])
    return Paper(
        title=content["paper"],
        source=content["source"],
        setup=Setup(**content["setup"]),
        datasets={
            key: _published(key, values, order, content["caveats"])
            for key, values in content["datasets"].items()
        },
    )


def _published(
    key: str, values: dict[str, Any], order: tuple[str, ...], caveats: list[dict[str, Any]]
) -> Published:
    def by_variant(row: list[float]) -> ByVariant:
        return dict(zip(order, row, strict=True))

    return Published(
        key=key,
        title=values["title"],
        train_images=values["train_images"],
        test_images=values["test_images"],
        training=values["training"],
        clean_accuracy=by_variant(values["clean_accuracy"]),
        white_box_uer={float(e): by_variant(row) for e, row in values["white_box_uer"].items()},
        transfer_uer={
            float(e): {victim: by_variant(row) for victim, row in matrix.items()}
            for e, matrix in values["transfer_uer"].items()
        },
        tsr={
            float(e): {variant: tuple(row) for variant, row in rates.items()}
            for e, rates in values["tsr"].items()
        },
        controls={
            control: {float(e): by_variant(row) for e, row in rates.items()}
            for control, rates in values["controls"].items()
        },
        caveats=tuple(c["text"] for c in caveats if c["dataset"] in (None, key)),
    )

"""What an audit compares: meetings of models and perturbations, gathered in units, and contrasts.

Enters: names of arms and variants. Leaves: a `Question`'s parts, frozen. What was trained once
counts once: meetings that share it are one unit, averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.audit.arms import BASE, in_seed

THEIRS, STRONGEST = "sgd", "momentum"
"""Attacks: the authors', and the strongest there is (docs/adr/0007)."""
SOURCES = ("full", "sfp", "pp3", "q4")
"""The whole model, and one variant of every method."""
COMPRESSED = SOURCES[1:]


@dataclass(frozen=True)
class Meeting:
    """A model under a perturbation, each of some arm; `source` None: under none."""

    victim_arm: str
    victim: str
    source_arm: str = BASE
    source: str | None = None
    attack: str = ""
    """What crafts the perturbation; empty: what its arm is configured for."""


Unit = tuple[Meeting, ...]
"""Meetings that share what was trained once: averaged, they count as one."""


@dataclass(frozen=True)
class Means:
    """What follows from a contrast, by what it shows: a sentence each."""

    lowers: str
    raises: str
    none: str
    """Where it shows that there is no difference that matters."""


@dataclass(frozen=True)
class Contrast:
    """Error rate of `changed` minus that of `reference`."""

    label: str
    changed: tuple[Unit, ...]
    reference: tuple[Unit, ...]
    """Unit i of both belongs together."""
    crossed: tuple[bool, bool] = (False, False)
    """Whether the units of `changed`, and of `reference`, are of `across`: unit i is victim i under
    every other seed's source, in order, so that each source is in all units but its own."""
    means: Means | None = None
    """What the write-up concludes from it; None where it only stands in the table."""

    @property
    def meetings(self) -> tuple[Meeting, ...]:
        return tuple(m for unit in (*self.changed, *self.reference) for m in unit)

    @property
    def is_clean(self) -> bool:
        """Whether it compares errors on clean images, which are of no budget."""
        return all(meeting.source is None for meeting in self.meetings)


@dataclass(frozen=True)
class Question:
    """One choice, and what it might carry."""

    name: str
    title: str
    authors: str
    """What they did, or concluded."""
    contrasts: tuple[Contrast, ...]

    @property
    def meetings(self) -> tuple[Meeting, ...]:
        """All that must be measured for it, without repeats."""
        return tuple(dict.fromkeys(m for contrast in self.contrasts for m in contrast.meetings))


def each(meetings: Iterable[Meeting]) -> tuple[Unit, ...]:
    return tuple((meeting,) for meeting in meetings)


def own(arm: str, variant: str, attack: str = "") -> Meeting:
    """White-box."""
    return Meeting(arm, variant, arm, variant, attack)


def arms_of(seeds: int, arm: str = BASE) -> list[str]:
    """An arm, and its repetitions with further seeds."""
    return [in_seed(arm, offset) for offset in range(seeds)]


def within(seeds: int, victim: str, source: str, attack: str = "") -> tuple[Unit, ...]:
    """Victim and source of one seed: where one is made from the other, they share weights."""
    return each(Meeting(seed, victim, seed, source, attack) for seed in arms_of(seeds))


def across(seeds: int, victim: str, source: str) -> tuple[Unit, ...]:
    """Victims under the perturbations of the other seeds' sources: nothing is shared."""
    arms = arms_of(seeds)
    return tuple(
        tuple(Meeting(seed, victim, other, source) for other in arms if other != seed)
        for seed in arms
    )

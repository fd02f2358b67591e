"""Where the names of points go in a picture, so that each is read as its own point's.

Enters: points, the sizes of their labels and the frame, in one unit (printer's points). Leaves: a
place for each label, and whether a line has to lead to it. Greedy, then each label again with the
others where they are, until none moves: the same points give the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARK = 6.0
"""Half the side of what a point's mark covers."""
RADII = (8.0, 12.0, 17.0, 24.0, 33.0, 44.0)
"""From a point to its label's edge."""
ANGLES = 16
LOWERED = 3.0
"""By how much a label may come nearer from above or below: letters do not fill its height."""
NEAR = 13.0
"""From here on a line leads from the point to its label."""
CLEARER = 1.5
"""By how much a label is nearer to its own point than to any other, or a line says whose it is."""
LEVEL_FIRST = (0, 8, 4, 12)
"""Directions that cost nothing: right, left, up, down; others cost a little, unequally."""
SWEEPS = 6

Spot = tuple[float, float]
Box = tuple[float, float, float, float]
"""(left, bottom, right, top)."""


@dataclass(frozen=True)
class Label:
    """A label's box, and whether a line has to lead to it."""

    box: Box
    led: bool

    @property
    def centre(self) -> Spot:
        left, bottom, right, top = self.box
        return (left + right) / 2, (bottom + top) / 2


def place_labels(
    spots: Sequence[Spot], sizes: Sequence[Spot], frame: Box, *, order: Sequence[int] | None = None
) -> list[Label]:
    """A place for each label, in the order of the points.

    Args:
        spots: the points.
        sizes: (width, height) of each label.
        frame: what labels should stay in.
        order: who chooses first; as given unless said.
    """
    order = range(len(spots)) if order is None else order
    placed: dict[int, Label] = {}
    for _ in range(SWEEPS):
        before = dict(placed)
        for i in order:
            placed.pop(i, None)
            placed[i] = _best(i, spots, sizes, frame, placed)
        if placed == before:
            break
    return [placed[i] for i in range(len(spots))]


def _best(
    i: int,
    spots: Sequence[Spot],
    sizes: Sequence[Spot],
    frame: Box,
    placed: dict[int, Label],
) -> Label:
    taken = [label.box for label in placed.values()]
    leaders = [(spots[j], label.centre) for j, label in placed.items() if label.led]
    marks = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in spots]
    best, lowest = Label(marks[i], led=False), math.inf
    for radius in RADII:
        for step in range(ANGLES):
            box = _box(spots[i], sizes[i], radius, 2 * math.pi * step / ANGLES)
            own = _distance(box, spots[i])
            nearest = min(
                (_distance(box, spot) for j, spot in enumerate(spots) if j != i), default=math.inf
            )
            led = own >= NEAR or nearest < own + CLEARER
            cost = own + _turn(step) + 1e4 * (1 - _overlap(box, frame))
            if cost >= lowest:
                continue
            cost += 400 * sum(_overlap(box, other) for other in (*taken, *marks))
            cost += 40 * sum(_crosses(box, *leader) for leader in leaders)
            if led:
                line = spots[i], Label(box, led).centre
                cost += 12 + 40 * sum(_crosses(other, *line) for other in taken)
                cost += 8 * sum(_crosses(m, *line) for j, m in enumerate(marks) if j != i)
            if cost < lowest:
                best, lowest = Label(box, led), cost
    return best


def _turn(step: int) -> float:
    """A preference between directions that are as good, so that no two are equal."""
    if step in LEVEL_FIRST:
        return 0.5 * LEVEL_FIRST.index(step)
    return 2.5 + 0.1 * step


def _box(spot: Spot, size: Spot, radius: float, angle: float) -> Box:
    """The label's box, beyond the point by this much across and up or down, in this direction."""
    x = spot[0] + math.cos(angle) * (radius + size[0] / 2)
    y = spot[1] + math.sin(angle) * (radius + size[1] / 2 - LOWERED)
    return (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)


def _distance(box: Box, spot: Spot) -> float:
    """From a point to the nearest of a box."""
    left, bottom, right, top = box
    across = max(left - spot[0], 0.0, spot[0] - right)
    return math.hypot(across, max(bottom - spot[1], 0.0, spot[1] - top))


def _crosses(box: Box, start: Spot, end: Spot) -> bool:
    """Whether a line goes through a box (Liang and Barsky 1984)."""
    first, last = 0.0, 1.0
    for axis in (0, 1):
        run = end[axis] - start[axis]
        low, high = box[axis] - start[axis], box[axis + 2] - start[axis]
        if run == 0:
            if low > 0 or high < 0:
                return False
            continue
        enter, leave = sorted((low / run, high / run))
        first, last = max(first, enter), min(last, leave)
    return first < last


def _overlap(a: Box, b: Box) -> float:
    """Share of `a` that lies in `b`."""
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    tall = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return wide * tall / ((a[2] - a[0]) * (a[3] - a[1]))

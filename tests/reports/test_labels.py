"""Names of points in a picture: inside, apart, and each read as its own point's."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from reports.labels import CLEARER, MARK, Label, place_labels

FRAME = (0.0, 0.0, 280.0, 190.0)
SIZE = (30.0, 10.5)


def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def far(label: Label, spot: tuple[float, float]) -> float:
    left, bottom, right, top = label.box
    across = max(left - spot[0], 0.0, spot[0] - right)
    return math.hypot(across, max(bottom - spot[1], 0.0, spot[1] - top))


points = st.lists(
    st.tuples(st.floats(8, 272, width=16), st.floats(8, 182, width=16)), min_size=1, max_size=11
)


@given(points)
@settings(deadline=None)
def test_labels_stay_inside_and_say_whose_they_are(spots):
    labels = place_labels(spots, [SIZE] * len(spots), FRAME)
    assert len(labels) == len(spots)
    for i, label in enumerate(labels):
        left, bottom, right, top = label.box
        assert min(left, bottom) >= -1e-6
        assert right <= FRAME[2] + 1e-6
        assert top <= FRAME[3] + 1e-6
        others = [far(label, spot) for j, spot in enumerate(spots) if j != i]
        if not label.led:
            assert min(others, default=math.inf) >= far(label, spots[i]) + CLEARER


@given(st.permutations([(x, y) for x in (30.0, 110.0, 190.0) for y in (40.0, 100.0, 160.0)]))
@settings(deadline=None)
def test_where_there_is_room_no_label_covers_another_or_a_mark(spots):
    labels = place_labels(spots, [SIZE] * len(spots), FRAME)
    marks = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in spots]
    for i, one in enumerate(labels):
        assert not one.led
        assert all(apart(one.box, other.box) for other in labels[i + 1 :])
        assert all(apart(one.box, mark) for mark in marks)


def test_the_crowd_that_width_64_makes_of_file_sizes_is_told_apart():
    """Six models within a few percent of each other's size and error rate."""
    spots = [(243.0, 96.0), (243.0, 121.0), (243.0, 86.0), (246.0, 108.0), (248.0, 96.0),
             (246.0, 90.0)]  # fmt: skip
    labels = place_labels(spots, [SIZE] * len(spots), FRAME)
    for i, one in enumerate(labels):
        for other in labels[i + 1 :]:
            assert apart(one.box, other.box)


def test_a_single_point_has_its_name_to_the_right():
    (label,) = place_labels([(100.0, 100.0)], [SIZE], FRAME)
    assert label.box[0] > 100.0
    assert label.centre[1] == 100.0
    assert not label.led


def test_at_the_right_edge_it_goes_to_the_left():
    (label,) = place_labels([(270.0, 100.0)], [SIZE], FRAME)
    assert label.box[2] < 270.0

"""Data files say the same on every machine: what sums leave in the last digits is not kept."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reports.portable import portable
from reports.words import tenths

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


def test_a_last_digit_that_two_processors_disagree_on_is_not_written() -> None:
    # The white-box slope of one published model, as two processors sum it.
    assert portable(0.6589751840310708) == portable(0.6589751840310707) == 0.658975184031


@given(st.floats(-1e6, 1e6))
def test_eleven_digits_are_kept(value: float) -> None:
    assert math.isclose(portable(value), value, rel_tol=1e-11, abs_tol=0.0)


@given(VALUES)
def test_nothing_else_is_changed_and_twice_is_once(value: object) -> None:
    once = portable(value)
    assert portable(once) == once
    plain = json.loads(json.dumps(value, allow_nan=True))

    def same(one: object, other: object) -> bool:
        if isinstance(one, float) and isinstance(other, float):
            return math.isclose(one, other, rel_tol=1e-11)
        if isinstance(one, dict) and isinstance(other, dict):
            return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
        if isinstance(one, list) and isinstance(other, list):
            return len(one) == len(other) and all(map(same, one, other))
        return type(one) is type(other) and one == other

    assert same(once, plain)


@given(st.integers(-2_000, 2_000), st.sampled_from([20, 600, 2_000, 10_000]))
def test_tenths_are_those_of_the_exact_fraction(k: int, n: int) -> None:
    """Half-way goes away from zero, as on paper, whatever the binary fraction is, and its noise."""
    exact = (Fraction(1_000 * abs(k), n) + Fraction(1, 2)).__floor__()
    sign = "-" if k < 0 and exact else ""
    for value in (k / n, k / n + 1e-15, k / n - 1e-15):
        assert tenths(value) == f"{sign}{exact // 10}.{exact % 10}"


def test_tenths_of_what_is_no_python_float() -> None:
    assert tenths(np.float64(0.8635)) == "86.4"
    assert (tenths(0), tenths(-0.0), tenths(1)) == ("0.0", "0.0", "100.0")

"""How the report writes numbers, names and colours: one spelling of each, in one place.

Enters: fractions, counts, bytes, names from the store. Leaves: short strings for people.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from harness.records import CONTROLS, DEPLOYABLE
from harness.sources import FLEET, LEAVE_ONE_OUT, source_label

NBSP = "\u00a0"
QUICK = "quick: not comparable"
DASH = "\u2013"
"""Printed where there is no number: absent is not zero."""

METHOD_COLOURS = {
    "full": "#3b3f46", "sfp": "#1f6fb4", "pp": "#1f8a5f", "apot": "#c85f0a", "int8": "#b0306a",
    "other": "#8a4f9e",
}  # fmt: skip
_METHOD_NAMES = {
    "full": "uncompressed",
    "sfp": "soft filter pruning",
    "pp": "post-training pruning",
    "apot": "additive powers-of-two quantisation",
    "int8": "onnxruntime\u2019s static int8 quantisation",
}
FULL_BLUE, VARIANT_ORANGE = "#2f6db3", "#e8892b"
"""The two colours of the paper's Figures 3 and 4."""


def method_colour(method: str) -> str:
    """The hue of a compression method; one for models the user brought."""
    return METHOD_COLOURS.get(method, METHOD_COLOURS["other"])


def method_css(method: str) -> str:
    """The same hue as the page's CSS variable, which follows its light or dark scheme."""
    return f"var(--{method if method in METHOD_COLOURS else 'other'})"


def method_name(method: str) -> str:
    return _METHOD_NAMES.get(method, method)


def clean_text(text: str, limit: int = 60) -> str:
    """One line of printable text of at most `limit` characters: names in the store are untrusted.

    Unpaired surrogates (JSON may hold them) become `?`, so that the result can be encoded.
    """
    flat = text.encode("utf-8", "replace").decode("utf-8")
    flat = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in flat).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "\u2026"


def label_of(name: str) -> str:
    """The paper's label of a variant or source, or the user's own name for it."""
    return clean_text(source_label(name), 28)


def paper_rank(name: str) -> tuple[int, str]:
    """Sorts the paper's variants in its order, the derived, the user's, the fleet, the controls."""
    brought = ""
    order = (*DEPLOYABLE, brought, FLEET, LEAVE_ONE_OUT, *sorted(CONTROLS))
    return order.index(name if name in order else brought), name


def tenths(fraction: float) -> str:
    """A finite fraction as a percentage with one decimal, half-way values away from zero.

    Rates of 2,000 or 10,000 images are half-way often. In binary, which side of it a sum ends on
    depends on the processor.
    """
    exact = Decimal(repr(round(100 * float(fraction), 9)))
    return str(exact.quantize(Decimal("0.1"), ROUND_HALF_UP) + 0)  # no minus before a zero


def percent(value: float | None, *, unit: bool = True) -> str:
    if value is None:
        return DASH
    return tenths(value) + (f"{NBSP}%" if unit else "")


def points(value: float | None) -> str:
    """A difference of two fractions, signed, in percentage points."""
    if value is None:
        return DASH
    text = tenths(abs(value))
    sign = "" if text == "0.0" else ("+" if value > 0 else "\u2212")
    return sign + text


def interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{tenths(low)}{DASH}{tenths(high)}"


def interval_of_points(low: float, high: float) -> str:
    """An interval of a difference of fractions, in signed percentage points."""
    return f"{points(low)} to {points(high)}"


def p_value(value: float) -> str:
    return f"p{NBSP}<{NBSP}0.001" if value < 0.001 else f"p{NBSP}={NBSP}{value:.3f}"


def count(value: float | None) -> str:
    """A large count with an SI letter and three significant digits: 0.555 G, 11.2 M."""
    if value is None:
        return DASH
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{_digits(value / size)}{NBSP}{letter}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return DASH
    for unit, letters in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{_digits(value / unit)}{NBSP}{letters}"
    return f"{value:g}{NBSP}B"


def milliseconds(value: float | None, *, unit: bool = True) -> str:
    if value is None:
        return DASH
    return _digits(value) + (f"{NBSP}ms" if unit else "")


def _digits(value: float) -> str:
    """Three significant digits, never in exponent form."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def epsilon(eps: float) -> str:
    return f"\u03b5{NBSP}={NBSP}{eps:g}/255"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def span(low: int, high: int) -> str:
    """`101-330`; one number where both are the same."""
    return f"{low:,}" if low == high else f"{low:,}\u2013{high:,}"


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def fact(value: Any) -> str:
    """A value of a free-form manifest on one line, nested values named: `keep 0.9; layers 3`."""
    if isinstance(value, dict):
        return "; ".join(
            f"{clean_text(str(key)).replace('_', ' ')} {fact(v)}" for key, v in value.items()
        )[:400]
    if isinstance(value, list | tuple):
        shown = ", ".join(fact(v) for v in value[:8])
        return shown + (f", \u2026 ({len(value)} in all)" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return clean_text(str(value), 200)

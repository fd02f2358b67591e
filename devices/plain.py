"""Text of a device's as one plain line: a terminal obeys control characters, a board may send any.

Enters: what a board says of itself, its errors. Leaves: the same without what is not printable.
"""

from __future__ import annotations

SHOWN_CHARS = 60
"""Of a name that was given; more would hide what is said of it."""


def plain(text: object) -> str:
    """One line of printable characters; others become a question mark."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in words)


def shortened(text: object) -> str:
    """The text, or its beginning where it is too long to be shown whole."""
    words = str(text)
    return words if len(words) <= SHOWN_CHARS else f"{words[: SHOWN_CHARS - 3]}..."

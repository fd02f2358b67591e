"""Text of a device's as one plain line: a terminal obeys control characters, a board may send any.

Enters: what a board says of itself, its errors. Leaves: the same without what is not printable.
"""

from __future__ import annotations


def plain(text: object) -> str:
    """One line of printable characters; others become a question mark."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in words)

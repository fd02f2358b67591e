"""Values of the data files, the same bytes on (nearly) every machine.

Enters: plain values. Leaves: the same with every float at 12 significant digits. Sums over images
go through the machine's own matrix product, whose last digits depend on its processor; that two of
them lie on either side of a twelfth digit is rare.
"""

from __future__ import annotations

from typing import Any

DIGITS = 12


def portable(value: Any) -> Any:
    """Dictionaries, lists and tuples of it included; what is no float stays as it is."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [portable(inner) for inner in value]
    return value

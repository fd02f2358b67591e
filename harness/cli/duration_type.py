"""`90s`, `10m`, `1h` on the command line.

Enters: an option's text. Leaves: seconds.
"""

from __future__ import annotations

import re

import click

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_SECONDS = 1e7


class DurationType(click.ParamType[float]):
    """A length of time: a number, and s, m or h; seconds without."""

    name = "duration"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds, more than none."""
        text = str(value).strip().lower()
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text)
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
        if not 0 < seconds <= _LONGEST_SECONDS:
            self.fail(f"{value!r} is no length of time: write 90s, 10m or 1h", param, ctx)
        return seconds


DURATION = DurationType()

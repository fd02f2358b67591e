"""The findings of one ONNX file, for people.

Enters: a file's name and its findings. Leaves: lines. Names come from files of strangers: what a
terminal would obey is not printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.lint_finding import Finding

_SHOWN = 5
"""Nodes named for one rule; --json names all."""
_LONGEST = 400
_NAMES = {"error": "error", "warning": "warning", "info": "note"}


def findings_lines(name: str, findings: tuple[Finding, ...]) -> Iterator[str]:
    """A line of totals; then for each rule its nodes and, once, the remedy."""
    totals = [
        f"{n} {word}{'' if n == 1 else 's'}"
        for severity, word in _NAMES.items()
        if (n := sum(finding.severity == severity for finding in findings))
    ]
    yield _printable(f"{name}: {', '.join(totals) or 'nothing found'}")
    for (severity, rule, remedy), group in groupby(
        sorted(findings, key=lambda finding: list(_NAMES).index(finding.severity)),
        key=lambda finding: (finding.severity, finding.rule, finding.remedy),
    ):
        members = list(group)
        times = f" ({len(members)})" if len(members) > 1 else ""
        yield f"  {_NAMES[severity]} {rule}{times}"
        for finding in members[:_SHOWN]:
            where = f"{finding.node}: " if finding.node else ""
            yield _printable(f"    {where}{finding.cost}")
        if len(members) > _SHOWN:
            yield f"    and {len(members) - _SHOWN} more (--json lists them)"
        yield _printable(f"    remedy: {remedy}")


def _printable(text: str) -> str:
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in cut)

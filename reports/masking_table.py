"""Every sign of gradient masking in numbers: a table for people, plain values for programs.

Enters: a `View`. Leaves: text cells; JSON values; the verdict beside rows of the store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from harness.records import ResultRow
from harness.results import as_json
from harness.seeds import key_of
from harness.store import Store
from reports.inference import ALPHA
from reports.masking import number
from reports.masking_rules import Signal
from reports.method import TextTable
from reports.portable import portable
from reports.signals import MaskingVerdict, masking_verdicts
from reports.view import View
from reports.words import DASH, interval, label_of, p_value, percent


def masking_table(view: View) -> TextTable | None:
    """Every signal's numbers, variant by variant; None where nothing was attacked."""
    verdicts = masking_verdicts(view)
    if not verdicts:
        return None
    head = (
        "Variant", "Verdict", "White-box UER", "Gradient-free UER", "Worst transfer",
        "Best control", "No gradient", "Slope kept", "Agreement", "Saturated", "Falls with \u03b5",
    )  # fmt: skip
    return TextTable(head, tuple(_cells(verdict) for verdict in verdicts))


def _cells(verdict: MaskingVerdict) -> tuple[str, ...]:
    s = verdict.signals
    own = verdict.variant.white_box
    drop = s["monotone"]
    return (
        verdict.variant.label,
        verdict.word,
        percent(own.uer if own else None),
        _compared(s["gradient_free"]),
        _compared(s["transfer"]),
        _compared(s["control"]),
        _within(s["no_gradient"], percent(s["no_gradient"].value)),
        _within(s["slope"], number(s["slope"].value)),
        _within(s["agreement"], number(s["agreement"].value)),
        percent(s["saturated"].value),
        {"raised": drop.other, "not measured": DASH}.get(drop.state, "not shown"),
    )


def _compared(signal: Signal) -> str:
    if signal.value is None or signal.p is None:
        return DASH
    named = signal.other if signal.kind == "gradient_free" else label_of(signal.other)
    named += ", " if named else ""
    test = p_value(signal.p) + ("" if signal.p < ALPHA else ", not shown")
    return f"{percent(signal.value)} ({named}{test})"


def _within(signal: Signal, text: str) -> str:
    if signal.low is None or signal.high is None:
        return text
    if signal.kind == "no_gradient":
        return f"{text} ({interval(signal.low, signal.high)})"
    return f"{text} ({signal.low:.2f}{DASH}{signal.high:.2f})"


def masking_json(view: View) -> list[dict[str, Any]]:
    """Verdicts and signals as plain values: what `masking.json` holds."""
    return [
        {
            "variant": verdict.variant.name,
            "masking": verdict.word,
            "because": list(verdict.because),
            "near_ceiling": verdict.near_ceiling,
            "pattern": verdict.pattern or None,
            "eps": view.reference_eps,
            "signals": {
                kind: {
                    "state": signal.state,
                    "value": signal.value,
                    "reference": signal.reference,
                    "low": signal.low,
                    "high": signal.high,
                    "other": signal.other or None,
                    "p_holm": signal.p,
                    "tests": signal.family,
                }
                for kind, signal in verdict.signals.items()
            },
        }
        for verdict in masking_verdicts(view)
    ]


def masking_text(view: View) -> str:
    """`masking.json`: one object a variant."""
    return json.dumps(portable(masking_json(view)), indent=1) + "\n"


# --- beside the rows of the store -----------------------------------------------------------------

DERIVED_COLUMNS = ("masking", "seeds", "uer_mean", "uer_mean_low", "uer_mean_high")
"""What rows carry besides their own fields, where it applies; else null.

`masking`: the verdict on the white-box number this row is. `seeds`: how many crafting seeds of this
perturbation were measured; `uer_mean` and its 95 % interval are over all of them.
"""


def derived_columns(view: View | None, rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """Rows as plain portable values, in their order, each with `DERIVED_COLUMNS`."""
    words: dict[object, str] = {}
    if view is not None:
        for verdict in masking_verdicts(view):
            own = verdict.variant.white_box
            for row in view.repeats(own) if own is not None else ():
                words[key_of(row), view.evaluation.sha256] = verdict.word
    found = []
    for row in rows:
        group = None
        if view is not None and row.evaluation_sha256 == view.evaluation.sha256:
            group = view.seeds.get(key_of(row))
        found.append(
            {
                **as_json(row),
                "masking": words.get((key_of(row), row.evaluation_sha256)),
                "seeds": len(group.rows) if group else None,
                "uer_mean": group.uer.value if group else None,
                "uer_mean_low": group.uer.low if group else None,
                "uer_mean_high": group.uer.high if group else None,
            }
        )
    rounded: list[dict[str, Any]] = portable(found)
    return rounded


def rows_of(store: Store, rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """The same from a store; a store of PyTorch's runs only has nothing to derive."""
    from reports.selection import DEPLOYED, build_view

    deployed = any(row.runtime == DEPLOYED for row in rows)
    return derived_columns(build_view(store) if deployed else None, rows)

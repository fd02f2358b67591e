"""Result rows as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from harness.cli.stdout import StdoutConsole
from harness.pipeline.uap_names import GRADIENT_FREE
from harness.records import CONTROLS, ResultRow
from harness.sources import source_label
from reports.words import tenths


def print_results(rows: Sequence[ResultRow], *, derived: Sequence[Mapping[str, Any]] = ()) -> None:
    """One line a row: who was attacked with what, and what happened.

    Args:
        rows: the rows.
        derived: the same rows with what is derived over several of them, printed below.
    """
    table = Table(box=None, pad_edge=False)
    # Only a sample has them: of a whole set the UER is what it is.
    sampled = any(row.uer_corrected is not None for row in rows)
    corrected = ("whole set", "95 %") if sampled else ()
    for name in ("model", "device", "runtime", "UAP", "eps", "target"):
        table.add_column(name)
    for name in (
        "n",
        "accuracy",
        "UER",
        "95 %",
        *corrected,
        "TSR",
        "= torch",
        "p50 ms",
        "KB",
        "MMACs",
    ):
        table.add_column(name, justify="right")
    names_of = _uap_names(rows)
    for row in rows:
        estimate = (
            _percent(row.uer_corrected),
            _interval(row.uer_corrected_low, row.uer_corrected_high),
        )
        table.add_row(
            escape(source_label(row.variant)),
            row.device + (" (emulated)" if row.emulated else ""),
            row.runtime,
            escape(names_of(row)),
            "" if row.eps is None else f"{row.eps:g}",
            "" if row.target is None else str(row.target),
            str(row.n) if row.n == row.n_of else f"{row.n} of {row.n_of}",
            _percent(row.clean_accuracy),
            _percent(row.uer),
            _interval(row.uer_low, row.uer_high),
            *(estimate if sampled else ()),
            _percent(row.tsr),
            _percent(row.torch_agreement),
            _latency(row),
            "" if row.file_bytes is None else f"{row.file_bytes / 1000:.0f}",
            "" if row.macs is None else f"{row.macs / 1e6:.1f}",
        )
    # Piped, a table must not be cut to an 80-column terminal that is not there.
    console = StdoutConsole()
    if not console.is_terminal:
        console = StdoutConsole(width=200)
    console.print(table)
    for title, below in (("over crafting seeds", _seeds), ("gradient masking", _masking)):
        found = below(derived)
        if found is not None:
            console.print(f"\n{title}", highlight=False)
            console.print(found)


def _uap_names(rows: Sequence[ResultRow]) -> Callable[[ResultRow], str]:
    """Whose perturbation it is; its attack and seed too, where rows would look alike without."""
    crafted = [row for row in rows if row.uap_source not in (None, *CONTROLS)]
    usual = Counter(row.attack for row in crafted).most_common(1)
    seeds = {row.seed for row in crafted}

    def name(row: ResultRow) -> str:
        if row.uap_source is None:
            return "clean"
        parts = [source_label(row.uap_source)]
        if row.uap_source not in CONTROLS:
            # What takes no gradient is named always: of a list of nothing else, too.
            apart = row.attack not in (None, usual[0][0]) or row.attack == GRADIENT_FREE
            parts += [str(row.attack)] if apart else []
            parts += [f"s{row.seed}"] if len(seeds) > 1 else []
        return " ".join(parts)

    return name


def _seeds(derived: Sequence[Mapping[str, Any]]) -> Table | None:
    """Means over crafting seeds, each once."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    names = ("variant", "device", "emulated", "runtime", "uap_source", "eps", "target", "attack")
    for row in derived:
        if row["seeds"] is not None:
            found[tuple(row[name] for name in names)] = row
    if not found:
        return None
    table = Table(box=None, pad_edge=False)
    for name in ("model", "device", "UAP", "attack", "eps", "target"):
        table.add_column(name)
    for name in ("seeds", "mean UER", "95 % (images and seeds)"):
        table.add_column(name, justify="right")
    for row in found.values():
        table.add_row(
            escape(source_label(row["variant"])),
            row["device"] + (" (emulated)" if row["emulated"] else ""),
            escape(source_label(row["uap_source"])),
            escape(row["attack"]),
            f"{row['eps']:g}",
            "" if row["target"] is None else str(row["target"]),
            str(row["seeds"]),
            _percent(row["uer_mean"]),
            _interval(row["uer_mean_low"], row["uer_mean_high"]),
        )
    return table


def _masking(derived: Sequence[Mapping[str, Any]]) -> Table | None:
    """The verdict on each white-box number; once a model, whatever its crafting seeds."""
    words = {(row["variant"], row["eps"]): row["masking"] for row in derived if row["masking"]}
    if not words:
        return None
    table = Table(box=None, pad_edge=False)
    for name in ("model", "eps", "white-box number"):
        table.add_column(name)
    for (variant, eps), word in words.items():
        table.add_row(escape(source_label(variant)), f"{eps:g}", word)
    return table


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{tenths(low)}-{tenths(high)}"


def _latency(row: ResultRow) -> str:
    """The median; `~` marks one that is quick, unstable or invalid: not to be compared."""
    if row.latency_p50_ms is None:
        return ""
    sound = row.latency_mode == "full" and row.latency_verdict == "VALID"
    return f"{'' if sound else '~'}{row.latency_p50_ms:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else tenths(value)

"""What `harness export --verify` prints: a paragraph a variant, its layers when it is the only one.

Enters: proofs. Leaves: text or JSON on standard output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.table import Table

from harness.cli.stdout import StdoutConsole

if TYPE_CHECKING:
    from harness.pipeline.proof import Proof


def print_proofs(proofs: Sequence[Proof], *, as_json: bool) -> None:
    """Say of every variant whether it is proved, and by what."""
    if as_json:
        rows = [asdict(proof) | {"proved": not proof.problems} for proof in proofs]
        click.echo(json.dumps(rows, indent=2))
        return
    for proof in proofs:
        click.echo(_paragraph(proof))
    if len(proofs) == 1:
        _print_layers(proofs[0])


def _paragraph(proof: Proof) -> str:
    agreement = proof.agreement
    lines = [f"{proof.file.removesuffix('.onnx')}: {'NOT PROVED' if proof.problems else 'proved'}"]
    lines += [f"  {problem}" for problem in proof.problems]
    if agreement is None:
        return "\n".join(lines)
    predictions = agreement.images * len(agreement.settings)
    lines.append(
        f"  {proof.images_clean:,} images clean and {proof.images_attacked:,} attacked "
        f"({proof.attacked_by}), {len(agreement.settings)} settings of onnxruntime "
        f"{agreement.runtime_version} (1 and 2 threads, batch 1 and 128, graph optimisations on "
        "and off)"
    )
    lines.append(
        f"  {agreement.argmax_agreement:.4%} of {predictions:,} predictions are PyTorch's; "
        f"logits within {agreement.relative_error:.1e} of the largest"
    )
    if agreement.codes_compared is not None:
        lines.append(
            f"  {agreement.code_mismatches:,} of {agreement.codes_compared:,} codes differ, over "
            f"{len(agreement.layers)} tensors"
        )
    elif agreement.layers:
        worst = max(agreement.layers, key=lambda layer: layer.relative_error or 0.0)
        lines.append(f"  largest error inside: {worst.relative_error:.1e} ({worst.layer})")
    tight = min(proof.margins, key=lambda margin: margin.factor, default=None)
    if tight is not None and tight.factor >= 1:
        lines.append(
            f"  no 8-bit saturation on AVX2: the worst pair of products reaches "
            f"{tight.worst_pair:,} of {tight.limit:,} ({tight.layer}, {tight.factor:.1f}x margin)"
        )
    lines.append(f"  file {proof.sha256[:16]}, checkpoint {proof.checkpoint_sha256[:16]}")
    return "\n".join(lines)


def _print_layers(proof: Proof) -> None:
    """The layers, as they are in the file."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor")
    for heading in ("compared", "differ", "error"):
        table.add_column(heading, justify="right")
    for layer in proof.agreement.layers if proof.agreement else ():
        differ = "" if layer.mismatches is None else f"{layer.mismatches:,}"
        error = "" if layer.relative_error is None else f"{layer.relative_error:.1e}"
        table.add_row(layer.layer, f"{layer.compared:,}", differ, error)
    console = StdoutConsole()
    console.print(table)
    if not proof.margins:
        return
    margins = Table(box=None, pad_edge=False)
    margins.add_column("layer")
    for heading in ("worst pair of products", "limit", "margin"):
        margins.add_column(heading, justify="right")
    for margin in proof.margins:
        cells = (f"{margin.worst_pair:,}", f"{margin.limit:,}", f"{margin.factor:.1f}x")
        margins.add_row(margin.layer, *cells)
    console.print(margins)

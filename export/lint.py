"""A linter for any ONNX file: what it costs, where it computes wrongly, and the remedy.

Enters: a path or a parsed model, possibly from a stranger. Leaves: findings. The model is never
run; data outside the file is never read. What a rule cannot know (a shape, a vendor's operator)
it leaves out.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx

from export import lint_interface, lint_kernels, lint_storage, lint_structure
from export.lint_finding import Finding
from export.onnx_reader import Graph, load_model
from harness.records import HarnessError, UsageError

MAX_MODEL_BYTES = 512 << 20
"""The limit that devices put on a model; this package does not know them, a test compares."""

_GRAPH_RULES: tuple[Callable[[Graph], Iterator[Finding]], ...] = (
    lint_kernels.saturation,
    lint_kernels.convinteger_int8_weights,
    lint_kernels.gather_table,
    lint_kernels.unaligned_channels,
    lint_structure.zero_filters,
    lint_structure.zero_masks,
    lint_structure.fake_quantisation,
    lint_structure.batch_norm,
    lint_storage.unpacked_tensor,
    lint_storage.wasteful_fields,
    lint_storage.duplicate_initializers,
)
_MODEL_RULES: tuple[Callable[[onnx.ModelProto], Iterator[Finding]], ...] = (
    lint_interface.input_convention,
    lint_interface.newer_than_needed,
    lint_interface.unseen_subgraphs,
)
_SEVERITIES = ("error", "warning", "info")


def lint_file(path: Path, *, max_bytes: int = MAX_MODEL_BYTES) -> tuple[Finding, ...]:
    """The findings of one file, the worst first.

    Raises:
        UsageError: missing, empty, too big, not ONNX, or with weights outside the file.
    """
    content = _read(path, max_bytes=max_bytes)
    try:
        model = load_model(content)
    except HarnessError as error:
        raise UsageError(f"{path}: {error}") from None
    return lint(model)


def lint(model: onnx.ModelProto) -> tuple[Finding, ...]:
    """The findings of one model, the worst first, rules in a fixed order.

    A model that onnx's checker refuses has that one finding: the rules rely on valid nodes.
    """
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    for entry in (*shaped.graph.input, *shaped.graph.output):
        if entry.type.HasField("tensor_type") and not entry.type.tensor_type.HasField("shape"):
            entry.type.tensor_type.shape.dim.add()  # the checker asks for one, no runtime does
    try:
        onnx.checker.check_model(shaped)
    except Exception as error:  # ValidationError, and others of C++
        return (_invalid(error),)
    graph = Graph.inspect(model)
    findings = [finding for rule in _GRAPH_RULES for finding in rule(graph)]
    findings += [finding for rule in _MODEL_RULES for finding in rule(model)]
    return tuple(sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _invalid(error: Exception) -> Finding:
    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return Finding(
        "invalid_model",
        "error",
        "",
        f"onnx's checker refuses it, and nothing else was checked: {reason.strip()[:300]}",
        "export the model again, or with a newer onnx when it is newer than this one"
        f" ({onnx.__version__})",
    )


def _read(path: Path, *, max_bytes: int) -> bytes:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UsageError(f"{path} is not a file: --check takes FILE.onnx")
        if state.st_size > max_bytes:
            raise UsageError(
                f"{path} has {state.st_size} bytes, the limit for a model is {max_bytes}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the model {path}: {error.strerror or error}") from None
    if not content:
        raise UsageError(f"{path} is empty: export the model again")
    return content

"""The linter on models that this project did not make: PyTorch exports, onnxruntime quantises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_cases import quantised, torchvision_model
from onnx import numpy_helper

from export.lint import lint_file
from export.lint_finding import Finding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture
def mobilenet(folder: Path) -> Path:
    return torchvision_model("mobilenet_v3_small", folder)


def by_rule(findings: tuple[Finding, ...]) -> Counter[str]:
    return Counter(finding.rule for finding in findings)


def operators(path: Path, *names: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type in names]


CONVENTION = {"the input is called 'input'", "the input is float", "the output is called 'output'"}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "squeezenet1_1"])
def test_a_float_export_only_breaks_the_convention(name: str, folder: Path) -> None:
    findings = lint_file(torchvision_model(name, folder))
    assert {finding.severity for finding in findings} <= {"warning", "info"}
    warned = [finding for finding in findings if finding.severity == "warning"]
    assert {f.cost.partition(":")[0] for f in warned} == CONVENTION


def depthwise(nodes: list[onnx.NodeProto]) -> int:
    """In MobileNet, a grouped convolution is a depthwise one."""
    return sum(
        attribute.i > 1 for n in nodes for attribute in n.attribute if attribute.name == "group"
    )


def test_qdq(mobilenet: Path) -> None:
    path = quantised(mobilenet, "qdq")
    products = operators(path, "Conv", "Gemm")
    # Each layer uses its whole range somewhere: all saturate but depthwise ones.
    assert by_rule(lint_file(path))["saturation"] == len(products) - depthwise(products)
    assert len(products) == 54


def test_reduced_range_is_the_remedy_it_is_said_to_be(mobilenet: Path) -> None:
    path = quantised(mobilenet, "reduced")
    findings = lint_file(path)
    assert not by_rule(findings)["saturation"]
    assert all(finding.severity != "error" for finding in findings)


def test_qoperator(mobilenet: Path) -> None:
    """onnxruntime's own operators stop shape inference: types come from zero points."""
    path = quantised(mobilenet, "qoperator")
    findings = [f for f in lint_file(path) if f.rule == "saturation"]
    products = operators(path, "QLinearConv", "QGemm")
    assert len(findings) == len(products) - depthwise(products)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    weights = {node.name: stored[node.input[3]] for node in products}
    transposed = {n.name for n in products for a in n.attribute if a.name == "transB" and a.i}
    for finding in findings:  # the bound, by sorting whole filters
        weight = weights[finding.node].astype(int)
        if weight.ndim == 2 and finding.node not in transposed:
            weight = weight.T
        rows = np.sort(weight.reshape(len(weight), -1), axis=1)
        pairs = np.maximum(rows[:, -2:], 0).sum(axis=1), np.minimum(rows[:, :2], 0).sum(axis=1)
        over = (255 * pairs[0] > 32_767) | (255 * pairs[1] < -32_768)
        assert finding.numbers["filters_over"] == over.sum() > 0


def test_dynamic(mobilenet: Path) -> None:
    path = quantised(mobilenet, "dynamic")
    counts = by_rule(lint_file(path))
    assert counts["convinteger_int8_weights"] == len(operators(path, "ConvInteger")) == 52
    assert counts["saturation"] == len(operators(path, "MatMulInteger")) == 2

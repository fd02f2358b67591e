"""MACs beside those of onnx-tool, where it can count: float files.

    pip install -e ".[peers]" && pytest tests/export/test_cost_onnx_tool.py

onnx-tool counts the addition of a bias as one more MAC for every output; that is taken off by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_cases import coupled, masked, pruned, trained

from export.cost import cost_card
from export.float_graph import float_graph
from export.graph import serialise
from export.onnx_reader import Graph
from export.slim import slim
from harness.models.folded import fold

onnx_tool = pytest.importorskip(
    "onnx_tool", reason="onnx-tool is not installed: pip install -e '.[peers]'"
)
SHAPE = (3, 32, 32)
COUNTED = ("Conv", "Gemm")
MODELS: dict[str, Callable[[], Any]] = {
    "full": trained,
    "sfp": lambda: pruned(0.5),
    "coupled": lambda: coupled(0.5),
    "pp3": lambda: masked(3),
}


def bias_additions(content: bytes) -> int:
    """One for every number that a convolution or the last layer writes."""
    graph = Graph.parse(content, image_shape=SHAPE)
    outputs = [graph.shape(node.output[0]) for node in graph.nodes if node.op_type in COUNTED]
    return sum(int(np.prod(shape)) for shape in outputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_macs_are_those_of_onnx_tool(name: str, tmp_path: Path) -> None:
    model = slim(fold(MODELS[name]()))[0]
    content = serialise(float_graph(model, image_shape=SHAPE, metadata={}))
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load_model_from_string(content), path)
    theirs = onnx_tool.Model(str(path))
    theirs.graph.shape_infer({"image": np.zeros((1, *SHAPE), dtype=np.uint8)})
    theirs.graph.profile()
    counted = [node for node in theirs.graph.nodemap.values() if node.op_type in COUNTED]
    macs = sum(int(np.ravel(node.macs)[0]) for node in counted)
    assert len(counted) == 1 + 8 + 8 + 3 + 1
    ours = cost_card(content, image_shape=SHAPE).macs
    assert ours == macs - bias_additions(content)

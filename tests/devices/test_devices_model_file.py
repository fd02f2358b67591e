from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from devices.model_file import check_model_file
from harness.records import UsageError


def refusal(path: Path, **limits: int) -> str:
    with pytest.raises(UsageError) as caught:
        check_model_file(path, **limits)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_a_good_file_is_described(model) -> None:
    checked = check_model_file(model.path)
    assert checked.image_shape == (3, 8, 8)
    assert checked.classes == 5
    assert checked.sha256 == hashlib.sha256(model.path.read_bytes()).hexdigest()


def test_a_batch_of_one_is_accepted_and_another_is_not(make_model: Callable) -> None:
    one = make_model("one", input_shape=[1, 3, 8, 8], output_shape=[1, 5])
    assert check_model_file(one.path).classes == 5
    four = make_model("four", input_shape=[4, 3, 8, 8], output_shape=[4, 5])
    assert "batch size of 4" in refusal(four.path)


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.onnx")
    assert "directory" in refusal(tmp_path)
    empty = tmp_path / "empty.onnx"
    empty.touch()
    assert "is empty" in refusal(empty)


def test_oversized_is_refused_before_it_is_read(tmp_path: Path, model) -> None:
    assert "limit for a model is 10" in refusal(model.path, max_bytes=10)
    sparse = tmp_path / "sparse.onnx"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    assert "1099511627776 bytes" in refusal(sparse)


@pytest.mark.parametrize("content", [b"not a model", b"\x00" * 64, b"PK\x03\x04" * 100, b"\n\x00"])
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    assert "not an ONNX model" in refusal(path)


def test_a_truncated_model_is_refused_wherever_it_is_cut(tmp_path: Path, model) -> None:
    content = model.path.read_bytes()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(content) - 1, 97):
        path.write_bytes(content[:length])
        refusal(path)


def test_external_data_is_refused(external_model: Path) -> None:
    assert "external data" in refusal(external_model)


def test_external_data_inside_a_subgraph_is_refused(tmp_path: Path, model) -> None:
    proto = onnx.load(model.path)
    inside = numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    inside.ClearField("raw_data")
    inside.data_location = TensorProto.EXTERNAL
    inside.external_data.add(key="location", value="/etc/passwd")
    branch = helper.make_graph([helper.make_node("Identity", ["hidden"], ["y"])], "b", [], [])
    branch.initializer.append(inside)
    proto.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    )
    path = tmp_path / "nested.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "`hidden`" in refusal(path).replace("'", "`")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_type": TensorProto.FLOAT}, "uint8 [N, C, H, W]; it takes `image` float"),
        ({"input_name": "x"}, "one input `image`"),
        ({"input_shape": ["N", 3, 8]}, "one input `image`"),
        ({"input_shape": ["N", 3, "H", "W"]}, "must fix C, H, W"),
        ({"output_name": "scores"}, "one output `logits`"),
        ({"output_shape": ["N"]}, "one output `logits`"),
        ({"output_shape": ["N", "K"]}, "must fix C, H, W and classes"),
    ],
)
def test_another_convention_is_refused(make_model: Callable, changes: dict, message: str) -> None:
    assert message in refusal(make_model("odd", **changes).path)


def test_a_second_input_or_output_is_refused(tmp_path: Path, model) -> None:
    path = tmp_path / "two.onnx"
    proto = onnx.load(model.path)
    proto.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N"]))
    path.write_bytes(proto.SerializeToString())
    assert "`mask` float" in refusal(path)
    proto = onnx.load(model.path)
    proto.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None))
    path.write_bytes(proto.SerializeToString())
    assert "`pooled`" in refusal(path)

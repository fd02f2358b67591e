"""Instruction counts of the emulated board: they repeat, and they follow the work of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from harness.records import HarnessError, UsageError

if TYPE_CHECKING:
    from devices.emulated import EmulatedDevice
    from devices.instructions import InstructionCounter

pytestmark = pytest.mark.arm


@pytest.fixture(scope="module")
def python(emulated_rpi4: EmulatedDevice) -> list[str]:
    from devices.emulated import emulated_python

    return emulated_python(emulated_rpi4.profile)


@pytest.fixture(scope="module")
def counter(emulated_rpi4: EmulatedDevice) -> InstructionCounter:
    from devices.emulated import emulator_folder
    from devices.instructions import instruction_counter

    folder = emulator_folder(emulated_rpi4.profile).parent / "counter"
    try:
        return instruction_counter(folder, progress=lambda _line: None)
    except HarnessError as error:
        pytest.skip(str(error))


def product(path: Path, *, inner: int) -> Path:
    """Logits of 12 pixels through two matrix products, 12 x `inner` x 10 multiplications."""
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(size=(12, inner)).astype(np.float32),
        "second": rng.normal(size=(inner, 10)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "second"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_counts_repeat_and_follow_the_work(
    counter: InstructionCounter, python: list[str], tmp_path: Path
) -> None:
    small = product(tmp_path / "small.onnx", inner=1_000)
    large = product(tmp_path / "large.onnx", inner=40_000)
    first, again = (counter.count(small, python=python) for _ in range(2))
    assert first == pytest.approx(again, rel=0.05)
    # 22 multiplications for each of 39,000 more columns, at most four to an instruction.
    assert counter.count(large, python=python) - first > 22 * 39_000 / 4


def test_what_is_not_a_model_is_refused(
    counter: InstructionCounter, python: list[str], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(b"torn")
    with pytest.raises(UsageError, match="is not an ONNX model"):
        counter.count(torn, python=python)


def test_an_emulator_that_fails_is_one_line(counter: InstructionCounter, tmp_path: Path) -> None:
    model = product(tmp_path / "model.onnx", inner=10)
    with pytest.raises(HarnessError, match="the counting emulator failed") as raised:
        counter.count(model, python=["qemu-aarch64", str(tmp_path / "nothing")])
    assert "\n" not in str(raised.value)

"""Tiny real ONNX models with a numpy oracle, run through the real runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper

from devices.local import LocalDevice
from devices.session import DeviceSession

CLASSES = 5
SHAPE = (3, 8, 8)


@dataclass(frozen=True)
class TinyModel:
    """logits = mean over space of relu(conv3x3(image / 255)) @ head + bias."""

    path: Path
    kernel: np.ndarray  # float32 [F, C, 3, 3]
    head: np.ndarray  # float32 [F, classes]
    bias: np.ndarray  # float32 [classes]

    def classes(self, images: np.ndarray) -> np.ndarray:
        """The oracle: int64 [N]; refuses images on which float error could decide."""
        logits = scores(images, self.kernel, self.head) + self.bias
        top = np.sort(logits, axis=1)
        assert (top[:, -1] - top[:, -2] > 1e-5).all(), "a near-tie: choose another seed"
        return logits.argmax(axis=1)


def scores(images: np.ndarray, kernel: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Logits before the bias, float64 [N, classes]."""
    windows = sliding_window_view(images.astype(np.float64) / 255, (3, 3), axis=(2, 3))
    features = np.maximum(np.einsum("nchwij,fcij->nfhw", windows, kernel), 0)
    return features.mean(axis=(2, 3)) @ head


def noise(seed: int, count: int) -> np.ndarray:
    """uint8 [count, 3, 8, 8]."""
    return np.random.default_rng(seed).integers(0, 256, size=(count, *SHAPE), dtype=np.uint8)


def build(path: Path, *, seed: int = 0, **changes: Any) -> TinyModel:
    """Write a model that follows the convention but for `changes`."""
    options: dict[str, Any] = {
        "input_name": "image",
        "input_type": TensorProto.UINT8,
        "input_shape": ["N", *SHAPE],
        "output_name": "logits",
        "output_shape": ["N", CLASSES],
        "bias": None,
    }
    assert not changes.keys() - options.keys()
    options |= changes
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(6, SHAPE[0], 3, 3)).astype(np.float32)
    head = (4 * rng.normal(size=(6, CLASSES))).astype(np.float32)
    bias = options["bias"]
    if bias is None:  # centred, or noise images would all be of one class
        bias = -scores(noise(7, 50), kernel, head).mean(axis=0).astype(np.float32)
    nodes = [
        helper.make_node("Cast", [options["input_name"]], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels", "scale"], ["x"]),
        helper.make_node("Conv", ["x", "kernel"], ["convolved"]),
        helper.make_node("Relu", ["convolved"], ["features"]),
        helper.make_node("ReduceMean", ["features", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "head", "bias"], [options["output_name"]]),
    ]
    weights = {
        "scale": np.float32(255),
        "kernel": kernel,
        "axes": np.array([2, 3]),
        "head": head,
        "bias": bias,
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(
                options["input_name"], options["input_type"], options["input_shape"]
            )
        ],
        [
            helper.make_tensor_value_info(
                options["output_name"], TensorProto.FLOAT, options["output_shape"]
            )
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return TinyModel(path, kernel, head, bias)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., TinyModel]:
    """Build a tiny model by name: `make_model("odd", input_name="x")`."""

    def make(name: str = "tiny", **changes: Any) -> TinyModel:
        return build(tmp_path / f"{name}.onnx", **changes)

    return make


@pytest.fixture
def model(make_model: Callable[..., TinyModel]) -> TinyModel:
    return make_model()


@pytest.fixture
def external_model(model: TinyModel) -> Path:
    """A model whose weights really are in a file beside it, and would load."""
    path = model.path.with_name("external.onnx")
    onnx.save_model(
        onnx.load(model.path), path, save_as_external_data=True, size_threshold=0, location="w.bin"
    )
    return path


@pytest.fixture
def images() -> np.ndarray:
    """uint8 [37, 3, 8, 8]: a count that no batch size divides."""
    return noise(1, 37)


@pytest.fixture
def delta_255() -> np.ndarray:
    """int16 [3, 8, 8], large enough to change predictions and to clip."""
    return (80 * np.random.default_rng(2).choice([-1, 1], size=SHAPE)).astype(np.int16)


@pytest.fixture
def session() -> Iterator[DeviceSession]:
    with LocalDevice().open() as session:
        yield session

"""What the device harness costs over a bare onnxruntime loop at batch 1, on this machine.

Run with `pytest tests/benchmarks --benchmark-enable`. The ratios are printed and kept in
`extra_info`; nothing here asserts a time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from devices.local import LocalDevice

SHAPE = (3, 32, 32)
N = 64
ROUNDS = 5
RUNS = 300
WIDTH = 32
"""About 9.7 MMAC an image: a fraction of a millisecond, so overhead would show."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(size=(WIDTH, 3, 3, 3)).astype(np.float32),
        "second": rng.normal(size=(WIDTH, WIDTH, 3, 3)).astype(np.float32) / WIDTH,
        "axes": np.array([2, 3]),
        "head": rng.normal(size=(WIDTH, 10)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c", "axes"], ["d"], keepdims=0),
        helper.make_node("MatMul", ["d", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = tmp_path / "benchmark.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, size=(N, *SHAPE), dtype=np.uint8)


class BareLoop:
    """The baseline: onnxruntime and a for loop, in this process, one thread, batch 1."""

    def __init__(self, model: Path, images: np.ndarray) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self._feeds = [{"image": images[i : i + 1]} for i in range(len(images))]

    def predict(self) -> np.ndarray:
        run, feeds = self._session.run, self._feeds
        return np.array([int(run(["logits"], feed)[0].argmax()) for feed in feeds])

    def samples_ns(self, count: int) -> list[int]:
        samples = []
        for i in range(count):
            feed = self._feeds[i % len(self._feeds)]
            start = time.perf_counter_ns()
            self._session.run(["logits"], feed)
            samples.append(time.perf_counter_ns() - start)
        return samples


def report(benchmark, capsys, name: str, ratio: float) -> None:
    benchmark.extra_info[name] = ratio
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {ratio:.3f}\n")


def test_batch_one_evaluation_against_a_bare_loop(benchmark, capsys, model, images) -> None:
    """Time of `DeviceSession.predict` at batch 1 (a request per image) over the bare loop."""
    bare = BareLoop(model, images)
    expected = bare.predict()
    device_s, bare_s = [], []
    with LocalDevice().open() as session:
        session.load(model, threads=1)
        session.set_images(images)
        predicted = benchmark.pedantic(
            session.predict, (None,), {"batch_size": 1}, rounds=ROUNDS, warmup_rounds=1
        )
        for _ in range(ROUNDS):  # paired: a neighbour's noise falls on both
            start = time.perf_counter()
            bare.predict()
            middle = time.perf_counter()
            session.predict(None, batch_size=1)
            bare_s.append(middle - start)
            device_s.append(time.perf_counter() - middle)
    np.testing.assert_array_equal(predicted, expected)
    ratio = float(np.median(device_s) / np.median(bare_s))
    report(benchmark, capsys, "device_evaluation_over_bare_loop", ratio)


def test_measured_latency_against_a_bare_loop(benchmark, capsys, model, images) -> None:
    """p50 that the runner measures over p50 of the bare loop just before and just after it."""
    bare = BareLoop(model, images)
    bare.samples_ns(RUNS)

    def ratio() -> float:
        with LocalDevice().open() as session:
            session.load(model, threads=1)
            session.set_images(images)
            before = bare.samples_ns(RUNS)
            process = session.measure(
                warmup_runs=RUNS, warmup_seconds=0, min_runs=RUNS, min_seconds=0
            )
            after = bare.samples_ns(RUNS)
        return float(np.median(process.samples_ns) / np.median(before + after))

    ratios = [ratio() for _ in range(ROUNDS)]
    benchmark.pedantic(bare.predict, rounds=ROUNDS)
    report(benchmark, capsys, "latency_p50_over_bare_loop", float(np.median(ratios)))

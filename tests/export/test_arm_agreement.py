"""Is what was exported and proven on x86 the same function on an Arm core? The emulator says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from export_cases import IMAGE_SHAPE, images, logits, trained, twin

from devices.emulated import EmulatedDevice, emulated_python
from devices.local import LocalDevice
from devices.perturbation import perturb
from devices.session import DeviceSession
from export.float_graph import float_graph
from export.graph import serialise
from export.integer_graph import exposed_layers, integer_graph
from export.integer_layers import Kernel, forms_of
from export.static_int8 import quantise
from export.verify import _with_outputs
from harness.models.folded import fold
from harness.models.integer import IntegerResNet

pytestmark = pytest.mark.arm

IMAGES = 256
EPS_255 = 10
BITS = (2, 3, 4)
FORMS: tuple[Kernel, ...] = get_args(Kernel)
ANSWER = """
import pathlib, sys
import numpy, onnxruntime
folder = pathlib.Path(sys.argv[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
for model in folder.glob("*.onnx"):
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"image": numpy.load(folder / "images.npy")})
    numpy.savez(folder / (model.stem + "." + sys.argv[2]), **dict(zip(names, values)))
"""
Answers = dict[str, dict[str, np.ndarray]]
"""File -> output -> values."""


@pytest.fixture(scope="module")
def arm(emulated_rpi4: EmulatedDevice) -> Iterator[DeviceSession]:
    with emulated_rpi4.open() as session:
        yield session


@pytest.fixture(scope="module")
def x86() -> Iterator[DeviceSession]:
    with LocalDevice().open() as session:
        yield session


@pytest.fixture(scope="module")
def avx2_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str] | None:
    """What makes a program see no VNNI, whose products saturate; None where it cannot be had."""
    source = Path(__file__).parents[1] / "benchmarks" / "avx2_only.c"
    library = tmp_path_factory.mktemp("avx2") / "avx2_only.so"
    if shutil.which("cc") is None:
        return None
    compiled = subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", library, source], capture_output=True, check=False
    )
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    tried = subprocess.run(
        [sys.executable, "-c", ""], env=environment, capture_output=True, check=False
    )
    works = compiled.returncode == tried.returncode == 0 and not tried.stderr
    return environment if works else None


def delta_255() -> np.ndarray:
    """int16 [C, H, W], the random-sign control."""
    signs = np.random.default_rng(11).choice([-1, 1], size=IMAGE_SHAPE)
    return (EPS_255 * signs).astype(np.int16)


def kernels(model: IntegerResNet, form: Kernel) -> dict[str, Kernel]:
    """`form` for every layer that can have it."""
    chosen: dict[str, Kernel] = {}
    for index, block in enumerate(model.blocks()):
        layers = {"conv1": block.conv1, "conv2": block.conv2, "shortcut": block.shortcut}
        for name, layer in layers.items():
            if layer is not None and form in forms_of(layer):
                chosen[f"blocks.{index}.{name}"] = form
    assert chosen
    return chosen


def predicted(session: DeviceSession, model: Path) -> dict[str, np.ndarray]:
    session.load(model, threads=1)
    session.set_images(images(IMAGES))
    return {"clean": session.predict(None), "attacked": session.predict(delta_255())}


def answers(
    files: Mapping[str, bytes],
    command: list[str],
    folder: Path,
    *,
    env: dict[str, str] | None = None,
) -> Answers:
    """Every output of the files on the attacked images, as onnxruntime under `command` has it."""
    np.save(folder / "images.npy", perturb(images(IMAGES), delta_255()))
    for name, content in files.items():
        (folder / f"{name}.onnx").write_bytes(content)
    subprocess.run([*command, "-c", ANSWER, folder, "out"], check=True, env=env)
    return {name: dict(np.load(folder / f"{name}.out.npz")) for name in files}


@pytest.mark.parametrize("bits", BITS)
def test_apot_predicts_the_same_on_arm(arm, x86, bits: int, tmp_path: Path) -> None:
    """The file as deployed, through the runner, clean and attacked: not one image differs."""
    model = twin(bits)
    path = tmp_path / f"q{bits}.onnx"
    path.write_bytes(serialise(integer_graph(model, image_shape=IMAGE_SHAPE, metadata={})))
    here, there = predicted(x86, path), predicted(arm, path)
    seen = {"clean": images(IMAGES), "attacked": perturb(images(IMAGES), delta_255())}
    for name, pixels in seen.items():
        expected = logits(model, pixels).argmax(axis=1)
        assert len(set(expected)) > 1
        np.testing.assert_array_equal(here[name], expected)
        np.testing.assert_array_equal(there[name], expected)


def test_every_code_of_apot_is_the_same_on_arm(
    emulated_rpi4: EmulatedDevice, avx2_only: dict[str, str] | None, tmp_path: Path
) -> None:
    """Not the answers alone: every quantised activation of every layer, in every kernel form.

    Bit for bit, and on an x86 whose int8 products could saturate too, where one can be had.
    """
    files, codes = {}, {}
    for bits in BITS:
        model = twin(bits)
        for form in FORMS:
            graph = integer_graph(
                model, image_shape=IMAGE_SHAPE, metadata={}, kernels=kernels(model, form)
            )
            name = f"q{bits} {form}"
            codes[name] = [layer.codes for layer in exposed_layers(model)]
            files[name] = _with_outputs(serialise(graph), codes[name])
    here = answers(files, [sys.executable], tmp_path)
    others = [answers(files, [*emulated_python(emulated_rpi4.profile), "-I", "-B"], tmp_path)]
    if avx2_only is not None:
        others.append(answers(files, [sys.executable], tmp_path, env=avx2_only))
    for name in files:
        assert {"logits", *codes[name]} == set(here[name])
        for there in others:
            for tensor in codes[name]:
                assert there[name][tensor].dtype == np.uint8
                np.testing.assert_array_equal(there[name][tensor], here[name][tensor], name)
            mine, theirs = here[name]["logits"], there[name]["logits"]
            assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(mine).max()
            np.testing.assert_array_equal(mine.argmax(axis=1), theirs.argmax(axis=1))


def test_what_static_int8_does_on_arm(
    emulated_rpi4: EmulatedDevice,
    avx2_only: dict[str, str] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured and printed, not assumed; fp32 beside it. Only what is sure is asserted."""
    model = trained()
    graph = float_graph(fold(model), image_shape=IMAGE_SHAPE, metadata={})
    files = {"fp32": serialise(graph), "int8": quantise(graph, images(64), metadata={})}
    machines: dict[str, tuple[list[str], Any]] = {
        "x86": ([sys.executable], None),
        "Arm": ([*emulated_python(emulated_rpi4.profile), "-I", "-B"], None),
    }
    if avx2_only is not None:
        machines["x86 with AVX2 only"] = ([sys.executable], avx2_only)
    found = {
        machine: answers(files, command, tmp_path, env=env)
        for machine, (command, env) in machines.items()
    }
    reference = logits(model, perturb(images(IMAGES), delta_255())).argmax(axis=1)
    lines = []
    for name in files:
        classes = {machine: each[name]["logits"].argmax(axis=1) for machine, each in found.items()}
        for machine, its in classes.items():
            same, torch = np.mean(its == classes["Arm"]), np.mean(its == reference)
            lines.append(f"{name} on {machine}: {same:.1%} as on Arm, {torch:.1%} as in PyTorch")
        assert np.mean(classes["Arm"] == reference) > 0.2  # it runs there
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join([*lines, f"({IMAGES} attacked images)", ""]))
    assert "fp32 on x86: 100.0% as on Arm" in lines[0]

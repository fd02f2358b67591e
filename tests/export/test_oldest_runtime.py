"""The oldest onnxruntime that is supported, in an environment of its own, runs every file.

    pytest -m network tests/export/test_oldest_runtime.py

Installs that runtime (about 10 MB) with the machine's own pip.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import images, logits, masked, pruned, twin

from devices.local import RUNNER
from devices.process import ProcessTransport
from devices.session import open_session
from export.exporter import MIN_ONNXRUNTIME, export_model
from harness.models.folded import fold
from harness.models.resnet import ResNet

pytestmark = [pytest.mark.network, pytest.mark.slow]
PIXELS = images(200, seed=11)
FILES = {
    "sfp": lambda: pruned(0.5),
    "pp3": lambda: masked(3),
    **{f"q{bits}": lambda bits=bits: twin(bits) for bits in (2, 3, 4)},
}


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the oldest supported onnxruntime and numpy, nothing else."""
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # onnxruntime of that age was built against NumPy 1.
    wanted = [f"onnxruntime=={MIN_ONNXRUNTIME}", "numpy<2"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--only-binary=:all:", *wanted],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"cannot install onnxruntime {MIN_ONNXRUNTIME}: {done.stderr.strip()[-200:]}")
    return python


def predictions(python: Path, model: Path, *, batch_size: int) -> tuple[str, list[int]]:
    """(onnxruntime's version, predicted classes) of the runner in that environment."""
    with open_session(ProcessTransport([str(python), "-E", "-P", str(RUNNER)])) as session:
        session.load(model, threads=1)
        session.set_images(PIXELS)
        predicted = session.predict(None, batch_size=batch_size)
        return session.machine.runtime_version, [int(p) for p in predicted]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_every_file_runs_and_predicts_the_same(
    name: str, packed: bool, oldest: Path, tmp_path: Path
) -> None:
    model = FILES[name]()
    # Barely trained models say one class; without their preference the images decide.
    with torch.no_grad():
        model.fc.bias -= torch.from_numpy(logits(model, PIXELS).mean(axis=0))
    deployed = fold(model) if isinstance(model, ResNet) else model
    path = tmp_path / f"{name}.onnx"
    export_model(
        deployed,
        model,
        out=path,
        calibration=PIXELS[:50],
        metadata={},
        packed=packed,
    )
    version, old = predictions(oldest, path, batch_size=1)
    assert version == MIN_ONNXRUNTIME
    _, new = predictions(Path(sys.executable), path, batch_size=64)
    assert old == new
    assert len(np.unique(new)) > 2

"""What the command-line tests share: a tiny configuration, ways to run `harness`, file states."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from harness.data.digits import digits_splits

REPO = Path(__file__).resolve().parents[2]
SHAPE = (3, 32, 32)
EPS = (4, 10)
TARGETS = (0, 1)
EVALUATION_IMAGES = 100
DATASET = "tiny_digits"

CONFIG = """\
# A comment of the user's.
dataset = "{npz}"
preset = "quickstart"
width = 4

[train]
epochs = 2
batch_size = 32
pp_epochs = 1
apot_epochs = 1

[craft]
eps = [4, 10]
targets = [0, 1]
attack_images = 64
epochs = 2
batch_size = 32

[eval]
images = 100
threads = 1

[latency]
mode = "off"
"""


def write_npz(path: Path) -> Path:
    """300 training and 100 test images, real handwritten digits that share no original."""
    train, _, test, _ = digits_splits(renderings=1)
    np.savez(
        path,
        train_x=train.images[:300].transpose(0, 2, 3, 1),
        train_y=train.labels[:300],
        test_x=test.images[:EVALUATION_IMAGES].transpose(0, 2, 3, 1),
        test_y=test.labels[:EVALUATION_IMAGES],
    )
    return path


@dataclass(frozen=True)
class Tiny:
    """A finished workspace of all ten variants, and how its `harness run` went."""

    root: Path
    npz: Path
    run: subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: the source tree first, nothing that colours or debugs."""
    dropped = {"NO_COLOR", "FORCE_COLOR", "HARNESS_DEBUG", "COLUMNS"}
    base = {key: value for key, value in os.environ.items() if key not in dropped}
    search = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    return base | {"PYTHONPATH": os.pathsep.join(search)} | extra


def harness(*arguments: object, cwd: Path, timeout: float = 300, **env: str) -> Outcome:
    """Run `harness` as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Everything in a folder but its lock: relative path -> (digest, modification time)."""
    state = {}
    for path in sorted(root.rglob("*")):
        if path.name == ".lock" or path.is_symlink():
            continue
        if path.is_dir():
            state[f"{path.relative_to(root)}/"] = ("", 0)
        else:
            digest = hashlib.sha256(_repeatable(path)).hexdigest()
            state[str(path.relative_to(root))] = (digest, path.stat().st_mtime_ns)
    return state


def _repeatable(path: Path) -> bytes:
    """A file's bytes, less what is measured anew whenever a manifest is written: memory."""
    content = path.read_bytes()
    if path.suffix != ".json" or b'"memory"' not in content:
        return content
    manifest = json.loads(content)
    return json.dumps({key: manifest[key] for key in sorted(manifest) if key != "memory"}).encode()


def artefacts(root: Path) -> dict[str, tuple[str, int]]:
    """`snapshot` of `cache/`, without what is unfinished."""
    state = snapshot(root / "cache")
    return {name: at for name, at in state.items() if not name.startswith(".partial")}


def contents(state: dict[str, tuple[str, int]]) -> dict[str, str]:
    return {name: digest for name, (digest, _) in state.items()}


def written(before: dict[str, tuple[str, int]], after: dict[str, tuple[str, int]]) -> set[str]:
    """Names that are new, gone, or were written anew, even with the same bytes."""
    return {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}


def table(root: Path, query: str) -> list[tuple[Any, ...]]:
    """Rows of the results store, read past the harness."""
    connection = sqlite3.connect(root / "results.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def raw_predictions(root: Path) -> dict[tuple[str, str | None, str], np.ndarray]:
    """(model sha256, UAP sha256, runtime) -> classes of the last run."""
    rows = table(
        root,
        "SELECT model_sha256, uap_sha256, runtime, predictions FROM prediction_run ORDER BY id",
    )
    return {
        (model, uap, runtime): np.frombuffer(blob, dtype="<u2").astype(int)
        for model, uap, runtime, blob in rows
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def uap_content(**changes: Any) -> dict[str, Any]:
    """A UAP file as a user writes it by hand; a value of None leaves the field out."""
    signs = np.random.default_rng(3).choice([-1.0, 1.0], size=SHAPE)
    content: dict[str, Any] = {
        "delta": torch.from_numpy((10 * signs / 255).astype(np.float32)),
        "eps": 10.0,
        "source": "full",
        "target": -1,
        "dataset": DATASET,
        "protocol": "clean",
        "seed": 0,
        "meta": {},
    }
    content |= changes
    return {key: value for key, value in content.items() if value is not None}


def write_uap(path: Path, **changes: Any) -> Path:
    torch.save(uap_content(**changes), path)
    return path


def write_onnx(
    path: Path,
    *,
    side: int = 32,
    kind: int = TensorProto.UINT8,
    classes: int = 10,
    seed: int = 5,
) -> Path:
    """A model nobody here made: 8x8 average pooling, then a linear layer of random weights."""
    cells = 3 * (side // 8) ** 2
    weights = np.random.default_rng(seed).normal(size=(cells, classes)).astype(np.float32)
    weights -= weights.mean(axis=0)  # no class wins by brightness alone
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("AveragePool", ["pixels"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", ["p"], ["features"]),
            helper.make_node("MatMul", ["features", "weights"], ["logits"]),
        ],
        "theirs",
        [helper.make_tensor_value_info("image", kind, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def linear_oracle(images: np.ndarray) -> np.ndarray:
    """What `write_onnx`'s model answers to uint8 [N, 3, 32, 32]."""
    weights = np.random.default_rng(5).normal(size=(48, 10)).astype(np.float32)
    weights -= weights.mean(axis=0)
    n = len(images)
    pooled = images.astype(np.float64).reshape(n, 3, 4, 8, 4, 8).mean(axis=(3, 5))
    logits: np.ndarray = pooled.reshape(n, 48) @ weights.astype(np.float64)
    return logits.argmax(axis=1)


def edit(root: Path, old: str, new: str) -> None:
    """Change harness.toml as a user does in an editor."""
    path = root / "harness.toml"
    text = path.read_text()
    assert text.count(old) == 1, (old, text)
    path.write_text(text.replace(old, new))


def error_line(outcome: Outcome) -> str:
    """The one line that says what went wrong; the rest may only be notes and click's usage."""
    assert "Traceback" not in outcome.err
    notes = re.compile(r"$|new workspace: |CIFAR-10: fetching |Usage: |Try '|\d+ already built ")
    lines = [line for line in outcome.err.splitlines() if not notes.match(line)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(("error: ", "Error: ")), outcome.err
    return lines[0]

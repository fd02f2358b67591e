"""The user's commands on real images: CIFAR-10 as FILE.npz and as a folder of class folders.

    pytest -m slow tests/real

Needs an .npz of CIFAR-10 (train_x uint8 NHWC, train_y, test_x, test_y), named by
HARNESS_CIFAR10_NPZ or found as ../shared/data/cifar10.npz.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CIFAR10 = Path(os.environ.get("HARNESS_CIFAR10_NPZ", ROOT.parent / "shared/data/cifar10.npz"))
N_TRAIN, N_TEST = 10_000, 1000
CONFIG = """
dataset = {dataset}
preset = "quickstart"
[train]
epochs = 6
apot_epochs = 1
[craft]
attack_images = 1000
epochs = 5
[eval]
images = 0
[latency]
mode = "off"
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CIFAR10.exists(), reason=f"no CIFAR-10 at {CIFAR10.name}"),
]


@pytest.fixture(scope="module")
def cifar() -> dict[str, np.ndarray]:
    with np.load(CIFAR10) as file:
        return {
            "train_x": file["train_x"][:N_TRAIN],
            "train_y": file["train_y"][:N_TRAIN],
            "test_x": file["test_x"][:N_TEST],
            "test_y": file["test_y"][:N_TEST],
        }


def attack(folder: Path, dataset: Path) -> list[dict[str, Any]]:
    """What `harness attack-device` prints for Full and Q4 under Full's UAP and random signs."""
    folder.mkdir()
    (folder / "harness.toml").write_text(CONFIG.format(dataset=json.dumps(str(dataset))))
    command = [sys.executable, "-m", "harness", "attack-device", "--device", "local", "--json"]
    command += ["--workspace", str(folder), "--model", "full", "--model", "q4"]
    command += ["--uap", "cache/full_eps10.pt", "--uap", "cache/random_eps10.pt"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def check(rows: list[dict[str, Any]], *, n: int) -> None:
    by_key = {(row["variant"], row["uap_source"]): row for row in rows}
    assert len(rows) == len(by_key) == 6
    for variant in ("full", "q4"):
        clean, uap, random = (by_key[variant, s] for s in (None, "full", "random"))
        assert clean["n"] == n
        assert clean["clean_accuracy"] > 0.35  # chance is 0.1; six epochs of 10,000 images
        assert clean["torch_agreement"] >= 0.999
        assert uap["uer"] > random["uer"] + 0.1


def test_npz(cifar: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "cifar_part.npz"
    np.savez(path, **cifar)
    check(attack(tmp_path / "npz", path), n=N_TEST)


def test_folder_of_class_folders(cifar: dict[str, np.ndarray], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for role in ("train", "test"):
        for i, (pixels, label) in enumerate(
            zip(cifar[f"{role}_x"], cifar[f"{role}_y"], strict=True)
        ):
            path = folder / role / f"class_{label}" / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    check(attack(tmp_path / "folder", folder), n=N_TEST)

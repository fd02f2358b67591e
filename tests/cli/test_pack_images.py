"""scripts/pack_images.py: the same arrays come back, whatever they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pack_images.py"
_SPEC = importlib.util.spec_from_file_location("pack_images", SCRIPT)
assert _SPEC is not None
assert _SPEC.loader is not None
pack_images = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pack_images)


def back(arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    np.savez(folder / "in.npz", **arrays)
    pack_images.pack(folder / "in.npz", folder / "packed")
    pack_images.unpack(folder / "packed", folder / "out.npz")
    with np.load(folder / "out.npz") as file:
        return {name: file[name] for name in file.files}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    channels=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 9),
)
def test_the_same_arrays_come_back(
    shape: tuple[int, int, int], channels: int, seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {
        "train_x": rng.integers(0, 256, (*shape, channels), dtype=np.uint8),
        "test_x": np.full((2, 3, 3, channels), 255, dtype=np.uint8),
        "train_y": rng.integers(0, 10, shape[0]),
        "lossless": rng.random(shape[0]) < 0.5,
    }
    found = back(arrays, tmp_path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_smooth_pictures_become_smaller(tmp_path: Path) -> None:
    slope = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 4, (50, 32, 32, 3), dtype=np.uint8)
    back({"train_x": slope[None, :, :, None] + noise}, tmp_path)
    assert (tmp_path / "packed").stat().st_size < 0.6 * noise.size


def test_without_images_it_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", train_y=np.zeros(3))
    with pytest.raises(ValueError, match="no uint8 images"):
        pack_images.pack(tmp_path / "in.npz", tmp_path / "packed")

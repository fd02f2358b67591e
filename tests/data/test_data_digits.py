"""The embedded digits: split by original, the same bytes everywhere, contrast within its bounds."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from harness.data import digits
from harness.data.dataset import load_dataset
from harness.data.digits import digits_splits, render
from harness.data.splits import frozen_random
from harness.records import HarnessError

GOLDEN = {
    "train": "32b83ffa384fcdca115380e1974225c555ca8c34139117f2cbcb2b8cec0697e0",
    "evaluation": "7f87d648f5069f5d6fc80560a6e48d3eae0cffa8ecf2d415ff9bcb57d67d1289",
}
"""Whoever changes these makes another data set: results before and after do not compare."""


@pytest.fixture(scope="module")
def parts():
    return digits_splits()


def test_roles_share_no_original_and_use_every_one(parts):
    *_, originals = parts
    held = {role: set(index.tolist()) for role, index in originals.items()}
    assert len(held["evaluation"]) == len(originals["evaluation"]) == 600
    assert len(held["calibration"]) == 150
    assert sum(map(len, held.values())) == 1797
    assert set.union(*held.values()) == set(range(1797))


def test_labels_are_those_of_the_originals_and_stratified(parts):
    truth = load_digits().target
    sizes = np.bincount(truth)
    *splits, originals = parts
    for split, role in zip(splits, ("train", "calibration", "evaluation"), strict=True):
        np.testing.assert_array_equal(split.labels, truth[originals[role]])
    exact = sizes * 600 / 1797
    drawn = np.bincount(splits[2].labels)
    assert (np.abs(drawn - exact) < 1).all()


def test_every_training_original_is_rendered_the_same_number_of_times(parts):
    train, *_, originals = parts
    counts = np.bincount(originals["train"])
    assert set(counts.tolist()) == {0, digits.TRAIN_RENDERINGS}
    assert train.images.shape == (4188, 3, 32, 32)
    assert train.images.dtype == np.uint8
    assert len(np.unique(train.images.reshape(4188, -1), axis=0)) == 4188


def test_fewer_renderings_on_request():
    train, calibration, evaluation, _ = digits_splits(renderings=1)
    assert (len(train), len(calibration), len(evaluation)) == (1047, 150, 600)


def test_classes_are_mixed_in_order(parts):
    # Crafting walks images in order: no batch may be short of a class.
    for split in parts[:3]:
        assert len(set(split.labels[:64].tolist())) == 10


def test_seed_moves_attack_only_and_evaluation_is_one_fixed_set():
    a, b, again = (load_dataset("digits", attack_images=500, seed=s) for s in (0, 1, 0))
    assert a.fingerprint == again.fingerprint != b.fingerprint
    assert {r for r in a.digests if a.digests[r] != b.digests[r]} == {"attack"}
    assert {role: a.digests[role] for role in GOLDEN} == GOLDEN


def test_a_stroke_differs_from_its_background_by_the_bounded_contrast(monkeypatch):
    # With noise and shading off, a blank glyph is the background and a full one is the stroke.
    monkeypatch.setattr(digits, "NOISE_SIGMA", 1e-9)
    monkeypatch.setattr(digits, "SHADING", 0)
    full = render(np.full((200, 8, 8), 16, np.int32), frozen_random(5)).astype(int)
    blank = render(np.zeros((200, 8, 8), np.int32), frozen_random(5)).astype(int)
    low, high = digits.CONTRAST
    peak = (full - blank).max(axis=(2, 3))
    assert peak.min() >= low * 0.95
    assert peak.max() <= high * 1.05
    assert blank.min() >= digits.BACKGROUND[0]
    assert blank.max() <= digits.BACKGROUND[1]
    assert (full == blank).mean() > 0.05  # the glyph does not fill the picture


def test_noise_has_the_sigma_it_says(monkeypatch):
    monkeypatch.setattr(digits, "SHADING", 0)
    blank = render(np.zeros((300, 8, 8), np.int32), frozen_random(5)).astype(float)
    assert blank.std(axis=(2, 3)).mean() == pytest.approx(digits.NOISE_SIGMA, rel=0.05)


def test_hardly_anything_clips_even_under_the_budget(parts):
    for split in parts[:3]:
        assert split.images.min() > 10
        assert (split.images >= 255).mean() < 1e-4
        assert (split.images > 245).mean() < 1e-3


def test_digits_need_neither_torch_nor_global_random_state():
    code = (
        "import sys, numpy as np; np.random.seed(1); before = np.random.get_state()[1].copy();"
        "from harness.data.dataset import load_dataset;"
        "load_dataset('digits', attack_images=10, seed=0);"
        "assert (np.random.get_state()[1] == before).all(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_scikit_learn_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(HarnessError, match=r"needs scikit-learn: pip install scikit-learn"):
        load_dataset("digits", attack_images=10, seed=0)

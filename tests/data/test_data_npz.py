"""FILE.npz: what is read is what was written; every way to be wrong has its one line."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import source
from harness.data.dataset import evaluation_digest, load_dataset
from harness.records import UsageError


def arrays(n=40, classes=4, size=(8, 9), channels=3, seed=0):
    rng = np.random.default_rng(seed)
    test = n // 2
    return {
        "train_x": rng.integers(0, 256, (n, *size, channels), np.uint8),
        "train_y": np.arange(n) % classes,
        "test_x": rng.integers(0, 256, (test, *size, channels), np.uint8),
        "test_y": np.arange(test) % classes,
    }


def load(path, **changes):
    arguments = {"attack_images": 8, "seed": 0} | changes
    return load_dataset(str(path), **arguments)


def as_set(images, labels):
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(8, 60),
    classes=st.integers(2, 4),
    height=st.integers(8, 12),
    width=st.integers(8, 12),
    channels=st.sampled_from([1, 3]),
    compressed=st.booleans(),
    fortran=st.booleans(),
    label_type=st.sampled_from(["uint8", "int32", "int64", "uint64", ">i4"]),
    seed=st.integers(0, 99),
)
def test_round_trip(
    tmp_path_factory, n, classes, height, width, channels, compressed, fortran, label_type, seed
):
    data = arrays(n, classes, (height, width), channels, seed)
    path = tmp_path_factory.mktemp("npz") / "my set.npz"
    saved = {k: v.astype(label_type) if k.endswith("_y") else v for k, v in data.items()}
    if fortran:
        saved = {k: np.asfortranarray(v) for k, v in saved.items()}
    (np.savez_compressed if compressed else np.savez)(path, extra=np.ones(3), **saved)

    d = load(path, seed=seed)
    assert d.name == "my set"
    assert d.classes == tuple(str(c) for c in range(classes))
    assert d.flip is False
    train_x, test_x = (data[k].transpose(0, 3, 1, 2) for k in ("train_x", "test_x"))
    np.testing.assert_array_equal(d.evaluation.images, test_x)
    np.testing.assert_array_equal(d.evaluation.labels, data["test_y"])
    train, calibration = (as_set(s.images, s.labels) for s in (d.train, d.calibration))
    assert not train & calibration
    assert train | calibration == as_set(train_x, data["train_y"])
    assert as_set(d.attack.images, d.attack.labels) <= train
    for split in (d.train, d.calibration, d.attack, d.evaluation):
        assert split.images.flags.c_contiguous
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64


def test_statistics_are_those_of_train(tmp_path):
    data = arrays(100)
    data["train_x"][..., 2] = 7  # a constant channel
    np.savez(tmp_path / "a.npz", **data)
    d = load(tmp_path / "a.npz")
    mean = d.train.images.mean(axis=(0, 2, 3))
    std = d.train.images.std(axis=(0, 2, 3))
    assert d.mean_255 == tuple(round(m) for m in mean)
    assert d.mean_255[2] == 7
    assert d.std_255[:2] == pytest.approx(tuple(std[:2]), rel=1e-12)
    assert d.std_255[2] == 1.0


def test_attack_is_all_of_train_when_asked_for_more(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    d = load(tmp_path / "a.npz", attack_images=1000)
    assert d.attack is d.train
    assert d.digests["attack"] == d.digests["train"]


def test_evaluation_subset_is_stratified_and_said(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    whole, part = load(tmp_path / "a.npz"), load(tmp_path / "a.npz", evaluation_images=8)
    assert np.bincount(part.evaluation.labels).tolist() == [2, 2, 2, 2]
    assert as_set(part.evaluation.images, part.evaluation.labels) <= as_set(
        whole.evaluation.images, whole.evaluation.labels
    )
    assert part.note == (
        "a.npz: 40 train / 20 test images. Evaluated on 8 of 20 test images (stratified)."
    )
    # Training did not change, so neither does what a training stage depends on.
    assert part.digests["train"] == whole.digests["train"]
    assert part.fingerprint != whole.fingerprint
    assert part.digests["evaluation"] == evaluation_digest(part.evaluation)


def test_digest_covers_shape_pixels_and_labels(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    split = load(tmp_path / "a.npz").evaluation
    digests = {evaluation_digest(split)}
    other = split.images.copy()
    other[-1, -1, -1, -1] ^= 1
    labels = split.labels.copy()
    labels[-1] += 1
    reshaped = split.images.transpose(0, 1, 3, 2).reshape((*split.images.shape[:2], 9, 8))
    digests.add(evaluation_digest(type(split)(other, split.labels)))
    digests.add(evaluation_digest(type(split)(split.images, labels)))
    digests.add(evaluation_digest(type(split)(reshaped, split.labels)))
    digests.add(evaluation_digest(type(split)(split.images.reshape(-1, 3, 9, 8), split.labels)))
    assert len(digests) == 5


# --- errors: one line, naming what, where and the remedy -----------------------------------------


def fails(path, message, **changes):
    with pytest.raises(UsageError) as caught:
        load(path, **changes)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 400


def without(key):
    return {k: v for k, v in arrays().items() if k != key}


BAD = {
    "no test_x": (
        without("test_x"),
        "has no test_x: it must hold train_x, train_y, test_x, test_y",
    ),
    "float images": (
        arrays() | {"train_x": np.zeros((40, 8, 9, 3), np.float32)},
        "has dtype float32: images must be uint8 in 0..255",
    ),
    "channels first": (
        arrays() | {"train_x": np.zeros((40, 3, 8, 9), np.uint8)},
        "has shape [40, 3, 8, 9]: images must be [N, H, W, C] with 1 or 3 channels last; transpose",
    ),
    "no channels": (
        arrays() | {"train_x": np.zeros((40, 8, 9), np.uint8)},
        "has shape [40, 8, 9]: images must be [N, H, W, C]",
    ),
    "tiny": (arrays(size=(8, 7)), "8x7 pixels: at least 8x8 are needed"),
    "no training image": (arrays() | {"train_x": np.zeros((0, 8, 9, 3), np.uint8)}, "no image"),
    "no test image": (arrays() | {"test_x": np.zeros((0, 8, 9, 3), np.uint8)}, "no image"),
    "two sizes": (
        arrays() | {"test_x": np.zeros((20, 9, 9, 3), np.uint8)},
        "test_x has images of [9, 9, 3] and train_x of [8, 9, 3]",
    ),
    "negative label": (
        arrays() | {"train_y": np.arange(40) % 4 - 1},
        "is -1 at index 0, out of range: with 40 training images labels are in 0..39",
    ),
    "huge label": (
        arrays() | {"test_y": np.full(20, 2**64 - 1, np.uint64)},
        "is 18446744073709551615 at index 0, out of range",
    ),
    "float labels": (arrays() | {"train_y": np.ones(40)}, "dtype float64: labels must be integers"),
    "bool labels": (arrays() | {"train_y": np.ones(40, bool)}, "has dtype bool"),
    "one-hot labels": (
        arrays() | {"train_y": np.eye(40, dtype=int)},
        "has shape [40, 40]: one label for each image is needed, shape [40]",
    ),
    "labels too few": (arrays() | {"test_y": np.zeros(19, int)}, "has shape [19]: one label"),
    "one class": (
        arrays() | {"train_y": np.zeros(40, int), "test_y": np.zeros(20, int)},
        "has 1 class: a classifier needs at least 2",
    ),
    "a gap": (
        arrays() | {"train_y": np.arange(40) % 2 * 2, "test_y": np.zeros(20, int)},
        "class '1' has no training image; add some",
    ),
    "only tested": (
        arrays() | {"test_y": np.full(20, 7)},
        "class '4' has no training image",
    ),
    "one image a class": (arrays(2, 2), "every class has a single training image"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file(case, tmp_path):
    data, message = BAD[case]
    np.savez(tmp_path / "a.npz", **data)
    fails(tmp_path / "a.npz", message)


def test_missing_and_folder(tmp_path):
    fails(tmp_path / "absent.npz", "absent.npz does not exist: give the path of an .npz file")
    (tmp_path / "f.npz").mkdir()
    fails(tmp_path / "f.npz", "f.npz is a folder")


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    objects = np.empty(40, object)
    objects[:] = [Bomb()] * 40
    np.savez(tmp_path / "a.npz", **(arrays() | {"train_y": objects}))
    fails(tmp_path / "a.npz", "train_y of", seed=0)
    fails(tmp_path / "a.npz", "holds Python objects, which are never loaded")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    fails(tmp_path / "b.npz", "cannot be read (File is not a zip file)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", [0.1, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_damage_is_noticed(how, where, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **arrays(400))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    at = int(len(raw) * where)
    if how == "cut":
        raw = raw[:at]
    else:
        raw[at : at + 16] = bytes(b ^ 0xFF for b in raw[at : at + 16])
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_give_a_data_set_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.npz"
    stream = io.BytesIO()
    np.savez(stream, **arrays(20))
    raw = bytearray(stream.getvalue())
    headers = [i for i, b in enumerate(raw) if 32 <= b < 127]  # where mutations are not just noise
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(headers) | st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    said = ""
    try:
        load(path)
    except UsageError as error:
        said = str(error)
    assert "\n" not in said


def test_a_header_that_does_not_parse(tmp_path):
    # An unclosed bracket is no ValueError: NumPy's parser lets a TokenError out.
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for key in ("train_x", "train_y", "test_x", "test_y"):
            archive.writestr(f"{key}.npy", npy_header((1, 8, 8, 3)).replace(b")", b"("))
    fails(tmp_path / "a.npz", "must be an intact file written by numpy.savez")


def npy_header(shape, dtype="|u1"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def test_a_header_that_claims_too_much_is_refused_before_anything_is_allocated(tmp_path):
    for shape, message in (
        ((10**6, 1000, 1000, 3), "would take 2,794.0 GiB, over the limit of 8 GiB"),
        ((10**3, 1000, 1000, 3), "announces 3,000,000,000 bytes but the file holds 0"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("train_x.npy", npy_header(shape))
            for key in ("train_y", "test_x", "test_y"):
                archive.writestr(f"{key}.npy", npy_header((1, 8, 8, 3)) + bytes(192))
        fails(tmp_path / "a.npz", message)


def test_the_limit_is_the_documented_one():
    assert source.MAX_BYTES == 8 * 1024**3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack_images": 0}, "attack_images is 0: it must be at least 1"),
        ({"evaluation_images": -1}, "evaluation_images is -1: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
    ],
)
def test_arguments_out_of_range(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays())
    fails(tmp_path / "a.npz", message, **changes)


# --- the real files, where they are ---------------------------------------------------------------


def real(name, variable):
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / name
    path = Path(os.environ.get(variable, beside))
    if not path.is_file():
        pytest.skip(f"{name} is not here: set {variable} to its path")
    return path


@pytest.mark.slow
def test_real_cifar10():
    d = load(real("cifar10.npz", "HARNESS_CIFAR10_NPZ"), attack_images=5000)
    assert d.classes[0] == "airplane"  # recognised by its labels
    assert d.flip is True
    assert d.mean_255 == (125, 123, 114)  # 255 * (.4914, .4822, .4465)
    assert d.std_255 == pytest.approx((63.0, 62.1, 66.7), abs=0.1)
    assert (len(d.train), len(d.calibration), len(d.evaluation)) == (49_000, 1_000, 10_000)
    for split in (d.calibration, d.attack, d.evaluation):
        assert len(set(np.bincount(split.labels).tolist())) == 1


@pytest.mark.slow
def test_real_svhn():
    d = load(real("svhn_partial.npz", "HARNESS_SVHN_NPZ"), attack_images=1000)
    assert (len(d.train) + len(d.calibration), len(d.evaluation)) == (9_082, 2_001)
    assert d.flip is False
    assert "9,082 train / 2,001 test" in d.note

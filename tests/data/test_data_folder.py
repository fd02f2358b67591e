"""A folder of class folders: pixels survive, the split is by file name, errors name the file."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.data import source
from harness.data.dataset import load_dataset
from harness.records import HarnessError, UsageError


def picture(seed, size=(9, 8), channels=3):
    rng = np.random.default_rng(seed)
    shape = size if channels == 1 else (*size, channels)
    return rng.integers(0, 256, shape, np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def fill(folder, per_class=10, classes=("cat", "dog"), start=0):
    for c, name in enumerate(classes):
        for i in range(per_class):
            save(folder / name / f"{start + i}.png", picture(1000 * c + start + i))
    return folder


def load(folder, **changes):
    return load_dataset(str(folder), **({"attack_images": 4, "seed": 0} | changes))


def contents(*splits):
    return {
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    }


@settings(max_examples=8, deadline=None)
@given(st.integers(3, 12), st.integers(2, 4), st.sampled_from(["png", "bmp", "ppm", "tiff"]))
def test_round_trip_with_an_80_20_split(tmp_path_factory, per_class, classes, kind):
    folder = tmp_path_factory.mktemp("folder") / "pets"
    written = set()
    for c in range(classes):
        for i in range(per_class):
            pixels = picture(100 * c + i)
            save(folder / f"class {c}" / f"{i}.{kind}", pixels)
            written.add((pixels.transpose(2, 0, 1).tobytes(), c))
    d = load(folder)
    assert d.name == "pets"
    assert d.classes == tuple(f"class {c}" for c in range(classes))
    assert contents(d.train, d.calibration, d.evaluation) == written
    parts = [contents(s) for s in (d.train, d.calibration, d.evaluation)]
    assert sum(map(len, parts)) == len(written)
    expected = [round(per_class * 0.2)] * classes
    assert np.bincount(d.evaluation.labels).tolist() == expected
    assert d.flip is False


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    fill(tmp_path / "train", 6)
    fill(tmp_path / "test", 4, start=50)
    d = load(tmp_path)
    assert contents(d.evaluation) == {
        (picture(1000 * c + 50 + i).transpose(2, 0, 1).tobytes(), c)
        for c in range(2)
        for i in range(4)
    }
    assert len(d.train) + len(d.calibration) == 12
    assert d.note.endswith("12 train / 8 test images from class folders.")


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    fill(tmp_path, 6)
    grey = picture(7, channels=1)
    save(tmp_path / "train_me" / "a.png", grey)
    save(tmp_path / "train_me" / "b.png", picture(8, channels=4))
    Image.fromarray(picture(9)).quantize(16).save(tmp_path / "train_me" / "c.gif")
    d = load(tmp_path)
    everything = contents(d.train, d.calibration, d.evaluation)
    assert (np.stack([grey] * 3).tobytes(), 2) in everything
    assert (picture(8, channels=4)[..., :3].transpose(2, 0, 1).tobytes(), 2) in everything


def test_evaluation_does_not_depend_on_seed_place_or_new_files(tmp_path):
    first = load(fill(tmp_path / "a" / "pets"), seed=0)
    shutil.copytree(tmp_path / "a" / "pets", tmp_path / "b" / "pets")
    moved = load(tmp_path / "b" / "pets", seed=1)
    assert first.digests["evaluation"] == moved.digests["evaluation"]
    assert first.fingerprint != moved.fingerprint
    assert load(tmp_path / "b" / "pets", seed=0).fingerprint == first.fingerprint


def test_classes_are_mixed_in_order(tmp_path):
    d = load(fill(tmp_path, 40))
    assert len(set(d.evaluation.labels[:8].tolist())) == 2
    assert len(set(d.train.labels[:8].tolist())) == 2


def test_other_and_hidden_files_are_skipped(tmp_path):
    before = load(fill(tmp_path / "pets")).fingerprint
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "cat" / "._1.png").write_bytes(b"\0")
    (tmp_path / "pets" / ".cache").mkdir()
    (tmp_path / "pets" / "readme.md").write_text("hello")
    assert load(tmp_path / "pets").fingerprint == before


def test_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.data.folder._PROGRESS_EVERY", 8)
    said = []
    load(fill(tmp_path), progress=said.append)
    assert said == ["read 8 of 20 images", "read 16 of 20 images"]


# --- errors: the file, and the remedy ----------------------------------------------------------


def fails(folder, *fragments, kind=UsageError):
    with pytest.raises(kind) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_empty(tmp_path):
    fails(tmp_path, "has no class folders: put the images of each class in FOLDER/<class>/")


@pytest.mark.parametrize("role", ["train", "test"])
def test_only_one_of_train_and_test(role, tmp_path):
    fill(tmp_path / role, 6)
    fails(tmp_path, f"has {role}/<class> only: give both train/<class> and test/<class>")


def test_classes_may_be_called_train_and_car(tmp_path):
    assert load(fill(tmp_path, classes=("car", "train"))).classes == ("car", "train")


def test_classes_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    fails(tmp_path, "has class folders but no image in them: images end in .png")
    fill(tmp_path, classes=("cat",))
    fails(tmp_path, "class 'dog' has no training image; add some, or remove the class")


def test_one_class(tmp_path):
    fails(fill(tmp_path, classes=("cat",)), "has 1 class: a classifier needs at least 2")


def test_a_class_that_is_only_tested(tmp_path):
    fill(tmp_path / "train", 4)
    fill(tmp_path / "test", 3, classes=("cat", "eel"))
    fails(tmp_path, "class 'eel' has no training image, but 3 test images")


def test_too_few_to_test_on(tmp_path):
    fails(fill(tmp_path, 2), "no image is left to test on", "at least 3 images")


def test_unreadable_image_is_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"not a jpeg")
    fails(tmp_path, "dog/broken.jpg cannot be read as an image", "repair or remove it")


def test_truncated_image_is_named(tmp_path):
    fill(tmp_path)
    whole = (tmp_path / "dog" / "3.png").read_bytes()
    (tmp_path / "dog" / "3.png").write_bytes(whole[: len(whole) * 2 // 3])
    fails(tmp_path, "dog/3.png cannot be read as an image")


def test_two_sizes_name_both_files(tmp_path):
    fill(tmp_path)
    save(tmp_path / "dog" / "big.png", picture(1, (20, 30)))
    fails(tmp_path, "30x20", "8x9", "big.png", "resize all images to one size")


def test_too_small(tmp_path):
    for name in ("cat", "dog"):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", picture(i, (7, 8)))
    fails(tmp_path, "7x8 pixels: at least 8x8 are needed")


def test_16_bit_is_refused(tmp_path):
    for name in ("cat", "dog"):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", np.full((8, 8), 1000, np.uint16))
    fails(tmp_path, "does not have 8-bit pixels (mode I;16)")


def test_too_large_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_BYTES", 1000)
    fails(fill(tmp_path), "would take", "over the limit of")


def test_unknown_names(tmp_path):
    fails("cifar100", "data set 'cifar100' unknown: choose digits, cifar10, svhn, a FILE.npz")
    fails("", "data set '' unknown: choose digits")
    fails("x" * 5000, "cannot be read (File name too long): check the path and its rights")
    fails("~nobody-of-this-name/x", "cannot be read (")
    (tmp_path / "a.csv").write_text("1,2")
    fails(tmp_path / "a.csv", "is a file: choose digits")


def test_without_pillow_one_line_says_so(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    fails(tmp_path, "needs Pillow: pip install pillow", kind=HarnessError)

"""CIFAR-10 and SVHN through torchvision's own code, on small files of the real formats, offline.

Only the published checksums and addresses are replaced; parsing, checking and unpacking are real.
"""

import functools
import hashlib
import http.server
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import scipy.io

from harness.data.dataset import load_dataset
from harness.data.official import default_data_dir
from harness.data.torchvision_shim import import_torchvision
from harness.records import HarnessError

NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def datasets():
    import_torchvision()
    from torchvision import datasets

    return datasets


@pytest.fixture
def closed_port():
    """A loopback port that nothing listens on: every connection is refused at once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield s.getsockname()[1]


def load(name, folder, said=None, **changes):
    arguments = {"attack_images": 20, "seed": 0, "data_dir": folder} | changes
    return load_dataset(name, progress=None if said is None else said.append, **arguments)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pickle_of_2009(value):
    """As the published files: protocol 2, NumPy's old module name, integer dtype arguments."""
    raw = pickle.dumps(value, protocol=2)
    return raw.replace(b"numpy._core.", b"numpy.core.").replace(
        b"\x89\x88\x87R", b"K\x00K\x01\x87R"
    )


@pytest.fixture
def server(tmp_path):
    """The address of a loopback server of `tmp_path`/archive: downloads are real, if short."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = str(tmp_path / "archive")
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def cifar10(tmp_path, monkeypatch, datasets, closed_port):
    """A folder with six small batches, and the arrays in them, NCHW."""
    folder = tmp_path / "batches" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 20, 3072), np.uint8)
    labels = np.stack([rng.permutation(np.arange(20) % 10) for _ in range(6)])
    sums = []
    for i, name in enumerate([*(f"data_batch_{b}" for b in range(1, 6)), "test_batch"]):
        entry = {"data": images[i], "labels": labels[i].tolist(), "batch_label": name}
        (folder / name).write_bytes(pickle_of_2009(entry))
        sums.append([name, md5(folder / name)])
    (folder / "batches.meta").write_bytes(pickle_of_2009({"label_names": NAMES}))
    archive = tmp_path / "archive" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": md5(folder / "batches.meta")}
    )
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(
        datasets.CIFAR10, "url", f"http://127.0.0.1:{closed_port}/cifar-10-python.tar.gz"
    )
    pixels = images.reshape(6, 20, 3, 32, 32)
    return tmp_path, pixels, labels


@pytest.fixture
def svhn(tmp_path, monkeypatch, datasets, closed_port):
    """A folder with train_32x32.mat and test_32x32.mat; digit 0 is written as 10, as published."""
    rng = np.random.default_rng(1)
    held = {}
    split_list = {}
    for split, n in (("train", 60), ("test", 30)):
        images = rng.integers(0, 256, (32, 32, 3, n), np.uint8)
        digits = np.arange(n) % 10
        path = tmp_path / f"{split}_32x32.mat"
        published = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": images, "y": published})
        split_list[split] = [f"http://127.0.0.1:{closed_port}/{path.name}", path.name, md5(path)]
        held[split] = (images.transpose(3, 2, 0, 1), digits)
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return tmp_path, held


def contents(*pairs):
    return sorted(
        (image.tobytes(), int(label))
        for images, labels in pairs
        for image, label in zip(images, labels, strict=True)
    )


def test_cifar10_as_published(cifar10):
    folder, pixels, labels = cifar10
    said = []
    d = load("cifar10", folder / "batches", said)
    assert said == []  # nothing was downloaded
    assert d.classes == tuple(NAMES)
    assert d.flip is True
    np.testing.assert_array_equal(d.evaluation.images, pixels[5])
    np.testing.assert_array_equal(d.evaluation.labels, labels[5])
    assert contents(
        (d.train.images, d.train.labels), (d.calibration.images, d.calibration.labels)
    ) == contents((pixels[:5].reshape(-1, 3, 32, 32), labels[:5].ravel()))
    assert np.bincount(d.calibration.labels).tolist() == [1] * 10
    assert np.bincount(d.attack.labels).tolist() == [2] * 10


def test_a_cifar10_archive_placed_by_hand_is_unpacked_offline(cifar10):
    folder, pixels, _ = cifar10
    said = []
    d = load("cifar10", folder / "archive", said)
    np.testing.assert_array_equal(d.evaluation.images, pixels[5])
    assert said == [f"CIFAR-10: fetching what is missing to {folder / 'archive'}"]


def test_cifar10_is_downloaded_once(cifar10, server, monkeypatch, datasets, closed_port):
    folder, pixels, _ = cifar10
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/cifar-10-python.tar.gz")
    said = []
    first = load("cifar10", folder / "new" / "cache", said)
    np.testing.assert_array_equal(first.evaluation.images, pixels[5])
    assert said == [f"CIFAR-10: fetching what is missing to {folder / 'new' / 'cache'}"]
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{closed_port}/x")
    assert load("cifar10", folder / "new" / "cache").fingerprint == first.fingerprint


def test_svhn_as_published(svhn):
    folder, held = svhn
    d = load("svhn", folder)
    assert d.classes == tuple("0123456789")
    assert d.flip is False
    np.testing.assert_array_equal(d.evaluation.images, held["test"][0])
    np.testing.assert_array_equal(d.evaluation.labels, held["test"][1])
    assert d.train.images.flags.c_contiguous
    assert contents(
        (d.train.images, d.train.labels), (d.calibration.images, d.calibration.labels)
    ) == contents(held["train"])


# --- plans -------------------------------------------------------------------------------------


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "title", "images"),
    [
        ("cifar10", "CIFAR-10", {"train": 49_000, "calibration": 1_000, "evaluation": 10_000}),
        ("svhn", "SVHN", {"train": 72_257, "calibration": 1_000, "evaluation": 26_032}),
    ],
)
def test_a_plan_takes_the_published_sizes_of_what_is_not_there(
    name, title, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan connects"))
    said = []
    d = load(name, tmp_path / "nothing", said, planning=True, attack_images=5000)
    assert {role: len(getattr(d, role)) for role in images} == images
    for split in (d.train, d.calibration, d.attack, d.evaluation):
        assert split.images.shape == (len(split), 3, 32, 32)
        assert not split.images.any()
    assert len(d.attack) == 5000
    assert np.bincount(d.attack.labels).tolist() == [500] * 10
    assert (d.name, len(d.classes), d.flip) == (name, 10, name == "cifar10")
    assert said == [
        f"{title} is not yet in {tmp_path / 'nothing'}: planned from its published sizes, as if "
        "nothing were trained; harness run downloads it first"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_what_is_there_is_of_the_real_images(cifar10, svhn):
    for name, folder in (("cifar10", cifar10[0] / "batches"), ("svhn", svhn[0])):
        said = []
        d = load(name, folder, said, planning=True)
        assert d.fingerprint == load(name, folder).fingerprint
        assert said == []


def test_a_plan_unpacks_nothing(cifar10):
    folder, said = cifar10[0] / "archive", []
    before = files(folder)
    d = load("cifar10", folder, said, planning=True)
    assert len(d.evaluation) == 10_000
    assert [line.partition(":")[0] for line in said] == [f"CIFAR-10 is still packed in {folder}"]
    assert said[0].endswith("harness run unpacks it first")
    assert files(folder) == before


@pytest.mark.parametrize("damage", ["batch", "archive", "svhn", "half of svhn"])
def test_a_plan_of_damaged_files_fetches_nothing(
    damage, cifar10, svhn, server, monkeypatch, datasets
):
    """A server is there, and has what would mend them."""
    folder = cifar10[0] / "held"
    if damage == "batch":
        shutil.copytree(cifar10[0] / "batches", folder)
        path = folder / "cifar-10-batches-py" / "data_batch_3"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        folder.mkdir()
        archive = cifar10[0] / "archive" / "cifar-10-python.tar.gz"
        if damage == "archive":
            (folder / archive.name).write_bytes(archive.read_bytes()[:-1])
        else:
            shutil.copy(svhn[0] / "train_32x32.mat", folder)
        if damage == "svhn":
            (folder / "test_32x32.mat").write_bytes(b"no")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/cifar-10-python.tar.gz")
    before = files(folder)
    name = "svhn" if "svhn" in damage else "cifar10"
    title = {"svhn": "SVHN", "cifar10": "CIFAR-10"}[name]
    assert error(name, folder, planning=True).startswith(
        f"{title} is incomplete or damaged in {folder}, and a plan downloads nothing: let harness "
        "run fetch it anew, or put "
    )
    assert files(folder) == before


# --- errors ------------------------------------------------------------------------------------


def error(name, folder, **changes):
    with pytest.raises(HarnessError) as caught:
        load(name, folder, **changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_no_network_is_one_line_that_says_what_to_do(cifar10, datasets):
    folder = cifar10[0] / "nothing"
    assert error("cifar10", folder) == (
        f"CIFAR-10 is not in {folder} and cannot be downloaded, no network (Connection refused): "
        f"put cifar-10-python.tar.gz (from {datasets.CIFAR10.url}) there, name a folder that has "
        "it with --data-dir, or use FILE.npz as the data set"
    )
    assert socket.getdefaulttimeout() is None  # what was set for the download is undone


def test_no_network_svhn(svhn):
    folder = svhn[0] / "nothing"
    text = error("svhn", folder)
    assert text.startswith(f"SVHN is not in {folder} and cannot be downloaded, no network (")
    assert "put train_32x32.mat and test_32x32.mat (from http://" in text


def test_damaged_files_without_network(cifar10, svhn):
    batch = cifar10[0] / "batches" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    assert "CIFAR-10 is incomplete or damaged in" in error("cifar10", cifar10[0] / "batches")
    (svhn[0] / "test_32x32.mat").write_bytes(b"no")
    assert "SVHN is incomplete or damaged in" in error("svhn", svhn[0])


def test_a_download_with_the_wrong_checksum(cifar10, server, monkeypatch, datasets):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/cifar-10-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    assert "is damaged (File not found or corrupted.): delete it" in error(
        "cifar10", cifar10[0] / "new"
    )


def test_a_server_that_no_longer_has_it(cifar10, server, monkeypatch, datasets):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/gone.tar.gz")
    assert "cannot be downloaded, the server answers 404 (File not found): put" in error(
        "cifar10", cifar10[0] / "new"
    )


def test_files_that_pass_the_checksum_but_do_not_parse(svhn, datasets):
    path = svhn[0] / "train_32x32.mat"
    path.write_bytes(b"x" * 1000)
    datasets.SVHN.split_list["train"][2] = md5(path)
    assert "is damaged (" in error("svhn", svhn[0])


def test_a_folder_that_cannot_be_made(cifar10):
    (cifar10[0] / "file").write_text("")
    text = error("cifar10", cifar10[0] / "file" / "sub")
    assert "cannot be kept in" in text
    assert "choose another folder with --data-dir" in text


def test_downloads_go_to_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "uap-edge-harness" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_data_dir() == tmp_path / "home" / ".cache" / "uap-edge-harness" / "data"


# --- the import --------------------------------------------------------------------------------


def test_the_shim_works_in_a_fresh_process_and_twice():
    code = (
        "from harness.data.torchvision_shim import import_torchvision as f; a = f(); b = f();"
        "assert a is b; import torch, gc; gc.collect(); torch.ops.torchvision.nms;"
        "from torchvision import datasets, transforms;"
        "transforms.RandomCrop(4)(torch.zeros(3, 8, 8))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_torchvision_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install torchvision, or use the data sets that do not need it" in error(
        "cifar10", tmp_path
    )


def test_another_failure_of_the_import_is_not_papered_over(monkeypatch, tmp_path):
    def broken(name):
        raise RuntimeError("undefined\nsymbol")

    monkeypatch.setattr("importlib.import_module", broken)
    text = error("svhn", tmp_path)
    assert text.startswith("torchvision fails on import (undefined symbol): install the")

"""Artefact files: the same bytes for the same content, and nothing read that could run."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import artefacts
from harness.artefacts import (
    MAX_PT_BYTES,
    cache_key,
    load_pt,
    read_partial,
    save_pt,
    sha256_file,
    write_atomic,
    write_partial,
)
from harness.records import HarnessError, UsageError


def content() -> dict[str, Any]:
    return {
        "delta": torch.arange(12, dtype=torch.float32).view(3, 2, 2),
        "name": "full",
        "eps": 2.5,
        "meta": {"list": [1, "two", None], "source": "full", 3: (4, 5)},
    }


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_pt(path, what="UAP")
    message = str(caught.value)
    assert "\n" not in message
    assert f"UAP {path}" in message
    return message


def saved_bytes(path: Path, values: dict[str, Any]) -> bytes:
    save_pt(path, values)
    return path.read_bytes()


# --- writing ------------------------------------------------------------------------------------


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.pt"
    save_pt(path, content())
    loaded = load_pt(path, what="UAP")
    delta = loaded.pop("delta")
    expected = content()
    assert torch.equal(delta, expected.pop("delta"))
    assert loaded == expected
    assert os.listdir(path.parent) == ["a.pt"]  # noqa: PTH208 - hidden files too


def test_the_same_content_gives_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    first = saved_bytes(tmp_path / "a.pt", content())
    assert saved_bytes(tmp_path / "b.pt", content()) == first
    assert sha256_file(tmp_path / "a.pt") == sha256_file(tmp_path / "b.pt")
    changed = content() | {"eps": 2.75}
    assert saved_bytes(tmp_path / "b.pt", changed) != first


def test_bytes_do_not_depend_on_which_equal_objects_hold_the_content(tmp_path: Path) -> None:
    one = str(b"full", "ascii")
    shared, separate = [1, 2], [[1, 2], [1, 2]]
    first = saved_bytes(tmp_path / "a.pt", {"a": one, "b": one, "c": [shared, shared]})
    other = {"a": str(b"full", "ascii"), "b": str(b"full", "ascii"), "c": separate}
    assert saved_bytes(tmp_path / "b.pt", OrderedDict(other)) == first


def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefacts.os, "fsync", fail)
    with pytest.raises(HarnessError, match="No space left on device") as caught:
        write_atomic(path, b"new")
    assert str(path) in str(caught.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_an_interrupt_while_writing_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.bin", b"new")
    assert list(tmp_path.iterdir()) == []


def test_content_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    old = saved_bytes(path, content())
    with pytest.raises(Exception, match="pickle"):
        save_pt(path, {"f": lambda: None})
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert path.read_bytes() == old


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HarnessError, match=r"cannot write .*check permissions and space"):
        write_atomic(tmp_path / "file" / "a.bin", b"new")


# --- reading what is not ours -------------------------------------------------------------------


class RunsWhenUnpickled:
    """Creates a file when unpickled by anything that trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("wrap", ["bare", "nested", "key"])
def test_pickled_code_is_refused_and_not_executed(tmp_path: Path, wrap: str) -> None:
    victim, path = tmp_path / "created", tmp_path / "a.pt"
    code = RunsWhenUnpickled(victim)
    torch.save({"bare": code, "nested": {"delta": [code]}, "key": {code: 1}}[wrap], path)
    assert "was not executed" in refused(path)
    assert not victim.exists()
    if wrap == "bare":
        torch.load(path, weights_only=False)
    assert victim.exists() == (wrap == "bare")  # the file was armed


@pytest.mark.parametrize("size", ["empty", "text", "folder", "missing"])
def test_what_is_no_archive_is_refused(tmp_path: Path, size: str) -> None:
    path = tmp_path / "a.pt"
    if size == "folder":
        path.mkdir()
    elif size != "missing":
        path.write_bytes(b"" if size == "empty" else b"weights, honestly\n" * 50)
    assert ("No such file" if size == "missing" else "is not a .pt file") in refused(path)


def test_the_old_format_without_checksums_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    assert "is not a .pt file" in refused(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    whole = saved_bytes(path, content())
    for length in (1, 4, 30, 64, 100, *range(200, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut off" in refused(path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path: Path = tmp_path_factory.mktemp("whole") / "a.pt"
    return saved_bytes(path, content())


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(
    tmp_path: Path, whole_file: bytes, position: float, flip: int
) -> None:
    damaged = bytearray(whole_file)
    damaged[int(position * len(damaged))] ^= flip
    path = tmp_path / "damaged.pt"
    path.write_bytes(damaged)
    try:
        loaded = load_pt(path, what="UAP")
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - some bytes (dates, padding) mean nothing
        return
    delta, expected = loaded.pop("delta"), content()
    assert torch.equal(delta, expected.pop("delta"))
    assert loaded == expected


def test_a_changed_value_fails_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    whole = bytearray(saved_bytes(path, content()))
    numbers = torch.arange(12, dtype=torch.float32).numpy().tobytes()
    whole[whole.index(numbers) + 17] ^= 1
    path.write_bytes(whole)
    assert "checksum of" in refused(path)


def test_a_tensor_that_claims_to_be_a_folder_is_refused(tmp_path: Path) -> None:
    """PyTorch would read nothing for it, and return whatever was in memory as its values."""
    path = tmp_path / "a.pt"
    whole = bytearray(saved_bytes(path, content()))
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"archive/data/0"))
    whole[entry + 38] |= 0x10  # external attributes: folder
    path.write_bytes(whole)
    assert "'archive/data/0' is a folder" in refused(path)


def test_a_damaged_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(i * i % 251 for i in range(3000)))
    whole = bytearray(path.read_bytes())
    for position in range(40, 160, 7):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        refused(path)


def test_an_archive_that_claims_to_unpack_to_too_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 1000)
    whole = bytearray(path.read_bytes())
    directory = whole.rindex(b"PK\x01\x02")
    whole[directory + 24 : directory + 28] = (MAX_PT_BYTES + 1).to_bytes(4, "little")
    path.write_bytes(whole)

    def never(self: zipfile.ZipFile) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", never)
    assert "would unpack to 2048 MiB" in refused(path)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with path.open("wb") as file:
        file.truncate(MAX_PT_BYTES + 1)  # sparse: takes no space
    assert "at most 2048 MiB" in refused(path)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(2), "text", 3, None])
def test_what_is_no_dictionary_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.pt")
    assert f"holds a {type(value).__name__}, not a dictionary" in refused(tmp_path / "a.pt")


# --- unfinished work and keys -------------------------------------------------------------------


def test_unfinished_work_is_read_back_by_its_key_only(tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    assert read_partial(path, key="mine") is None
    write_partial(path, key="mine", state={"epoch": 3})
    assert read_partial(path, key="mine") == {"epoch": 3}
    assert read_partial(path, key="another") is None


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "not a state"])
def test_damaged_unfinished_work_is_ignored(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "p.pt"
    write_partial(path, key="mine", state={"epoch": 3})
    whole = path.read_bytes()
    if damage == "not a state":
        save_pt(path, {"key": "mine", "state": [3]})
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-30], "text": b"text"}[damage])
    assert read_partial(path, key="mine") is None


def test_a_key_depends_on_every_input() -> None:
    base: dict[str, Any] = {"stage": "train", "version": 1, "lr": 0.1, "config": {"a": [1, 2]}}
    others = [
        base | {"stage": "craft"},
        base | {"version": 2},
        base | {"lr": 0.2},
        base | {"lr": None},
        base | {"config": {"a": [2, 1]}},
        base | {"config": {"b": [1, 2]}},
        base | {"more": None},
        {name: value for name, value in base.items() if name != "lr"},
    ]
    keys = [cache_key(**inputs) for inputs in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_a_key_ignores_order_and_kind_of_sequence() -> None:
    assert cache_key("s", 1, a=(1, 2), b="x") == cache_key("s", 1, b="x", a=[1, 2])


@settings(deadline=None, max_examples=50)
@given(*[st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3)] * 2)
def test_keys_are_equal_only_when_inputs_are(first: dict[str, Any], second: dict[str, Any]) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (cache_key("s", 1, config=first) == cache_key("s", 1, config=second)) == same


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-2's first example
    assert sha256_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")

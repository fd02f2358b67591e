from __future__ import annotations

import os
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.emulator_board import BOARDS
from devices.profiles import (
    Profile,
    _toml,
    add_profile,
    built_in,
    profiles,
    remove_profile,
    stands_for,
    user_file,
)
from devices.registry import device_named, how_it_runs, profile_named
from harness.records import HarnessError, UsageError


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return user_file()


def test_the_boards_that_come_with_the_harness() -> None:
    known = built_in()
    assert next(iter(known)) == "local"
    assert set(known) == {"local", "rpi4", "rpi5", "jetson", "arm64"}
    assert known["rpi4"].emulate == "cortex-a72"
    assert [name for name, profile in known.items() if profile.emulated] == ["rpi4", "rpi5"]
    assert {p.emulate for p in known.values() if p.emulate} == set(BOARDS)
    for profile in known.values():
        assert profile.host is None
        assert profile.budget_s is None  # hardware takes the time it needs


def test_one_own_board_takes_a_built_in_one_s_place(mine: Path) -> None:
    profile, replaced = add_profile(mine, "rpi4", host="pi@board", budget_s=600.0)
    assert not replaced
    expected = replace(built_in()["rpi4"], host="pi@board", budget_s=600.0)
    assert profile == profiles(mine)["rpi4"] == profile_named("rpi4") == expected
    assert not profile.emulated
    assert how_it_runs(profile) == "over SSH: pi@board"
    changed, replaced = add_profile(mine, "rpi4", host="pi@other", port=2222)
    assert replaced
    assert (changed.host, changed.port, changed.budget_s) == ("pi@other", 2222, 600.0)
    assert changed == profiles(mine)["rpi4"]  # what was not given again stayed
    remove_profile(mine, "rpi4")
    assert profiles(mine) == built_in()
    assert device_named("rpi4").emulated


def test_what_was_set_once_can_be_taken_back(mine: Path) -> None:
    mine.parent.mkdir(parents=True)
    others = '# the other\n[attic]\nhost = "attic"\nport = 22\n'
    mine.write_text(others)
    add_profile(mine, "porch", host="porch", port=2222, cooling_c=70.0, like="rpi5")
    changed, replaced = add_profile(mine, "porch", host="porch", unset={"port", "like"})
    assert replaced
    # As if neither had ever been given.
    assert tomllib.loads(mine.read_text())["porch"] == {"host": "porch", "cooling_c": 70.0}
    assert changed == profiles(mine)["porch"]
    assert changed == replace(
        built_in()["arm64"], name="porch", title=changed.title, host="porch", cooling_c=70.0
    )
    assert mine.read_text().startswith(others)
    # Set or not, it is not set afterwards.
    again, _ = add_profile(mine, "porch", host="porch", unset={"port", "threads"})
    assert again == changed
    new, replaced = add_profile(mine, "cellar", host="cellar", unset={"port"})
    assert (new.port, replaced) == (None, False)


def test_unsetting_mends_a_value_that_the_user_got_wrong(mine: Path) -> None:
    mine.parent.mkdir(parents=True)
    mine.write_text('[porch]\nhost = "porch"\nport = 0\n')
    with pytest.raises(UsageError, match="correct it"):
        add_profile(mine, "porch", host="porch")
    add_profile(mine, "porch", host="porch", unset={"port"})
    assert profiles(mine)["porch"].port is None


def test_another_name_is_like_any_board_unless_it_says(mine: Path) -> None:
    plain, _ = add_profile(mine, "porch", host="porch")
    assert (plain.threads, plain.emulate) == (4, None)
    hot, _ = add_profile(mine, "attic", host="pi@fe80::1%eth0", like="rpi5")
    assert (hot.cooling_c, hot.emulated) == (60.0, False)
    assert list(profiles(mine)) == [*built_in(), "porch", "attic"]


def test_only_a_board_that_somebody_named_is_stood_for(mine: Path) -> None:
    add_profile(mine, "rpi4", host="pi@board")
    add_profile(mine, "attic", host="attic", like="rpi5")
    add_profile(mine, "porch", host="porch")
    boards = {name: stands_for(mine, name) for name in ("rpi4", "attic", "porch", "local")}
    known = built_in()
    assert boards == {"rpi4": known["rpi4"], "attic": known["rpi5"], "porch": None, "local": None}


def test_what_the_user_wrote_stays(mine: Path) -> None:
    mine.parent.mkdir(parents=True)
    written = '# my boards\n[porch]\nhost = "pi@porch" # the old one\nthreads = 2\n\n# the other\n'
    mine.write_text(written + '[attic]\nhost = "attic"\n')
    add_profile(mine, "cellar", host="cellar")
    remove_profile(mine, "attic")
    assert mine.read_text().startswith(written)
    assert profiles(mine)["porch"].threads == 2
    assert "attic" not in profiles(mine)
    assert profiles(mine)["cellar"].host == "cellar"


def test_a_file_only_its_author_understands_is_left_alone(mine: Path) -> None:
    mine.parent.mkdir(parents=True)
    text = 'porch = { host = "pi@porch" }\n'
    mine.write_text(text)
    assert profiles(mine)["porch"].host == "pi@porch"
    with pytest.raises(UsageError, match="edit it by hand"):
        remove_profile(mine, "porch")
    assert mine.read_text() == text
    add_profile(mine, "attic", host="attic")
    assert list(tomllib.loads(mine.read_text())) == ["porch", "attic"]


def test_a_link_into_a_folder_of_dotfiles_stays_a_link(mine: Path, tmp_path: Path) -> None:
    mine.parent.mkdir(parents=True)
    real = tmp_path / "dotfiles.toml"
    real.write_text("")
    mine.symlink_to(real)
    add_profile(mine, "porch", host="porch")
    assert mine.is_symlink()
    assert "porch" in real.read_text()


def test_many_may_add_at_once(mine: Path) -> None:
    names = [f"board{index}" for index in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: add_profile(mine, name, host=name), names))
    assert set(names) < set(profiles(mine))
    assert {path.name for path in mine.parent.iterdir()} == {"devices.toml", ".devices.toml.lock"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "-oProxyCommand=touch x"}, "host"),
        ({"host": "pi@board; reboot"}, "host"),
        ({"host": "pi@bo\nard"}, "host"),
        ({"host": ""}, "host"),
        ({"host": "pi@127.0.0.1:22"}, "use --port 22"),
        ({"host": "b", "port": 0}, "port"),
        ({"host": "b", "port": True}, "port"),
        ({"host": "b", "threads": 0}, "threads"),
        ({"host": "b", "budget_s": -1.0}, "budget_s"),
        ({"host": "b", "budget_s": float("nan")}, "budget_s"),
        ({"host": "b", "cooling_c": 500.0}, "cooling_c"),
        ({"host": "b", "energy_sensor": "sensor"}, "energy_sensor"),
        ({"host": "b", "remote_root": "../../etc"}, "remote_root"),
        ({"host": "b", "remote_root": "/"}, "remote_root"),
        ({"host": "b", "emulate": "pentium"}, "cortex-a72"),
        ({"host": "b", "like": "local"}, "rpi4"),
        ({"host": "b", "colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(mine: Path, settings, said: str) -> None:
    with pytest.raises(UsageError) as error:
        add_profile(mine, "porch", **settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not mine.exists()


@pytest.mark.parametrize("name", ["local", "Porch", "a b", "../x", "-x", "", "x" * 50, "a.b"])
def test_bad_names(mine: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        add_profile(mine, name, host="board")
    assert not mine.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[porch", "correct or remove it"),
        ("\x00", "correct or remove it"),
        ("threads = 3", r"'threads' must be a table"),
        ('[porch]\nhots = "x"', "unknown key 'hots'"),
        ("[porch]\nhost = 7", "host must be"),
        ('[porch]\nlike = ["rpi4"]', "like"),
        ("[porch]\nemulate = [1]", "emulate must be"),
        ("[local]\nthreads = 4", "local is this machine"),
    ],
)
def test_a_damaged_file_is_named_and_this_machine_still_works(
    mine: Path, text: str, said: str
) -> None:
    mine.parent.mkdir(parents=True)
    mine.write_text(text)
    with pytest.raises(UsageError, match=said) as error:
        device_named("rpi4")
    assert str(mine) in str(error.value)
    assert "\n" not in str(error.value)
    assert device_named("local").name == "local"


def test_removing_what_is_not_there(mine: Path) -> None:
    with pytest.raises(UsageError, match="built in"):
        remove_profile(mine, "rpi4")
    with pytest.raises(UsageError, match="'porch'; there are: none"):
        remove_profile(mine, "porch")
    assert not mine.parent.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(mine: Path) -> None:
    mine.parent.parent.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        add_profile(mine, "porch", host="porch")


def test_a_relative_base_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_file() == tmp_path / ".config" / "uap-edge-harness" / "devices.toml"


def test_a_board_without_a_host_cannot_be_opened(mine: Path) -> None:
    for name in ("jetson", "arm64"):
        assert how_it_runs(profile_named(name)) == "no host yet"
        with pytest.raises(UsageError, match=f"harness devices add {name} --host"):
            device_named(name)


@given(st.text().filter(str.isprintable))
def test_any_printable_text_survives_toml(text: str) -> None:
    assert tomllib.loads(f"x = {_toml(text)}")["x"] == text


def test_a_name_of_thousands_of_characters_is_shortened(mine: Path) -> None:
    name = "x" * 5000
    for use in (
        lambda: add_profile(mine, name, host="board"),
        lambda: add_profile(mine, "porch", host=name),
        lambda: add_profile(mine, "porch", host="board", like=name),
        lambda: remove_profile(mine, name),
        lambda: device_named(name),
    ):
        with pytest.raises(UsageError) as error:
            use()
        assert len(str(error.value)) < 200


def test_a_profile_checks_itself() -> None:
    with pytest.raises(HarnessError, match="title"):
        Profile(name="x", title="two\nlines")

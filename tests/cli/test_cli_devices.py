"""`harness devices`: the user's own boards, and the one that is emulated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import Outcome, error_line, succeeded

from harness.cli.duration_type import DURATION

Run = Callable[..., Outcome]
FIELDS = {
    *("name", "title", "host", "port", "threads", "budget_s", "cooling_c", "emulate"),
    *("energy_sensor", "remote_root", "own", "emulated", "runs"),
}
FACTS = {"arch", "cpu", "cores", "os", "python", "runtime_version", "extra"}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, of a user who has none yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "uap-edge-harness" / "devices.toml"


def listed(run: Run, tmp_path: Path) -> dict[str, dict[str, object]]:
    rows = json.loads(succeeded(run("devices", "list", "--json", cwd=tmp_path)).out)
    assert all(set(row) == FIELDS for row in rows)
    return {row["name"]: row for row in rows}


def test_the_list(run: Run, tmp_path: Path, own: Path) -> None:
    rows = listed(run, tmp_path)
    assert list(rows) == ["local", "arm64", "jetson", "rpi4", "rpi5"]
    assert {name for name, row in rows.items() if row["emulated"]} == {"rpi4", "rpi5"}
    people = succeeded(run("devices", "list", cwd=tmp_path)).out
    for words in ("this machine", "no host yet", "emulated cortex-a72", "built in"):
        assert words in " ".join(people.split())
    assert not own.parent.exists()


def test_a_board_comes_and_goes(run: Run, tmp_path: Path, own: Path) -> None:
    command = ("devices", "add", "rpi4", "--host", "pi@board", "--port", 2222, "--budget", "10m")
    added = succeeded(run(*command, "--threads", 3, "--json", cwd=tmp_path))
    row = listed(run, tmp_path)["rpi4"]
    assert json.loads(added.out) == row
    assert (row["host"], row["port"], row["budget_s"], row["threads"]) == ("pi@board", 2222, 600, 3)
    assert (row["own"], row["emulated"], row["runs"]) == (
        True,
        False,
        "over SSH: pi@board, port 2222",
    )
    assert str(own) in added.err
    assert "next: harness devices bootstrap rpi4" in added.err
    assert "your own" in succeeded(run("devices", "list", cwd=tmp_path)).out
    again = succeeded(run("devices", "add", "rpi4", "--host", "pi@other", cwd=tmp_path))
    assert "changed rpi4" in again.err
    now = next(line for line in again.err.splitlines() if line.startswith("now set: "))
    settings = {"host pi@other", "port 2222", "threads 3", "budget_s 600.0"}
    assert set(now.removeprefix("now set: ").split(", ")) == settings
    assert listed(run, tmp_path)["rpi4"] == {
        **row,
        "host": "pi@other",
        "runs": "over SSH: pi@other, port 2222",
    }
    assert str(own) in succeeded(run("devices", "remove", "rpi4", cwd=tmp_path)).err
    assert listed(run, tmp_path)["rpi4"]["emulated"]


def test_every_option_can_be_taken_back(run: Run, tmp_path: Path, own: Path) -> None:
    settings = {"port": 2222, "threads": 3, "budget": "10m", "cooling": 50, "like": "rpi5"}
    settings |= {"energy-sensor": "/sys/power", "remote-root": "here"}
    command = ("devices", "add", "porch", "--host", "porch")
    succeeded(run(*command, cwd=tmp_path))
    plain = listed(run, tmp_path)["porch"]
    given = [word for option, value in settings.items() for word in (f"--{option}", value)]
    succeeded(run(*command, *given, cwd=tmp_path))
    before = listed(run, tmp_path)["porch"]
    one = succeeded(run(*command, "--unset", "port", cwd=tmp_path))
    assert "now set: host porch, like rpi5, threads 3, budget_s 600.0, cooling_c 50.0" in one.err
    after = {**before, "port": None, "runs": "over SSH: porch"}
    assert listed(run, tmp_path)["porch"] == after
    rest = [word for option in settings for word in ("--unset", option)]
    succeeded(run(*command, *rest, cwd=tmp_path))
    assert listed(run, tmp_path)["porch"] == plain
    assert own.read_text() == '[porch]\nhost = "porch"\n'


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("add porch --host board --unset host", "'host' is not one of 'port', 'threads'"),
        ("add porch --host board --port 22 --unset port", "--port and --unset port exclude"),
        ("add porch --host board --budget 9m --unset budget", "--budget and --unset budget exc"),
        ("add porch", "Missing option '--host'"),
        ("add porch --host=-oProxyCommand=x", "host must be"),
        ("add porch --host pi@a;b", "host must be"),
        ("add porch --host board --port 0", "--port"),
        ("add porch --host board --threads many", "--threads"),
        ("add porch --host board --budget 10d", "write 90s, 10m or 1h"),
        ("add porch --host board --budget 0", "write 90s, 10m or 1h"),
        ("add porch --host board --cooling 900", "cooling_c"),
        ("add porch --host board --remote-root ../..", "remote_root"),
        ("add porch --host board --energy-sensor power", "energy_sensor"),
        ("add porch --host board --like pc", "choose from arm64, jetson, rpi4, rpi5"),
        ("add local --host board", "local is this machine"),
        ("add ../x --host board", "lower-case letters"),
        ("remove porch", "there are: none"),
        ("remove rpi4", "rpi4 is built in"),
        ("probe jetson", "harness devices add jetson --host"),
        ("bootstrap jetson", "harness devices add jetson --host"),
        ("bootstrap rpi99 --json", "unknown device 'rpi99'"),
    ],
)
def test_bad_input_is_one_line(
    command: str, said: str, run: Run, tmp_path: Path, own: Path
) -> None:
    outcome = run("devices", *command.split(), cwd=tmp_path)
    assert outcome.code == 2
    assert said in error_line(outcome)
    assert outcome.out == ""
    assert not own.exists()


def test_a_damaged_file_of_devices(run: Run, tmp_path: Path, own: Path) -> None:
    own.parent.mkdir(parents=True)
    own.write_text('[porch]\nhost = "pi@porch"\nthread = 2\n')
    for command in ("devices list", "devices probe rpi4", "attack-device --device rpi4 --uap x.pt"):
        line = error_line(run(*command.split(), cwd=tmp_path))
        assert str(own) in line
        assert "unknown key 'thread'" in line
    succeeded(run("devices", "probe", "local", cwd=tmp_path))
    succeeded(run("devices", "remove", "porch", cwd=tmp_path))
    assert own.read_text() == ""


def test_doctor_knows_the_devices(run: Run, tmp_path: Path, own: Path) -> None:
    succeeded(run("devices", "add", "porch", "--host", "pi@porch", cwd=tmp_path))
    findings = json.loads(run("doctor", "--json", cwd=tmp_path).out)
    texts = {row["subject"]: row["text"] for row in findings}
    assert "pi@porch" in texts["device porch"]
    assert "emulated" in texts["device rpi4"]
    own.write_text("[porch")
    findings = json.loads(run("doctor", "--json", cwd=tmp_path).out)
    assert [row["level"] for row in findings if row["subject"] == "devices"] == ["problem"]


def test_probing_this_machine(run: Run, tmp_path: Path) -> None:
    facts = json.loads(succeeded(run("devices", "probe", "local", "--json", cwd=tmp_path)).out)
    assert facts.keys() == FACTS
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "runtime_version: " in succeeded(run("devices", "probe", "local", cwd=tmp_path)).out
    succeeded(run("devices", "bootstrap", "local", cwd=tmp_path))


@pytest.mark.arm
@pytest.mark.usefixtures("emulated_rpi4")
def test_the_emulated_board(run: Run, tmp_path: Path) -> None:
    outcome = succeeded(run("devices", "bootstrap", "rpi4", "--json", cwd=tmp_path))
    facts = json.loads(outcome.out)
    assert facts.keys() == FACTS
    assert (facts["arch"], facts["cpu"]) == ("aarch64", "Cortex-A72")
    assert "predictions are real ARM, latency is null" in outcome.err
    assert listed(run, tmp_path)["rpi4"]["runs"] == "emulated cortex-a72, set up"


@pytest.mark.arm
@pytest.mark.usefixtures("emulated_rpi4")
def test_attacking_a_variant_on_the_emulated_board(run: Run, workspace: Path) -> None:
    """The command of the design, with no board configured: real Arm predictions, null latency."""
    command = ("attack-device", "--uap", "cache/full_eps10.pt", "--model", "q2", "--json")
    on_arm = succeeded(run(*command, "--device", "rpi4", cwd=workspace))
    rows = json.loads(on_arm.out)
    assert {row["uap_source"] for row in rows} == {None, "full"}
    for row in rows:
        assert (row["device"], row["machine"], row["emulated"]) == ("rpi4", "aarch64", True)
        assert row["latency_p50_ms"] is None
        assert row["torch_agreement"] == 1.0  # integers: the same on every processor
    assert on_arm.err.count("predictions are real ARM, latency is null") == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h", 3600), ("1.5m", 90), ("7", 7)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.arm
@pytest.mark.usefixtures("emulated_rpi4")
def test_instructions_have_a_column_of_their_own(run: Run, workspace: Path) -> None:
    command = ("attack-device", "--uap", "cache/full_eps4.pt", "--model", "q2", "--json")
    counted = run(*command, "--device", "rpi4", "--instructions", cwd=workspace)
    if counted.code == 1 and "count" in counted.err:
        pytest.skip(counted.err.splitlines()[-1])
    rows = json.loads(succeeded(counted).out)
    counts = {row["instructions"] for row in rows}
    assert len(counts) == 1
    assert counts.pop() > max(row["macs"] for row in rows) / 16
    assert {row["latency_p50_ms"] for row in rows} == {None}
    # Counted once; on a device that is not emulated there is nothing to count.
    again = succeeded(run(*command, "--device", "rpi4", "--instructions", cwd=workspace))
    assert "count instructions" not in again.err
    refused = run(*command, "--device", "local", "--instructions", cwd=workspace)
    assert refused.code == 2
    assert "not emulated" in refused.err

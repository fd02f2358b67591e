"""The user's own commands against a board over SSH, whose connection is killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cli_cases import EVALUATION_IMAGES, Outcome, environment, harness, succeeded

pytest.importorskip("asyncssh")  # before ssh_boards, which needs it

from ssh_boards import OpenSsh, User

from harness.records import LATENCY_PROCESSES
from harness.store import open_store

if TYPE_CHECKING:
    from devices.emulated import EmulatedDevice

UAP = "cache/full_eps4.pt"


@pytest.fixture(scope="module")
def emulated_command(emulated_rpi4: EmulatedDevice) -> list[str]:
    """The emulated board's python3, found while HOME is still the one it was set up in."""
    from devices.emulated import emulated_python

    return emulated_python(emulated_rpi4.profile)


@pytest.fixture
def emulated_board(
    emulated_command: list[str], ssh_user: User, tmp_path: Path
) -> Iterator[OpenSsh]:
    """A real OpenSSH server whose python3 is the emulated aarch64 one."""
    server = OpenSsh(tmp_path / "board", ssh_user, emulated_command)
    server.start()
    yield server
    server.stop()


def chunks(server: OpenSsh) -> list[list[dict[str, Any]]]:
    """The whole lines of every journal on the board, without the key."""
    paths = sorted((server.root / "journal").glob("*.jsonl"))
    return [
        [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)[1:]
            if "\n" in line
        ]
        for path in paths
    ]


def attack(server: OpenSsh, root: Path, *, cut_after: int) -> Outcome:
    """`harness attack-device --device board`; the connection is killed after some chunks."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "harness", "attack-device", "--device", "board"),
            *("--uap", UAP, "--model", "q2", "--latency", "none", "--json"),
        ],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        if sum(map(len, chunks(server))) >= cut_after:
            server.cut()
            break
        time.sleep(0.02)
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


def small_batches(root: Path) -> None:
    """Many requests and many chunks, so that something is in the middle."""
    path = root / "harness.toml"
    text = path.read_text()
    assert "[eval]\n" in text
    path.write_text(text.replace("[eval]\n", "[eval]\nbatch_size = 4\n"))


def check_end_to_end(server: OpenSsh, root: Path, *, machine: Callable[[str], bool]) -> None:
    small_batches(root)
    succeeded(harness("devices", "add", "board", "--host", "board", cwd=root))
    outcome = succeeded(attack(server, root, cut_after=1))
    assert "connecting again" in outcome.err
    assert "connected again" in outcome.err
    rows = json.loads(outcome.out)
    assert {row["uap_source"] for row in rows} == {None, "full"}
    for row in rows:
        assert (row["device"], row["n"]) == ("board", EVALUATION_IMAGES)
        assert machine(row["machine"])
    journals = chunks(server)
    assert len(journals) == 2  # clean and attacked
    for journal in journals:
        images = [c["start"] + i for c in journal for i in range(len(c["predictions"]))]
        assert sorted(images) == list(range(EVALUATION_IMAGES))  # each exactly once
    assert server.left_over() == []


def test_the_users_command_survives_a_killed_connection(openssh: OpenSsh, workspace: Path) -> None:
    check_end_to_end(openssh, workspace, machine=lambda _machine: True)


@pytest.mark.arm
def test_the_users_command_on_an_emulated_board(emulated_board: OpenSsh, workspace: Path) -> None:
    check_end_to_end(emulated_board, workspace, machine=lambda machine: machine == "aarch64")


def rebooting(server: OpenSsh, boot_id: str) -> None:
    """Have the board's runner say of its boot what the expression `boot_id` gives."""
    real = (server.programs / "python3").read_text().splitlines()[1].removeprefix("exec ")
    real = real.removesuffix(' "$@"')
    patched = server.programs / "patched.py"
    path = 'ROOT / "proc/sys/kernel/random/boot_id"'
    patched.write_text(
        "import sys, uuid, pathlib\n"
        "sys.argv = sys.argv[1:]\n"
        f"text = pathlib.Path(sys.argv[0]).read_text().replace('read_text({path})', {boot_id!r})\n"
        "exec(compile(text, 'runner', 'exec'), {'__name__': '__main__', 'uuid': uuid})\n"
    )
    server.program(
        "python3", f'case "$1" in */files/*) exec {real} {patched} "$@";; esac\nexec {real} "$@"'
    )


def latency_boots(root: Path) -> list[str]:
    """The boot of every latency process in the store."""
    if not (root / "results.db").exists():
        return []
    with open_store(root / "results.db", create=False) as store:
        processes = [p for stored in store.latencies() for p in stored.run.processes]
    return [str(process.telemetry[0]["boot_id"]) for process in processes]


def test_latency_begins_again_after_a_reboot(openssh: OpenSsh, workspace: Path) -> None:
    boot = openssh.home / "boot_id"
    boot.write_text("first")
    rebooting(openssh, f"read_text(Path({str(boot)!r}))")
    succeeded(harness("devices", "add", "board", "--host", "board", cwd=workspace))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "harness", "attack-device", "--device", "board"),
            *("--uap", UAP, "--model", "q2", "--latency", "quick", "--json"),
        ],
        cwd=workspace,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not latency_boots(workspace):
        time.sleep(0.05)
    boot.write_text("second")
    openssh.cut()
    out, err = process.communicate(timeout=300)
    outcome = succeeded(Outcome(process.returncode, out, err))
    boots = latency_boots(workspace)
    assert boots.count("first") >= 1
    assert boots.count("second") == LATENCY_PROCESSES
    verdicts = {row["latency_verdict"] for row in json.loads(outcome.out)}
    assert verdicts <= {"VALID", "UNSTABLE"}


def test_a_board_that_keeps_rebooting_has_no_valid_latency(
    openssh: OpenSsh, workspace: Path
) -> None:
    rebooting(openssh, "uuid.uuid4().hex")
    succeeded(harness("devices", "add", "board", "--host", "board", cwd=workspace))
    arguments = ("--uap", UAP, "--model", "q2", "--latency", "quick")
    outcome = harness("attack-device", "--device", "board", *arguments, cwd=workspace)
    assert outcome.code == 4
    assert "rebooted, or changed, 3 times" in outcome.err
    rows = json.loads(succeeded(harness("results", "--json", cwd=workspace)).out)
    on_board = [row for row in rows if row["device"] == "board"]
    assert {row["latency_verdict"] for row in on_board} == {"INVALID"}


def test_a_board_that_stays_away_ends_the_command_with_5(openssh: OpenSsh, workspace: Path) -> None:
    succeeded(harness("devices", "add", "board", "--host", "board", cwd=workspace))
    openssh.stop()
    outcome = harness(
        "attack-device", "--device", "board", "--uap", UAP, "--model", "q2", cwd=workspace
    )
    assert outcome.code == 5
    assert outcome.out == ""
    assert "cannot reach board" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_changed_host_key_ends_the_command_with_5(
    openssh: OpenSsh, ssh_user: User, workspace: Path
) -> None:
    import asyncssh

    succeeded(harness("devices", "add", "board", "--host", "board", cwd=workspace))
    ssh_user.trust(openssh.port, asyncssh.generate_private_key("ssh-ed25519"))
    outcome = harness("devices", "probe", "board", cwd=workspace)
    assert outcome.code == 5
    assert outcome.err.count("\n") == 1
    assert "ssh-keygen -R" in outcome.err


def test_a_board_is_probed(openssh: OpenSsh, workspace: Path) -> None:
    succeeded(harness("devices", "add", "board", "--host", "board", cwd=workspace))
    facts = json.loads(succeeded(harness("devices", "probe", "board", "--json", cwd=workspace)).out)
    assert facts["extra"]["pointer_bits"] == 64


def test_a_board_is_set_up(openssh: OpenSsh, workspace: Path) -> None:
    (openssh.root / "environment.json").unlink()
    succeeded(harness("devices", "add", "board", "--host", "board", cwd=workspace))
    outcome = succeeded(harness("devices", "bootstrap", "board", cwd=workspace))
    assert "its own python3 has onnxruntime" in outcome.err
    assert (openssh.root / "environment.json").exists()

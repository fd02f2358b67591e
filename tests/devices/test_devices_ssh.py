"""A board behind a real OpenSSH server: what works, what is refused, what survives."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("asyncssh")  # before ssh_boards, which needs it

import asyncssh
from ssh_boards import LIMITS, OpenSsh, User, board_profile, descendants, device, free_port

from devices.local import RUNNER
from devices.perturbation import perturb
from devices.profiles import built_in
from devices.session import DeviceSession
from harness.records import DeviceUnreachable, HarnessError, UsageError

QUICK = {"warmup_runs": 1, "warmup_seconds": 0, "min_runs": 6, "min_seconds": 0}


def opened(**options: Any) -> None:
    with device(**options).open():
        pass


def evaluated(server: OpenSsh) -> list[list[int]]:
    """For every journal on the board, each image that was run, as often as it was."""
    journals = []
    for path in sorted((server.root / "journal").glob("*.jsonl")):
        chunks = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        journals.append([c["start"] + i for c in chunks for i in range(len(c["predictions"]))])
    return journals


def runners(server: OpenSsh) -> list[int]:
    """Processes of runners on the board."""
    found = []
    for pid in descendants(server.process.pid):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--lock" in arguments:
            found.append(pid)
    return found


# --- it works ------------------------------------------------------------------------------------


def test_predictions_equal_the_oracle(openssh: OpenSsh, model, images, delta_255) -> None:
    with device().open() as session:
        loaded = session.load(model.path, threads=1)
        assert loaded.load_ns > 0
        session.set_images(images)
        np.testing.assert_array_equal(session.predict(None), model.classes(images))
        attacked = session.predict(delta_255, start=3, stop=30, batch_size=4)
        np.testing.assert_array_equal(attacked, model.classes(perturb(images, delta_255))[3:30])
        assert session.machine.extra["pointer_bits"] == 64
    assert runners(openssh) == []
    assert openssh.left_over() == []


def test_the_device_is_what_its_profile_says(openssh: OpenSsh) -> None:
    made = device(board_profile(budget_s=90.0))
    assert (made.name, made.emulated, made.default_budget_s) == ("board", False, 90.0)


def test_files_are_pushed_once(openssh: OpenSsh, model, images) -> None:
    def use() -> dict[str, int]:
        with device().open() as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            session.predict(None)
        return {path.name: path.stat().st_ino for path in (openssh.root / "files").iterdir()}

    first = use()
    assert len(first) == 3  # the runner, the model, the images
    assert use() == first


def test_latency_is_measured_there(openssh: OpenSsh, model, images, tmp_path: Path) -> None:
    sensor = tmp_path / "power1_input"
    sensor.write_text("5000000\n")
    with device(board_profile(energy_sensor=str(sensor), cooling_c=149.0)).open() as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        process = session.measure(**QUICK)
    assert len(process.samples_ns) == 6
    assert process.telemetry[0]["power_uw"] == 5000000


def test_a_key_in_the_agent_is_used(openssh: OpenSsh, ssh_user: User, monkeypatch) -> None:
    import shutil
    import subprocess

    if shutil.which("ssh-agent") is None or shutil.which("ssh-add") is None:
        pytest.skip("no ssh-agent")
    path = ssh_user.ssh.parent / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        for _ in range(100):
            if path.exists():
                break
            threading.Event().wait(0.1)
        key = ssh_user.ssh / "id_test"
        subprocess.run(["ssh-add", "-q", str(key)], check=True, capture_output=True)
        key.unlink()
        config = ssh_user.ssh / "config"
        config.write_text(
            "\n".join(
                line for line in config.read_text().splitlines() if "IdentityFile" not in line
            )
        )
        opened()
    finally:
        agent.kill()
        agent.wait()


# --- it is refused, in one line ------------------------------------------------------------------


def refusal(error: type[HarnessError], *, match: str, **options: Any) -> str:
    with pytest.raises(error, match=match) as caught:
        opened(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_host_key_is_refused(openssh: OpenSsh, ssh_user: User) -> None:
    (ssh_user.ssh / "known_hosts").unlink()
    refusal(DeviceUnreachable, match=r"host key of board is not known yet.*: ssh -p \d+ board$")
    assert not (openssh.root / "files").exists()


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256"])
def test_a_changed_host_key_is_refused(openssh: OpenSsh, ssh_user: User, kind: str) -> None:
    ssh_user.trust(openssh.port, asyncssh.generate_private_key(kind))
    refusal(DeviceUnreachable, match=r"another host key than known_hosts has.*ssh-keygen -R")
    assert not (openssh.root / "files").exists()


def test_a_key_that_changes_while_connected_is_not_tried_again(
    openssh: OpenSsh, ssh_user: User, model, images
) -> None:
    def use() -> None:
        with device(reconnect_s=3600).open() as session:
            session.load(model.path, threads=1)
            ssh_user.trust(openssh.port, asyncssh.generate_private_key("ssh-ed25519"))
            openssh.cut()
            session.set_images(images)

    with pytest.raises(DeviceUnreachable, match="another host key"):
        use()


@pytest.mark.parametrize("line", ["UserKnownHostsFile none", "StrictHostKeyChecking no"])
def test_no_configuration_makes_it_trust_anybody(openssh, ssh_user: User, line: str) -> None:
    (ssh_user.ssh / "known_hosts").unlink()
    with (ssh_user.ssh / "config").open("a") as config:
        config.write(f"  {line}\n")
    refusal(DeviceUnreachable, match="is not known yet")


def test_another_known_hosts_file_is_honoured(openssh: OpenSsh, ssh_user: User) -> None:
    (ssh_user.ssh / "known_hosts").rename(ssh_user.ssh / "elsewhere")
    with (ssh_user.ssh / "config").open("a") as config:
        config.write(f"  UserKnownHostsFile {ssh_user.ssh / 'elsewhere'}\n")
    opened()


def test_a_wrong_user_is_refused(openssh: OpenSsh) -> None:
    refusal(
        DeviceUnreachable,
        match=r"refused the login of nobody-here.*`ssh -p \d+ nobody-here@board` works without a"
        rf".*ssh-copy-id -p {openssh.port} nobody-here@board",
        profile=board_profile(host="nobody-here@board"),
    )


def test_a_key_that_is_not_authorised_is_refused(openssh: OpenSsh, ssh_user: User) -> None:
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(ssh_user.ssh / "id_test")
    refusal(DeviceUnreachable, match="board refused the login: check the user name")


def test_an_unreachable_host_is_named(openssh: OpenSsh) -> None:
    openssh.stop()
    refusal(DeviceUnreachable, match=r"cannot reach board: connection refused: is it on, in this")
    name = "no-such-board.invalid"
    refusal(DeviceUnreachable, match=f"no host {name}", profile=board_profile(host=name))


def test_a_host_that_says_nothing_is_given_up(ssh_user: User) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ssh_user.configure(silent.getsockname()[1])
        limits = replace(LIMITS, connect_s=1, login_s=1)
        refusal(DeviceUnreachable, match="board", limits=limits)


def test_what_is_no_ssh_is_refused(ssh_user: User) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        ssh_user.configure(server.getsockname()[1])

        def greet() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200)
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        refusal(DeviceUnreachable, match="board")
        thread.join()


def test_a_damaged_ssh_configuration_is_the_users_error(openssh, ssh_user: User) -> None:
    (ssh_user.ssh / "config").write_text("Host board\n  Port many\n")
    refusal(UsageError, match="your ssh configuration for board")


def test_a_missing_key_file_is_named_with_who_names_it(openssh, ssh_user: User) -> None:
    (ssh_user.ssh / "id_test").unlink()
    refusal(
        UsageError, match=r"/id_test is missing: ~/\.ssh/config names it .*IdentityFile.* board"
    )


@pytest.mark.parametrize("like", ["rpi4", None])
def test_another_architecture_is_told_once(openssh: OpenSsh, like: str | None) -> None:
    told: list[str] = []
    board = device(stands_for=built_in()[like] if like else None, notice=told.append)
    for _ in range(2):
        with board.open() as session:
            arch = session.machine.arch
    expected = f"it answers as {arch}, not aarch64: its rows say so, but these are not the"
    wanted = like is not None and arch != "aarch64"
    assert [line.startswith(expected) for line in told] == [True] * wanted


def test_without_asyncssh_it_says_what_to_install(openssh: OpenSsh, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "asyncssh":
            raise ImportError("No module named 'asyncssh'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refusal(HarnessError, match="need the package asyncssh.*pip install asyncssh")


def test_a_board_without_file_transfer(openssh: OpenSsh) -> None:
    text = openssh.config.read_text()
    openssh.stop()
    openssh.config.write_text(text.replace("Subsystem sftp", "#"))
    openssh.start()
    refusal(DeviceUnreachable, match=r"no file transfer \(SFTP\): enable `Subsystem sftp`")


def test_a_board_without_python3(openssh: OpenSsh) -> None:
    openssh.program("python3", "exit 127")
    refusal(DeviceUnreachable, match=r"exit code 127\).*harness devices bootstrap board")
    (openssh.root / "environment.json").unlink()
    refusal(DeviceUnreachable, match=r"board has no python3: sudo apt-get install python3")


def test_a_folder_that_cannot_be_made(openssh: OpenSsh) -> None:
    refusal(
        HarnessError,
        match="cannot make the folder /proc/nowhere",
        profile=board_profile(remote_root="/proc/nowhere"),
    )


def test_a_second_harness_is_told_who_has_the_board(openssh: OpenSsh) -> None:
    with device().open() as session:
        match = rf"in use by .*\(process {os.getpid()}\) since \d{{4}}-"
        refusal(DeviceUnreachable, match=match)
        assert session.pid in runners(openssh)
    opened()


# --- a board that damages or lies ----------------------------------------------------------------


def test_a_file_that_was_damaged_there_is_sent_again(openssh: OpenSsh, model, images) -> None:
    with device().open() as session:
        session.load(model.path, threads=1)
        session.set_images(images)
    for path in (openssh.root / "files").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    with device().open() as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        np.testing.assert_array_equal(session.predict(None), model.classes(images))
    for path in (openssh.root / "files").iterdir():  # the runner among them
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_a_file_in_use_is_not_swept(openssh: OpenSsh, model) -> None:
    with device().open() as session:
        session.load(model.path, threads=1)
    for path in (openssh.root / "files").iterdir():
        os.utime(path, (1e9, 1e9))  # sent in 2001
    with device().open() as session:
        session.load(model.path, threads=1)
    assert all(p.stat().st_mtime > 1.7e9 for p in (openssh.root / "files").iterdir())
    assert len(list((openssh.root / "files").iterdir())) == 2


def test_control_characters_of_a_board_do_not_reach_the_terminal(
    openssh: OpenSsh, tmp_path: Path, monkeypatch
) -> None:
    text = RUNNER.read_text()
    runner = tmp_path / "runner.py"
    name = '"cpu": cpu_model(),'
    assert name in text
    runner.write_text(text.replace(name, '"cpu": "Cortex\\x1b[2J\\x07\\nA72",'))
    monkeypatch.setattr("devices.ssh.RUNNER", runner)
    with device().open() as session:
        assert session.machine.cpu == "Cortex?[2J? A72"


def test_a_board_that_lies_about_a_checksum_is_found_out(openssh: OpenSsh, model) -> None:
    """It damages every model on arrival, and calls it the right one."""
    with device().open():
        pass  # the runner arrives unharmed
    openssh.program(
        "sha256sum",
        # $2 is files/SHA256.TOKEN.part, or files/SHA256 if it is there
        'case "$2" in *.part) printf "?" | dd of="$2" conv=notrunc 2>&-;; esac\n'
        'name=$(basename "$2"); echo "${name%%.*}  $2"',
    )

    def use() -> None:
        with device().open() as session:
            session.load(model.path, threads=1)

    with pytest.raises(HarnessError, match=r"damages what it stores, twice.*check its disk") as e:
        use()
    assert "\n" not in str(e.value)
    assert len(list((openssh.root / "files").iterdir())) == 1  # only the runner stays


def test_a_transfer_that_arrives_damaged_leaves_nothing(openssh: OpenSsh, model) -> None:
    opened()
    openssh.program(
        "sha256sum",
        'case "$2" in *.part) echo 0000000000000000  x;; *) exec /usr/bin/sha256sum "$@";; esac',
    )

    def use() -> None:
        with device().open() as session:
            session.load(model.path, threads=1)

    with pytest.raises(HarnessError, match=r"tiny.onnx arrived damaged \(another sha256\), twice"):
        use()
    assert openssh.left_over() == []
    assert len(list((openssh.root / "files").iterdir())) == 1


def test_a_board_without_sha256sum_hashes_with_python(openssh: OpenSsh, model) -> None:
    openssh.program("sha256sum", "exit 127")
    with device().open() as session:
        session.load(model.path, threads=1)


def test_a_model_that_is_too_big_is_never_sent(openssh: OpenSsh, model) -> None:
    with device().open() as session:
        with pytest.raises(UsageError, match="the limit for a model is 10"):
            session.load(model.path, threads=1, max_bytes=10)
        assert len(list((openssh.root / "files").iterdir())) == 1


def test_a_runner_that_answers_nonsense_is_one_line(
    openssh: OpenSsh, monkeypatch, tmp_path
) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text('print(\'{"id": 1, "ok": true, "protocol": 1}\'); input()')
    monkeypatch.setattr("devices.ssh.RUNNER", runner)
    refusal(HarnessError, match="answered without what was asked")


# --- it survives ---------------------------------------------------------------------------------


def predicted_through(
    server: OpenSsh, model, images, delta_255, disturb: Callable[[DeviceSession], object]
) -> list[str]:
    """Predict with a disturbance after every few images, and check that nothing came of it."""
    told: list[str] = []
    with device(notice=told.append).open() as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        disturbed: list[int] = []

        def progress(done: int) -> None:
            if done not in disturbed and len(disturbed) < 2:
                disturbed.append(done)
                disturb(session)

        attacked = session.predict(delta_255, batch_size=2, on_progress=progress)
        np.testing.assert_array_equal(attacked, model.classes(perturb(images, delta_255)))
        np.testing.assert_array_equal(session.predict(None), model.classes(images))
    assert disturbed
    for journal in evaluated(server):
        assert sorted(journal) == list(range(len(images)))  # each once: none lost, none twice
    assert server.left_over() == []
    return told


def test_the_connection_is_killed(openssh: OpenSsh, model, images, delta_255) -> None:
    told = predicted_through(openssh, model, images, delta_255, lambda _session: openssh.cut())
    assert any("connecting again for up to 60 s" in line for line in told)
    assert any("connected again" in line for line in told)


def test_the_runner_is_killed(openssh: OpenSsh, model, images, delta_255) -> None:
    def kill(session: DeviceSession) -> None:
        os.kill(session.pid, signal.SIGKILL)

    told = predicted_through(openssh, model, images, delta_255, kill)
    assert any("SIGKILL" in line or "exit code 137" in line for line in told)


def test_the_board_is_away_for_a_while(openssh: OpenSsh, model, images, delta_255) -> None:
    def restart(_session: DeviceSession) -> None:
        openssh.stop()
        threading.Timer(1.0, openssh.start).start()

    predicted_through(openssh, model, images, delta_255, restart)


def test_the_network_falls_silent(openssh: OpenSsh, model, images, delta_255) -> None:
    """Nothing is closed, nothing answers: only keep-alives notice. The old runner still lives."""

    def silence(session: DeviceSession) -> None:
        for pid in descendants(openssh.process.pid):
            if pid != session.pid:
                os.kill(pid, signal.SIGSTOP)

    predicted_through(openssh, model, images, delta_255, silence)


def test_the_files_are_gone_when_it_comes_back(openssh: OpenSsh, model, images, delta_255) -> None:
    def swap_card(_session: DeviceSession) -> None:
        for path in (openssh.root / "files").iterdir():
            path.unlink()
        openssh.cut()

    predicted_through(openssh, model, images, delta_255, swap_card)


def test_a_board_that_stays_away_is_given_up(openssh: OpenSsh, model, images) -> None:
    def use() -> None:
        with device(reconnect_s=1.0).open() as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            openssh.stop()
            session.predict(None)

    with pytest.raises(
        DeviceUnreachable, match=r"trying again for 1 s did not help.*cannot reach.*command goes on"
    ):
        use()


def boot_id_program(server: OpenSsh, tmp_path: Path, monkeypatch) -> Callable[[], None]:
    """A board whose boot id is what a file says; returns how to reboot it."""
    boot = tmp_path / "boot_id"
    boot.write_text("first")
    text = RUNNER.read_text()
    path = 'ROOT / "proc/sys/kernel/random/boot_id"'
    assert path in text
    runner = tmp_path / "runner.py"
    runner.write_text(text.replace(path, f"Path({str(boot)!r})"))
    monkeypatch.setattr("devices.ssh.RUNNER", runner)

    def reboot() -> None:
        boot.write_text("second")
        server.cut()

    return reboot


def test_a_latency_process_tells_the_boot_it_belongs_to(
    openssh: OpenSsh, model, images, tmp_path: Path, monkeypatch
) -> None:
    reboot = boot_id_program(openssh, tmp_path, monkeypatch)

    with device().open() as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        before = session.measure(**QUICK)
        session.load(model.path, threads=1)
        reboot()
        after = session.measure(**QUICK)
    assert [p.telemetry[0]["boot_id"] for p in (before, after)] == ["first", "second"]
    assert len(after.samples_ns) == len(before.samples_ns)


def test_a_lost_connection_repeats_a_latency_run_afresh(openssh: OpenSsh, model, images) -> None:
    with device().open() as session:
        session.load(model.path, threads=1)
        session.set_images(images)
        openssh.cut()
        process = session.measure(**QUICK)
    assert len(process.samples_ns) == 6


def test_predictions_survive_a_reboot(
    openssh: OpenSsh, model, images, delta_255, tmp_path: Path, monkeypatch
) -> None:
    reboot = boot_id_program(openssh, tmp_path, monkeypatch)
    predicted_through(openssh, model, images, delta_255, lambda _session: reboot())


def test_ctrl_c_frees_the_board(openssh: OpenSsh, model, images) -> None:
    main = threading.main_thread().ident

    def use() -> None:
        with device().open() as session:
            session.load(model.path, threads=1)
            session.set_images(images)
            threading.Timer(1.0, signal.pthread_kill, (main, signal.SIGINT)).start()
            session.measure(**{**QUICK, "min_seconds": 3600})

    with pytest.raises(KeyboardInterrupt):
        use()
    opened()  # at once: the runner has ended with its workstation


def test_nothing_of_the_workstation_is_forwarded(openssh: OpenSsh, ssh_user: User) -> None:
    with (ssh_user.ssh / "config").open("a") as config:
        config.write("  ForwardAgent yes\n  ForwardX11 yes\n")
    record = openssh.home / "environment"
    wrapper = openssh.programs / "enter"
    wrapper.write_text(wrapper.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nenv >> {record}\n"))
    opened()
    assert "SSH_CONNECTION" in record.read_text()
    assert "SSH_AUTH_SOCK" not in record.read_text()
    assert "DISPLAY" not in record.read_text()


def test_ports_of_profiles_are_used(openssh: OpenSsh, ssh_user: User) -> None:
    ssh_user.configure(free_port())
    opened(profile=board_profile(port=openssh.port))

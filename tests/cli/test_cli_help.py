"""What `harness` says of itself, of this machine, and of work it has not done yet."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from cli_cases import Outcome, artefacts, edit, environment, harness, snapshot, succeeded

from harness.cli.main import cli
from harness.records import PAPER_ORDER

Run = Callable[..., Outcome]


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command of the tree, with the words that name it."""
    pending: list[tuple[tuple[str, ...], click.Command]] = [((), cli)]
    while pending:
        words, command = pending.pop()
        yield words, command
        if isinstance(command, click.Group):
            pending += [((*words, name), sub) for name, sub in command.commands.items()]


TREE = sorted(commands(), key=lambda item: item[0])


def test_the_commands_of_the_design_are_there() -> None:
    wanted = "init run plan train craft export attack-device audit devices report results doctor"
    assert set(cli.commands) == set(wanted.split())


@pytest.mark.parametrize(
    ("words", "command"), TREE, ids=[" ".join(w) or "harness" for w, _ in TREE]
)
def test_help(words: tuple[str, ...], command: click.Command, run: Run, tmp_path: Path) -> None:
    outcome = succeeded(run(*words, "--help", cwd=tmp_path))
    assert outcome.err == ""
    assert outcome.out.startswith(f"Usage: {' '.join(('harness', *words))} ")
    examples = outcome.out.partition("Examples:\n")[2]
    assert "  harness " in examples
    for option in command.params:
        shown = isinstance(option, click.Option) and not option.hidden
        for name in option.opts if shown else ():
            assert name in outcome.out
    assert run(*words, "-h", cwd=tmp_path).out == outcome.out
    if isinstance(command, click.Group):
        for name in command.commands:
            assert f"\n  {name} " in outcome.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "command"), TREE, ids=[" ".join(w) or "harness" for w, _ in TREE]
)
def test_examples_are_commands_that_exist(
    words: tuple[str, ...],
    command: click.Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is parsed, not run, and in an empty folder: what files there are decides nothing."""
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^\s+harness (.*)$", command.help or "", flags=re.MULTILINE):
        example = re.split(r"\s{3,}|\s>\s", line)[0].split()
        group, rest = cli, example
        while True:
            name, rest = rest[0], rest[1:]
            found = group.commands[name]
            if not isinstance(found, click.Group):
                break
            group = found
        found.make_context(name, list(rest), resilient_parsing=False).close()


def test_help_is_quick_because_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from harness.cli.main import main
for words in {[list(words) for words, _ in TREE]!r} + [["--version"]]:
    sys.argv = ["harness", *words] + (["--help"] if words != ["--version"] else [])
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, words
heavy = "torch torchvision onnx onnxruntime matplotlib scipy sklearn numpy jinja2".split()
print("heavy:", sorted(set(heavy) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "heavy: []\n"


def test_version(tmp_path: Path) -> None:
    outcome = succeeded(harness("--version", cwd=tmp_path))
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", outcome.out)
    assert outcome.err == ""


def test_without_a_command_it_shows_the_commands(tmp_path: Path) -> None:
    outcome = harness(cwd=tmp_path)
    assert outcome.code in (0, 2)  # click 8.2 changed its mind
    assert "attack-device" in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("option", "first"), [(["--json"], b"[\n"), ([], b"model ")])
def test_the_reader_of_stdout_may_leave(option: list[str], first: bytes, workspace: Path) -> None:
    """`harness results | head -1`, as JSON and as a table."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "results", *option],
        cwd=workspace,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(first)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert said == b""


# --- terminals -----------------------------------------------------------------------------------

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38|4[0-7]|48|9[0-7])(?:;\d+)*m")


def on_a_terminal(*arguments: str, cwd: Path, **env: str) -> str:
    """What a person sees: standard output and error both on one terminal."""
    main_end, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments],
        cwd=cwd,
        env=environment(TERM="xterm-256color", COLUMNS="120", **env),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # the terminal's other end is gone
            break
        if not part:
            break
        seen += part
    os.close(main_end)
    assert process.wait(timeout=60) == 0, seen.decode()
    return seen.decode()


def test_bars_on_a_terminal_and_no_colour_when_asked(workspace: Path) -> None:
    made = workspace / "cache" / "q4.onnx"
    made.unlink()
    command = ("export", "--model", "q4")
    colourful = on_a_terminal(*command, cwd=workspace)
    assert COLOUR.search(colourful)
    assert "━" in colourful  # a bar
    made.unlink()
    plain = on_a_terminal(*command, cwd=workspace, NO_COLOR="1")
    assert not COLOUR.search(plain)
    assert "export q4: " in plain
    assert "cache/q4.onnx" in plain


def test_no_colour_in_what_is_piped(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for command in ("results --model full", "train --model full --dry-run", "export --model q4"):
        outcome = succeeded(run(*command.split(), cwd=workspace))
        assert "\x1b" not in outcome.out + outcome.err


# --- doctor, plan, devices -----------------------------------------------------------------------


def test_doctor(workspace: Path) -> None:
    before = snapshot(workspace)
    outcome = harness("doctor", "--json", cwd=workspace)
    findings = json.loads(outcome.out)
    for finding in findings:
        assert set(finding) == {"subject", "level", "text"}
        assert finding["level"] in {"ok", "note", "problem"}
        assert finding["text"]
    levels = {finding["subject"]: finding["level"] for finding in findings}
    wanted = {"python", "torch", "torchvision", "onnxruntime", "accelerator", "data digits"}
    wanted |= {"data cifar10", "data svhn", "device local", "disk", "workspace"}
    assert wanted <= levels.keys()
    assert [f for f in findings if f["level"] == "problem"] == []
    assert outcome.code == 0
    assert outcome.err == ""
    assert snapshot(workspace) == before


def test_doctor_says_what_to_fix(run: Run, empty: Path) -> None:
    (empty / "harness.toml").write_text("wdith = 4\n")
    outcome = run("doctor", cwd=empty)
    assert outcome.code == 1
    assert re.search(r"^FIX +workspace: .*'wdith'", outcome.out, flags=re.MULTILINE)
    assert outcome.err == "error: 1 to fix: workspace\n"


def test_doctor_before_there_is_a_workspace(run: Run, tmp_path: Path) -> None:
    outcome = succeeded(run("doctor", "--workspace", tmp_path / "not yet", cwd=tmp_path))
    assert "harness run" in outcome.out
    assert not list(tmp_path.iterdir())


def test_plan_of_an_empty_workspace(run: Run, empty: Path) -> None:
    before = snapshot(empty)
    outcome = succeeded(run("plan", "--json", cwd=empty))
    tasks = json.loads(outcome.out)
    for task in tasks:
        assert set(task) == {"stage", "task", "cached", "estimated_seconds"}
        assert task["cached"] is False
        assert task["estimated_seconds"] >= 0
    stages = [task["stage"] for task in tasks]
    counts = {stage: stages.count(stage) for stage in stages}
    assert counts == {"train": 10, "export": 10, "craft": 4 + 10 * 6 + 11, "evaluate": 10}
    assert list(counts) == ["train", "export", "craft", "evaluate"]
    assert sum(task["estimated_seconds"] for task in tasks) > 0
    people = succeeded(run("plan", cwd=empty))
    assert re.search(r"about .* on this (cpu|cuda)", people.out)
    assert "sfp_mixup" in people.out
    assert snapshot(empty) == before


@pytest.mark.parametrize("command", ["plan", "run --dry-run", "export --all --dry-run"])
def test_plan_before_the_data_is_there(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "empty"
    new = ("init", "--preset", "paper", "--dataset", "cifar10", "--workspace", "empty")
    succeeded(run(*new, cwd=tmp_path))
    before = snapshot(tmp_path)
    outcome = succeeded(run(*command.split(), "--accelerator", "cpu", "--json", cwd=folder))
    tasks = {task["task"]: task for task in json.loads(outcome.out)}
    assert not any(task["cached"] for task in tasks.values())
    # 160 epochs of 49,000 images at 3.5 forward passes, beside an export at 1,500 in all.
    ratio = tasks["train full"]["estimated_seconds"] / tasks["export full"]["estimated_seconds"]
    assert ratio == pytest.approx(3.5 * 160 * 49_000 / 1500, rel=0.1)  # printed to tenths
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("CIFAR-10 is not yet in ")
    assert snapshot(tmp_path) == before


def test_plan_of_a_finished_workspace(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    tasks = json.loads(succeeded(run("plan", "--json", cwd=workspace)).out)
    assert len(tasks) == 105
    assert all(task["cached"] and task["estimated_seconds"] is None for task in tasks)
    assert "nothing" in succeeded(run("plan", cwd=workspace)).out
    assert artefacts(workspace) == before


def test_plan_of_more_seeds_and_budgets(run: Run, empty: Path) -> None:
    def craft_tasks() -> dict[str, float]:
        tasks = json.loads(succeeded(run("plan", "--json", cwd=empty)).out)
        return {t["task"]: t["estimated_seconds"] for t in tasks if t["stage"] == "craft"}

    plain = craft_tasks()
    edit(empty, "eps = [4, 10]", 'eps = [4, 10]\ntransfer_eps = "all"\nseeds = 3')
    more = craft_tasks()
    assert len(plain) == 4 + 10 * (2 + 2) + 11 + 20
    assert len(more) == 4 + 3 * (10 * (2 + 2) + 11 * 2) + 20
    assert {"craft fleet_eps4_s2", "craft fleet_without_pp2_eps10_s1"} <= more.keys()
    # The whole fleet's 66 at six epochs, of models that cost more or less; full's 12 at two.
    ratio = more["craft fleet_eps4_s2"] / more["craft full_eps4_s2"]
    assert 66 * 6 / (12 * 2) < ratio < 2 * 66 * 6 / (12 * 2)


@pytest.mark.parametrize(
    "command", ["run", "train --all", "craft --model q2", "export --model sfp"]
)
def test_a_dry_run_builds_nothing_and_estimates(command: str, run: Run, empty: Path) -> None:
    before = snapshot(empty)
    outcome = succeeded(run(*command.split(), "--dry-run", cwd=empty))
    assert re.search(r"about .* on this (cpu|cuda)", outcome.out)
    tasks = json.loads(succeeded(run(*command.split(), "--dry-run", "--json", cwd=empty)).out)
    assert tasks
    assert not any(task["cached"] for task in tasks)
    assert snapshot(empty) == before


def test_what_commands_print_is_what_they_made(run: Run, workspace: Path) -> None:
    out = succeeded(run("train", "--model", "q4", "--model", "full", "--json", cwd=workspace)).out
    assert json.loads(out) == ["cache/full.pt", "cache/q4.pt"]
    out = succeeded(run("export", "--all", cwd=workspace)).out
    assert out.split() == [f"cache/{name}.onnx" for name in PAPER_ORDER]
    out = succeeded(run("craft", "--model", "sfp", "--json", cwd=workspace)).out
    ends = ("eps4", "eps10", "eps10_t0", "eps10_t1", "eps4_fourier", "eps10_fourier")
    assert json.loads(out) == [f"cache/sfp_{end}.pt" for end in ends]
    out = succeeded(run("craft", "--model", "sfp", "--eps", "4", "--eps", "10", cwd=workspace)).out
    assert out.split() == ["cache/sfp_eps4.pt", "cache/sfp_eps10.pt"]
    out = succeeded(run("craft", "--model", "sfp", "--target", "1", cwd=workspace)).out
    assert out.split() == ["cache/sfp_eps10_t1.pt"]
    out = succeeded(run("craft", "--control", "random", "--eps", "4", cwd=workspace)).out
    assert out.split() == ["cache/random_eps4.pt"]


def test_init_writes_a_configuration_that_reads_back(run: Run, tmp_path: Path) -> None:
    from harness.config_file import load_config
    from harness.presets import preset_named

    outcome = succeeded(
        run("init", "--preset", "paper", "--dataset", "svhn", "--workspace", "new", cwd=tmp_path)
    )
    assert outcome.out == "new/harness.toml\n"
    assert load_config(tmp_path / "new" / "harness.toml") == preset_named("paper", dataset="svhn")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["harness.toml"]


def test_another_attack_is_named_in_the_file(run: Run, empty: Path) -> None:
    def crafted(*options: str) -> list[str]:
        outcome = run("craft", "--model", "q4", *options, "--dry-run", "--json", cwd=empty)
        tasks = json.loads(succeeded(outcome).out)
        return [task["task"] for task in tasks if task["stage"] == "craft"]

    assert crafted("--eps", "10", "--attack", "fourier") == ["craft q4_eps10_fourier"]
    own = crafted("--eps", "10")
    assert own == ["craft q4_eps10"]
    # What the configuration asks for of a variant has its gradient-free perturbation in it.
    assert "craft q4_eps10_fourier" in crafted()
    refused = run("craft", "--control", "random", "--eps", "10", "--attack", "fourier", cwd=empty)
    assert refused.code == 2
    assert "a control attacks nothing" in refused.err

"""A user's own PyTorch classifier through the whole product: export, attack, time, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cli_cases import Outcome, error_line, succeeded
from factory_cases import GRAY, Lab

from harness.crafting.perturbation import load_perturbation

Run = Callable[..., Outcome]
IMAGES = 200
CONTROLS = ("random", "chessboard")
CONFIG = """
dataset = "{npz}"
preset = "quickstart"

[craft]
eps = [4, 16]
transfer_eps = 16.0
targets = [3]
attack_images = 256
epochs = 3

[eval]
images = 0
threads = 1

[latency]
mode = "{latency}"
"""


@pytest.fixture
def root(lab: Lab, tmp_path: Path) -> Path:
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "harness.toml").write_text(CONFIG.format(npz=lab.root / "gray.npz", latency="off"))
    return folder


@pytest.fixture
def pruned(lab: Lab, tmp_path: Path) -> Path:
    """A checkpoint of theirs with half of the weights gone."""
    state = torch.load(lab.root / "gray.pt")
    for values in state.values():
        if values.ndim > 1:
            values[values.abs() < values.abs().median()] = 0
    torch.save(state, tmp_path / "pruned.pt")
    return tmp_path / "pruned.pt"


def own(checkpoint: Path, name: str) -> tuple[object, ...]:
    """Another model of the same code."""
    return (*GRAY[:2], "--checkpoint", checkpoint, *GRAY[4:], "--name", name)


def of_results(run: Run, root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        succeeded(run("results", "--json", "--workspace", root, cwd=root)).out
    )
    return rows


def test_one_command_measures_a_model_of_their_own(run: Run, lab: Lab, root: Path) -> None:
    done = succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    assert done.out == f"{root / 'report' / 'index.html'}\n"
    cache = {path.name for path in (root / "cache").iterdir() if path.is_file()}
    crafted = {f"gray_eps{e}{end}.pt" for e in (4, 16) for end in ("", "_fourier")}
    controls = {f"{c}_eps{e}.pt" for c in ("random", "chessboard") for e in (4, 16)}
    assert cache == crafted | controls | {"gray_eps16_t3.pt", "gray.onnx", "gray.json"}
    rows = of_results(run, root)
    # Clean, two controls and two attacks at two budgets, one target: by PyTorch and by the file.
    assert len(rows) == 2 * (1 + 2 * 2 + 2 * 2 + 1)
    assert {row["variant"] for row in rows} == {"gray"}
    assert {row["runtime"] for row in rows} == {"torch", "onnxruntime"}
    assert {row["n"] for row in rows} == {IMAGES}
    deployed = {
        (row["uap_source"], row["attack"], row["eps"]): row
        for row in rows
        if row["runtime"] == "onnxruntime" and row["target"] is None
    }
    assert {row["torch_agreement"] for row in deployed.values()} == {1.0}
    assert {row["uer_gap"] for row in deployed.values() if row["eps"]} == {0.0}
    white_box = deployed["gray", "momentum", 16.0]
    assert white_box["uer"] > deployed["random", "random", 16.0]["uer"] + 0.3
    assert white_box["macs"] == 14 * 10 * 16 * 25 + 7 * 5 * 32 * 16 * 9 + 32 * 7 * 5 * 10
    assert "probe" in load_perturbation(root / "cache" / "gray_eps16.pt").meta
    page = (root / "report" / "index.html").read_text()
    assert "exported from user_nets:gray, compared with PyTorch on" in page

    again = succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    assert "8 already built and still valid" in again.err


def test_what_is_stored_is_what_their_file_predicts(run: Run, lab: Lab, root: Path) -> None:
    uap = "cache/gray_eps16.pt"
    done = succeeded(
        run(
            *("attack-device", *GRAY, "--uap", uap, "--json", "--workspace", root),
            cwd=lab.root,
        )
    )
    rows = {row["uap_source"]: row for row in json.loads(done.out)}
    data = np.load(lab.root / "gray.npz")
    images = data["test_x"].transpose(0, 3, 1, 2).astype(np.int16)
    session = onnxruntime.InferenceSession((root / "cache" / "gray.onnx").read_bytes())
    delta = load_perturbation(root / uap).delta_255

    def wrong(x: np.ndarray) -> float:
        pixels = np.ascontiguousarray(x.clip(0, 255).astype(np.uint8))
        (logits,) = session.run(None, {"image": pixels})
        return float(np.mean(logits.argmax(axis=1) != data["test_y"]))

    assert rows["gray"]["uer"] == pytest.approx(wrong(images + delta))
    assert rows[None]["clean_accuracy"] == pytest.approx(1 - wrong(images))
    # Named, it is crafted first; everything else that a run would craft is not.
    assert {p.name for p in (root / "cache").glob("*.pt")} == {"gray_eps16.pt"}


def test_models_of_their_own_meet_each_other_and_the_first_is_what_others_are_compared_with(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    succeeded(run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root))
    succeeded(run("run", *own(pruned, "half"), "--workspace", root, cwd=lab.root))
    met = {
        (row["variant"], row["uap_source"])
        for row in of_results(run, root)
        if row["runtime"] == "onnxruntime" and row["eps"] == 16 and row["target"] is None
    }
    assert met == {(v, s) for v in ("whole", "half") for s in ("whole", "half", *CONTROLS)}
    page = (root / "report" / "index.html").read_text()
    assert "Against whole" in page
    succeeded(run("report", "--baseline", "half", "--workspace", root, cwd=lab.root))
    assert "Against half" in (root / "report" / "index.html").read_text()
    refused = run("report", "--baseline", "full", "--workspace", root, cwd=lab.root)
    assert refused.code == 1
    assert "no results of 'full' to compare with: choose from half, whole" in error_line(refused)


def test_they_stand_beside_the_variants(run: Run, lab: Lab, root: Path) -> None:
    """In one report: the experiment's models are compared with Full as they were before."""
    text = (root / "harness.toml").read_text()
    training = "\n[train]\nepochs = 1\nbatch_size = 64\n"
    (root / "harness.toml").write_text(f"width = 4\n{text}{training}")
    succeeded(run("run", "--model", "full", "--workspace", root, cwd=lab.root))
    succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    rows = of_results(run, root)
    assert {row["variant"] for row in rows} == {"full", "gray"}
    assert "Against the uncompressed model" in (root / "report" / "index.html").read_text()


def test_export_is_made_anew_when_the_model_changes(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    def exported(checkpoint: Path) -> tuple[Outcome, bytes]:
        options = own(checkpoint, "net")
        done = succeeded(run("export", *options, "--workspace", root, cwd=lab.root))
        assert done.out == f"{root / 'cache' / 'net.onnx'}\n"
        return done, (root / "cache" / "net.onnx").read_bytes()

    _, first = exported(lab.root / "gray.pt")
    again, same = exported(lab.root / "gray.pt")
    assert "1 already built and still valid" in again.err
    assert same == first
    _, other = exported(pruned)
    assert other != first
    (root / "cache" / "net.onnx").write_bytes(other[:-1])  # damaged: built anew
    _, repaired = exported(pruned)
    assert repaired == other


def test_a_model_that_cannot_be_exported_is_one_line(run: Run, lab: Lab, root: Path) -> None:
    outcome = run(*("export", "--factory", "user_bad:Branching", "--workspace", root), cwd=lab.root)
    assert outcome.code == 2
    *_, last = outcome.err.splitlines()
    assert last.startswith("error: export of Branching refused, nothing written: TorchScript: ")
    assert last.isprintable()
    assert not (root / "cache" / "Branching.onnx").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("run", *GRAY, "--model", "full"), "--factory and --model or --all exclude each other"),
        (("run", "--checkpoint", "gray.pt"), "--factory PKG:FN"),
        (("export", *GRAY, "--all"), "leave out --model, --all"),
        (("export", *GRAY, "--verify"), "leave out --model, --all"),
        (("export", *GRAY, "--check", "x.onnx"), "--check builds nothing"),
        (("attack-device", "--name", "x"), "--factory PKG:FN"),
        (("attack-device", *GRAY, "--onnx", "gray.onnx"), "two models have the same name"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    run: Run, lab: Lab, tmp_path: Path, command: tuple[object, ...], said: str
) -> None:
    root = tmp_path / "new"
    name, *options = command
    data = () if "--check" in options else ("--dataset", "gray.npz")
    outcome = run(name, *options, *data, "--workspace", root, cwd=lab.root)
    assert outcome.code == 2, outcome.err
    assert said in error_line(outcome)
    assert not root.exists()


def test_a_dry_run_tries_the_model_and_builds_nothing(run: Run, lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "new"
    where = ("--dataset", "gray.npz", "--workspace", root, "--dry-run", "--json")
    for command in ("run", "export", "attack-device"):
        plan = json.loads(succeeded(run(command, *GRAY, *where, cwd=lab.root)).out)
        assert "export gray" in {task["task"] for task in plan}
        assert not root.exists()


def test_latency_of_their_model_is_measured(run: Run, lab: Lab, root: Path) -> None:
    text = (root / "harness.toml").read_text().replace('mode = "off"', 'mode = "quick"')
    (root / "harness.toml").write_text(text)
    succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    rows = [row for row in of_results(run, root) if row["runtime"] == "onnxruntime"]
    assert {row["latency_mode"] for row in rows} == {"quick"}
    assert all(row["latency_p50_ms"] > 0 for row in rows)

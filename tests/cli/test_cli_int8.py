"""The optional variant int8: exported and attacked when named, and nothing else."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cli_cases import (
    Outcome,
    Tiny,
    artefacts,
    contents,
    edit,
    error_line,
    raw_predictions,
    sha256,
    snapshot,
    succeeded,
    write_onnx,
    written,
)

from harness.records import PAPER_ORDER

Run = Callable[..., Outcome]
EXPORT = ("export", "--model", "int8")
ATTACK = ("attack-device", "--model", "int8", "--uap", "cache/full_eps10.pt")


def cached(run: Run, root: Path, *command: str) -> dict[str, bool]:
    tasks = json.loads(succeeded(run(*command, "--dry-run", "--json", cwd=root)).out)
    return {task["task"]: task["cached"] for task in tasks}


def attacked_images(tiny: Tiny, uap: Path) -> np.ndarray:
    with np.load(tiny.npz) as data:
        images = data["test_x"].transpose(0, 3, 1, 2).astype(np.int64)
    delta = np.rint(255 * torch.load(uap, weights_only=True)["delta"].numpy()).astype(np.int64)
    return np.clip(images + delta, 0, 255).astype(np.uint8)


# --- export --------------------------------------------------------------------------------------


def test_export_makes_one_file_of_full_once(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    outcome = succeeded(run(*EXPORT, cwd=workspace))
    assert outcome.out == "cache/int8.onnx\n"
    first = artefacts(workspace)
    assert written(before, first) == {"int8.onnx", "int8.json"}
    manifest = json.loads((workspace / "cache" / "int8.json").read_text())
    metadata = manifest["metadata"]
    assert (metadata["variant"], metadata["method"], metadata["width"]) == ("int8", "int8", "4")
    assert metadata["checkpoint_sha256"] == sha256(workspace / "cache" / "full.pt")
    assert manifest["sha256"] == sha256(workspace / "cache" / "int8.onnx")
    assert manifest["notes"][0].startswith("not exact")
    full = json.loads((workspace / "cache" / "full.json").read_text())
    assert manifest["cost"]["macs"] == full["cost"]["macs"]
    assert manifest["cost"]["file_bytes"] < full["cost"]["file_bytes"]
    assert full.keys() - manifest.keys() == {"packed", "tuned_kernels", "other_widths"}
    again = succeeded(run(*EXPORT, cwd=workspace))
    assert artefacts(workspace) == first
    assert "2 already built and still valid" in again.err
    assert cached(run, workspace, *EXPORT) == {"train full": True, "export int8": True}


def test_in_a_new_workspace_full_is_trained_first(run: Run, empty: Path, workspace: Path) -> None:
    succeeded(run(*EXPORT, cwd=empty))
    succeeded(run(*EXPORT, cwd=workspace))
    made, finished = contents(artefacts(empty)), contents(artefacts(workspace))
    assert made.keys() == {"full.pt", "int8.onnx", "int8.json"}
    assert made == {name: finished[name] for name in made}


def test_it_is_made_again_when_what_it_depends_on_changes(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(run(*EXPORT, cwd=workspace))
    path = workspace / "cache" / "int8.onnx"
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "99.0")
        assert cached(run, workspace, *EXPORT) == {"train full": True, "export int8": False}
    path.write_bytes(content[:-1])
    assert not cached(run, workspace, *EXPORT)["export int8"]
    succeeded(run(*EXPORT, cwd=workspace))
    assert path.read_bytes() == content
    edit(workspace, "\nepochs = 2\nbatch_size = 32\npp", "\nepochs = 3\nbatch_size = 32\npp")
    assert cached(run, workspace, *EXPORT) == {"train full": False, "export int8": False}


def test_all_is_the_ten_of_the_paper(run: Run, workspace: Path) -> None:
    succeeded(run(*EXPORT, cwd=workspace))
    uap = ("--uap", "cache/full_eps10.pt")
    for command in (("export", "--all"), ("attack-device", "--all", *uap), ("run",)):
        tasks = cached(run, workspace, *command)
        assert {f"train {name}" for name in PAPER_ORDER} <= tasks.keys()
        assert not [name for name in tasks if "int8" in name]
    # Without --model: whatever is exported.
    assert "attack int8 on local" in cached(run, workspace, "attack-device", *uap)


# --- attack, results, report ---------------------------------------------------------------------


def test_attacked_it_is_compared_with_full(run: Run, workspace: Path, tiny: Tiny) -> None:
    clean, attacked = json.loads(succeeded(run(*ATTACK, "--json", cwd=workspace)).out)
    assert (clean["uap_source"], attacked["uap_source"]) == (None, "full")
    model, uap = workspace / "cache" / "int8.onnx", workspace / "cache" / "full_eps10.pt"
    for row in (clean, attacked):
        assert (row["variant"], row["method"], row["runtime"]) == ("int8", "int8", "onnxruntime")
        assert row["model_sha256"] == sha256(model)
        assert row["file_bytes"] == model.stat().st_size
        assert (row["width"], row["seed"]) == (4, 0)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    shown = attacked_images(tiny, uap)
    (answer,) = session.run(["logits"], {"image": shown})
    predictions = raw_predictions(workspace)
    predicted = predictions[sha256(model), sha256(uap), "onnxruntime"]
    assert predicted.tolist() == answer.argmax(axis=1).tolist()
    # PyTorch's side is Full's trained model, image by image.
    in_torch = predictions[sha256(model), sha256(uap), "torch"]
    full = predictions[sha256(workspace / "cache" / "full.onnx"), sha256(uap), "torch"]
    assert in_torch.tolist() == full.tolist()
    with np.load(tiny.npz) as data:
        labels = data["test_y"]
    assert attacked["torch_agreement"] == pytest.approx(float((predicted == full).mean()))
    gap = (predicted != labels).mean() - (full != labels).mean()
    assert attacked["uer_gap"] == pytest.approx(float(gap))
    assert attacked["uer"] == pytest.approx(float((predicted != labels).mean()))
    # Again: neither exported nor measured.
    before = snapshot(workspace / "cache")
    assert json.loads(succeeded(run(*ATTACK, "--json", cwd=workspace)).out) == [clean, attacked]
    assert snapshot(workspace / "cache") == before
    assert "4 already built" in run(*ATTACK, cwd=workspace).err


def test_results_and_report_show_it_after_the_papers_and_before_the_users(
    run: Run, workspace: Path
) -> None:
    write_onnx(workspace / "a_users.onnx")
    succeeded(run(*ATTACK, "--onnx", "a_users.onnx", cwd=workspace))
    rows = json.loads(succeeded(run("results", "--json", cwd=workspace)).out)
    order = list(dict.fromkeys(row["variant"] for row in rows))
    assert order == [*PAPER_ORDER, "int8", "a_users"]
    table = succeeded(run("results", "--model", "int8", cwd=workspace)).out.splitlines()
    assert {line.split()[0] for line in table[1:]} == {"INT8"}
    succeeded(run("report", cwd=workspace))
    page = (workspace / "report" / "index.html").read_text()
    assert "onnxruntime\u2019s static int8 quantisation" in page
    assert "not exact: weights and activations are rounded to 8 bits" in page
    # Attacked with less than the ten, they are left out of the mix and do not forbid it.
    assert "transfer matrix is incomplete" not in page
    assert page.index("INT8") < page.index("a_users")
    assert "INT8" in (workspace / "report" / "report.md").read_text()
    with (workspace / "report" / "results.csv").open() as file:
        listed = [(row["variant"], row["method"]) for row in csv.DictReader(file)]
    assert listed.count(("int8", "int8")) == 4  # clean and attacked, in both runtimes


def test_the_report_says_when_full_has_changed_since(run: Run, workspace: Path) -> None:
    succeeded(run(*ATTACK, cwd=workspace))
    edit(workspace, "\nepochs = 2\nbatch_size = 32\npp", "\nepochs = 1\nbatch_size = 32\npp")
    full = ("attack-device", "--model", "full", "--uap", "cache/chessboard_eps10.pt")
    note = "INT8 was made from another Full than the one beside it"
    succeeded(run("report", cwd=workspace))
    assert note not in (workspace / "report" / "index.html").read_text()
    succeeded(run(*full, cwd=workspace))
    succeeded(run("report", cwd=workspace))
    assert note in (workspace / "report" / "index.html").read_text()


def test_a_workspace_without_it_is_as_it_was(run: Run, workspace: Path) -> None:
    assert succeeded(run("results", "--model", "int8", "--json", cwd=workspace)).out == "[]\n"
    succeeded(run("report", cwd=workspace))
    assert "INT8" not in (workspace / "report" / "report.md").read_text()


# --- what it is not for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("train",),
        ("craft",),
        ("craft", "--eps", "10"),
        ("export", "--verify"),
        ("export", "--tune"),
        ("export", "--compat"),
    ],
)
def test_it_is_not_trained_crafted_on_or_proved(
    run: Run, empty: Path, command: tuple[str, ...]
) -> None:
    before = snapshot(empty)
    outcome = run(*command, "--model", "int8", cwd=empty)
    assert outcome.code == 2
    assert outcome.out == ""
    line = error_line(outcome)
    assert "int8 is only made from full at export (harness export --model int8)" in line
    assert "train, craft on and verify full" in line
    assert snapshot(empty) == before


def test_a_uap_crafted_on_it_is_not_ours_to_make(run: Run, workspace: Path) -> None:
    outcome = run(*ATTACK[:-1], "cache/int8_eps10.pt", cwd=workspace)
    assert outcome.code == 2
    assert "no UAP file cache/int8_eps10.pt" in error_line(outcome)


def test_names_that_do_not_exist_list_it_where_it_may_be_named(run: Run, empty: Path) -> None:
    known: dict[tuple[Any, ...], bool] = {
        ("export",): True,
        ("attack-device", "--uap", "cache/full_eps10.pt"): True,
        ("train",): False,
        ("craft",): False,
    }
    for command, listed in known.items():
        line = error_line(run(*command, "--model", "int7", cwd=empty))
        assert "unknown variant 'int7': choose from full, sfp" in line
        assert line.endswith(", int8") is listed


def test_its_file_is_not_a_users(run: Run, workspace: Path) -> None:
    succeeded(run(*EXPORT, cwd=workspace))
    command = ("attack-device", "--uap", "cache/full_eps10.pt", "--onnx")
    line = error_line(run(*command, "cache/int8.onnx", cwd=workspace))
    assert "is called like a variant" in line
    shutil.copy(workspace / "cache" / "int8.onnx", workspace / "mine.onnx")
    line = error_line(run(*command, "mine.onnx", cwd=workspace))
    assert "is the workspace's own int8: use --model int8" in line

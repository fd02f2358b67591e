"""`harness attack-device`: where it looks for UAPs, what it crafts, whose models it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import (
    SHAPE,
    Outcome,
    Tiny,
    artefacts,
    harness,
    linear_oracle,
    raw_predictions,
    sha256,
    succeeded,
    table,
    write_onnx,
    write_uap,
    written,
)

from harness.records import PAPER_ORDER

Run = Callable[..., Outcome]


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    rows = json.loads(succeeded(outcome).out)
    assert isinstance(rows, list)
    return rows


def runs(root: Path) -> int:
    ((count,),) = table(root, "SELECT count(*) FROM prediction_run")
    return int(count)


def test_as_in_the_readme_from_another_folder(workspace: Path, tmp_path: Path) -> None:
    """A finished experiment has these rows already: nothing is measured, all is printed."""
    before, measured = artefacts(workspace), runs(workspace)
    command = ("attack-device", "--device", "local", "--uap", "cache/full_eps10.pt", "--json")
    outcome = harness(*command, "--workspace", workspace, cwd=tmp_path)
    rows = rows_of(outcome)
    assert [(r["variant"], r["uap_source"]) for r in rows] == [
        (variant, source) for variant in PAPER_ORDER for source in (None, "full")
    ]
    assert {(r["runtime"], r["device"]) for r in rows} == {("onnxruntime", "local")}
    attacked = {r["uap_sha256"] for r in rows if r["uap_source"] == "full"}
    assert attacked == {sha256(workspace / "cache" / "full_eps10.pt")}
    assert artefacts(workspace) == before
    assert runs(workspace) == measured
    assert not (tmp_path / "cache").exists()


def test_the_current_folder_comes_before_the_workspace(
    run: Run, workspace: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    (here / "cache").mkdir(parents=True)
    mine = write_uap(here / "cache" / "full_eps10.pt")
    command = ("attack-device", "--model", "pp2", "--workspace", workspace, "--json")
    rows = rows_of(run(*command, "--uap", "cache/full_eps10.pt", cwd=here))
    assert rows[1]["uap_sha256"] == sha256(mine)
    mine.unlink()
    rows = rows_of(run(*command, "--uap", "cache/full_eps10.pt", cwd=here))
    assert rows[1]["uap_sha256"] == sha256(workspace / "cache" / "full_eps10.pt")


def test_a_missing_uap_of_ours_is_crafted_first(run: Run, workspace: Path) -> None:
    before, measured = artefacts(workspace), runs(workspace)
    command = ("attack-device", "--model", "pp3", "--uap", "cache/q4_eps6.pt", "--json")
    clean, attacked = rows_of(run(*command, cwd=workspace))
    assert written(before, artefacts(workspace)) == {"q4_eps6.pt"}
    content = torch.load(workspace / "cache" / "q4_eps6.pt", weights_only=True)
    assert (content["source"], content["eps"], content["target"]) == ("q4", 6.0, -1)
    assert (255 * content["delta"]).round().abs().max() == 6
    assert (clean["uap_source"], clean["eps"]) == (None, None)
    assert (attacked["uap_source"], attacked["eps"], attacked["target"]) == ("q4", 6.0, None)
    assert runs(workspace) == measured + 2  # both runtimes; the clean rows were there
    # Again: neither crafted nor measured.
    state = artefacts(workspace)
    assert rows_of(run(*command, cwd=workspace)) == [clean, attacked]
    assert (artefacts(workspace), runs(workspace)) == (state, measured + 2)


def test_a_missing_targeted_uap_and_a_control(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    uaps = ("--uap", "cache/full_eps7.5_t9.pt", "--uap", "cache/chessboard_eps7.5.pt")
    rows = rows_of(run("attack-device", "--model", "full", *uaps, "--json", cwd=workspace))
    assert written(before, artefacts(workspace)) == {"full_eps7.5_t9.pt", "chessboard_eps7.5.pt"}
    assert {(r["uap_source"], r["eps"], r["target"]) for r in rows} == {
        (None, None, None),
        ("full", 7.5, 9),
        ("chessboard", 7.5, None),
    }
    for name in ("full_eps7.5_t9", "chessboard_eps7.5"):
        content = torch.load(workspace / "cache" / f"{name}.pt", weights_only=True)
        assert (255 * content["delta"]).round().abs().max() == 7  # whole levels within 7.5


def test_a_dry_run_only_says_what_it_would_do(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    command = ("attack-device", "--model", "full", "--uap", "cache/q4_eps6.pt")
    tasks = json.loads(succeeded(run(*command, "--dry-run", "--json", cwd=workspace)).out)
    missing = [task["task"] for task in tasks if not task["cached"]]
    assert missing == ["craft q4_eps6", "attack full on local"]
    assert artefacts(workspace) == before


def test_a_model_of_the_user(run: Run, workspace: Path, tiny: Tiny) -> None:
    model = write_onnx(workspace / "theirs.onnx")
    measured = runs(workspace)
    uaps = ("--uap", "cache/full_eps10.pt", "--uap", "cache/q4_eps10_t1.pt")
    command = ("attack-device", "--onnx", "theirs.onnx", *uaps, "--json")
    rows = rows_of(run(*command, cwd=workspace))
    assert [r["uap_source"] for r in rows] == [None, "full", "q4"]
    assert runs(workspace) == measured + 3  # there is no PyTorch side
    with np.load(tiny.npz) as data:
        images, labels = data["test_x"].transpose(0, 3, 1, 2), data["test_y"]
    raw = raw_predictions(workspace)
    for row in rows:
        assert (row["variant"], row["method"], row["runtime"]) == ("theirs", "user", "onnxruntime")
        assert row["torch_agreement"] is row["uer_gap"] is None
        assert row["file_bytes"] == model.stat().st_size
        assert row["params"] == 480
        assert row["macs"] >= 480
        shown = images.astype(np.int64)
        if row["uap_source"] is not None:
            name = {"full": "full_eps10.pt", "q4": "q4_eps10_t1.pt"}[row["uap_source"]]
            content = torch.load(workspace / "cache" / name, weights_only=True)
            shown = np.clip(np.rint(shown + 255 * content["delta"].double().numpy()), 0, 255)
        predicted = raw[sha256(model), row["uap_sha256"], "onnxruntime"]
        assert predicted.tolist() == linear_oracle(shown).tolist()
        wrong = float((predicted != labels).mean())
        assert row["uer" if row["uap_source"] else "clean_accuracy"] == pytest.approx(
            wrong if row["uap_source"] else 1 - wrong
        )
    assert rows_of(run(*command, cwd=workspace)) == rows
    assert runs(workspace) == measured + 3
    # Beside the variants in the table and in the report, as one more model.
    everything = rows_of(run("results", "--json", cwd=workspace))
    assert [r for r in everything if r["variant"] == "theirs"] == rows
    succeeded(run("report", cwd=workspace))


def test_variants_and_the_users_model_together(run: Run, workspace: Path) -> None:
    write_onnx(workspace / "theirs.onnx")
    command = ("attack-device", "--model", "q2", "--onnx", "theirs.onnx", "--json")
    rows = rows_of(run(*command, "--uap", "cache/full_eps10.pt", cwd=workspace))
    assert [(r["variant"], r["uap_source"]) for r in rows] == [
        *(("q2", None), ("q2", "full")),
        *(("theirs", None), ("theirs", "full")),
    ]


def test_a_uap_written_by_hand(run: Run, workspace: Path, tiny: Tiny) -> None:
    """A plain dictionary, floats off the 8-bit grid: the device sees clip(round(x + 255 delta))."""
    rng = np.random.default_rng(11)
    delta = rng.uniform(-12.9, 12.9, size=SHAPE) / 255
    path = workspace / "mine.pt"
    write_uap(path, delta=torch.from_numpy(delta.astype(np.float32)), eps=13, meta=None)
    model = write_onnx(workspace / "theirs.onnx")
    command = ("attack-device", "--model", "full", "--onnx", "theirs.onnx", "--uap", "mine.pt")
    rows = rows_of(run(*command, "--json", cwd=workspace))
    attacked = [row for row in rows if row["uap_sha256"] is not None]
    assert [row["uap_sha256"] for row in attacked] == [sha256(path)] * 2
    assert {(r["uap_source"], r["attack"], r["eps"]) for r in attacked} == {("full", "unknown", 13)}
    content = torch.load(path, weights_only=True)
    with np.load(tiny.npz) as data:
        images = data["test_x"].transpose(0, 3, 1, 2).astype(np.float64)
    shown = np.clip(np.rint(images + 255 * content["delta"].double().numpy()), 0, 255)
    predicted = raw_predictions(workspace)[sha256(model), sha256(path), "onnxruntime"]
    assert predicted.tolist() == linear_oracle(shown).tolist()
    assert attacked[0]["torch_agreement"] >= 0.99


def test_a_file_of_the_user_under_one_of_our_names_is_kept(run: Run, workspace: Path) -> None:
    path = write_uap(workspace / "cache" / "full_eps10.pt")
    content = path.read_bytes()
    command = ("attack-device", "--model", "full", "--uap", "cache/full_eps10.pt", "--json")
    rows = rows_of(run(*command, cwd=workspace))
    assert rows[1]["uap_sha256"] == sha256(path)
    assert path.read_bytes() == content


def test_in_a_new_workspace_it_builds_what_it_needs(run: Run, empty: Path, tiny: Tiny) -> None:
    command = ("attack-device", "--model", "pp4", "--uap", "cache/random_eps4.pt")
    outcome = succeeded(run(*command, cwd=empty))
    expected = {"full.pt", "pp4.pt", "pp4.onnx", "pp4.json", "random_eps4.pt"}
    state = artefacts(empty)
    assert state.keys() == expected
    finished = artefacts(tiny.root)
    assert {n: at[0] for n, at in state.items()} == {n: finished[n][0] for n in expected}
    assert "random sign" in outcome.out
    assert "train full" in outcome.err


def test_without_model_it_takes_what_is_exported(run: Run, workspace: Path) -> None:
    for name in PAPER_ORDER:
        if name not in ("sfp", "q3"):
            (workspace / "cache" / f"{name}.onnx").unlink()
    rows = rows_of(run("attack-device", "--uap", "cache/full_eps10.pt", "--json", cwd=workspace))
    assert [r["variant"] for r in rows] == ["sfp", "sfp", "q3", "q3"]


def test_the_workspace_can_be_moved(run: Run, workspace: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved to here"
    shutil.move(workspace, moved)
    measured = runs(moved)
    rows_of(run("attack-device", "--uap", "cache/full_eps10.pt", "--json", cwd=moved))
    assert runs(moved) == measured

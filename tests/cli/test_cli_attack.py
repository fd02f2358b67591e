"""`harness attack-device`: where it looks for UAPs, what it crafts, whose models it takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
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

from devices.session import DeviceSession
from harness.records import CONTROLS, PAPER_ORDER

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


def test_a_transfer_matrix_at_another_budget(run: Run, workspace: Path, tmp_path: Path) -> None:
    """Crafts what it lacks, in the workspace whatever lies in the current folder."""
    before = artefacts(workspace)
    command = ("attack-device", "--transfer", "6", "--model", "pp3", "--workspace", workspace)
    rows = rows_of(run(*command, "--json", cwd=tmp_path))
    sources = (*PAPER_ORDER, "fleet", *CONTROLS)
    assert written(before, artefacts(workspace)) == {f"{source}_eps6.pt" for source in sources}
    assert {(r["uap_source"], r["eps"]) for r in rows[1:]} == {(source, 6.0) for source in sources}
    page = tmp_path / "report"
    succeeded(run("report", "--workspace", workspace, "--out", page, cwd=tmp_path))
    assert "The same at \u03b5\u00a0=\u00a06/255" in (page / "index.html").read_text()


def test_a_perturbation_named_twice_is_one(run: Run, workspace: Path) -> None:
    (workspace / "cache" / "full_eps4.pt").unlink()  # so that something is crafted
    twice = ("--uap", "cache/full_eps4.pt", "--uap", workspace / "cache" / "full_eps4.pt")
    rows = rows_of(
        run("attack-device", *twice, "--transfer", "4", "--model", "pp3", "--json", cwd=workspace)
    )
    attacks = [row["uap_sha256"] for row in rows]
    assert len(attacks) == len(set(attacks)) == 1 + len(PAPER_ORDER) + 1 + len(CONTROLS)


def test_the_fleet_without_the_victim_and_more_seeds(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    craft = ("craft", "--model", "fleet_without_q4", "--model", "fleet", "--eps", "8")
    outcome = succeeded(run(*craft, "--seeds", "2", cwd=workspace))
    stems = [f"{s}_eps8{seed}" for s in ("fleet_without_q4", "fleet") for seed in ("_s1", "")]
    assert outcome.out.splitlines() == [f"cache/{stem}.pt" for stem in stems]
    assert written(before, artefacts(workspace)) == {f"{stem}.pt" for stem in stems}
    contents = [torch.load(workspace / "cache" / f"{s}.pt", weights_only=True) for s in stems]
    assert [c["seed"] for c in contents] == [1, 0, 1, 0]
    assert contents[0]["source"] == "fleet_without_q4"
    assert not torch.equal(contents[0]["delta"], contents[1]["delta"])
    command = ("attack-device", "--model", "q4", "--json", *uap_flags(stems[:2]))
    _, *rows = rows_of(run(*command, cwd=workspace))
    assert {(r["uap_source"], r["seed"]) for r in rows} == {("fleet_without_q4", s) for s in (0, 1)}
    assert {r["attack"] for r in rows} == {"momentum"}


def uap_flags(stems: list[str]) -> list[str]:
    return [word for stem in stems for word in ("--uap", f"cache/{stem}.pt")]


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


def test_a_dry_run_with_a_budget_says_so_long(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workspace))  # no board of somebody's
    command = ("attack-device", "--uap", "cache/full_eps4.pt", "--model", "q2", "--model", "q3")
    dry = ("--dry-run", "--json")

    def seconds(*options: str) -> list[float]:
        tasks = json.loads(succeeded(run(*command, *options, *dry, cwd=workspace)).out)
        return [t["estimated_seconds"] for t in tasks if t["stage"] == "evaluate"]

    # 200 forward passes of PyTorch are a second at most.
    for value in seconds("--device", "rpi4", "--budget", "10m"):
        assert 300 <= value <= 301
    assert seconds("--device", "rpi4") == [pytest.approx(150, abs=1.0)] * 2
    # This machine is not that slow.
    assert all(value <= 2 for value in seconds("--device", "local", "--budget", "10m"))


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


# --- samples ------------------------------------------------------------------------------------


LEAST = "0.000001s"
"""A budget that is spent by the first chunk."""
COUNT = 8
"""Images of the first chunk."""


def evaluated(root: Path) -> dict[tuple[str, str | None], list[int]]:
    """(model, UAP) -> position of every onnxruntime prediction in the store, repeats and all."""
    found: dict[tuple[str, str | None], list[int]] = {}
    rows = table(
        root,
        "SELECT model_sha256, uap_sha256, indices, length(predictions) FROM prediction_run"
        " WHERE runtime = 'onnxruntime' ORDER BY id",
    )
    for model, uap, indices, size in rows:
        where = range(size // 2) if indices is None else np.frombuffer(indices, "<u4").tolist()
        found.setdefault((model, uap), []).extend(where)
    return found


def test_a_budget_is_a_sample_that_a_larger_one_completes(
    run: Run, workspace: Path, tmp_path: Path
) -> None:
    write_onnx(workspace / "theirs.onnx")
    untouched = shutil.copytree(workspace, tmp_path / "untouched")
    other = write_onnx(workspace / "other.onnx", seed=6)
    command = ("attack-device", "--uap", "cache/full_eps10.pt", "--json")
    theirs = (*command, "--onnx", "theirs.onnx")
    sample = rows_of(run(*theirs, "--budget", LEAST, cwd=workspace))
    assert [(r["n"], r["uap_source"]) for r in sample] == [(COUNT, None), (COUNT, "full")]
    assert sample[0]["n_of"] > COUNT
    model = sha256(workspace / "theirs.onnx")
    images = {k: v for k, v in evaluated(workspace).items() if k[0] == model}
    first, *others = images.values()
    assert len(set(first)) == COUNT
    assert all(same == first for same in others)  # in pairs
    # Spent is spent: the same command measures nothing more.
    measured = runs(workspace)
    assert rows_of(run(*theirs, "--budget", LEAST, cwd=workspace)) == sample
    assert runs(workspace) == measured
    for_people = [argument for argument in theirs if argument != "--json"]
    assert f"{COUNT} of " in succeeded(run(*for_people, "--budget", LEAST, cwd=workspace)).out
    # Another model sees the same images.
    rows_of(run(*command, "--onnx", "other.onnx", "--budget", LEAST, cwd=workspace))
    assert evaluated(workspace)[sha256(other), None] == first
    # All the time it takes: the rest, once, and the row is as if it had been in one go.
    whole = rows_of(run(*theirs, "--budget", "1h", cwd=workspace))
    for positions in (v for k, v in evaluated(workspace).items() if k[0] == model):
        assert positions[:COUNT] == first
        assert sorted(positions) == list(range(whole[0]["n_of"]))
    assert [r["n"] == r["n_of"] for r in whole] == [True, True]
    at_once = rows_of(run(*theirs, cwd=untouched))
    for ours, other_row in zip(whole, at_once, strict=True):
        assert ours | {"created_at": ""} == other_row | {"created_at": ""}


def test_a_sample_is_corrected_by_what_pytorch_does_on_the_whole_set(
    run: Run, workspace: Path
) -> None:
    command = ("attack-device", "--model", "pp3", "--uap", "cache/q4_eps6.pt", "--json")
    clean, attacked = rows_of(run(*command, "--budget", LEAST, cwd=workspace))
    assert clean["n"] == clean["n_of"]  # from `harness run`
    assert attacked["n"] == COUNT
    everything = rows_of(run("results", "--json", cwd=workspace))
    of_torch = next(
        r
        for r in everything
        if (r["variant"], r["runtime"], r["uap_sha256"]) == ("pp3", "torch", attacked["uap_sha256"])
    )
    assert of_torch["n"] == of_torch["n_of"]
    assert attacked["uer_corrected"] == pytest.approx(of_torch["uer"] + attacked["uer_gap"])
    low, high = attacked["uer_corrected_low"], attacked["uer_corrected_high"]
    assert low < high
    assert low <= attacked["uer_corrected"] <= high
    text = succeeded(run(*command[:-1], "--budget", LEAST, cwd=workspace)).out
    assert "whole set" in text
    (_, whole) = rows_of(run(*command, cwd=workspace))  # `local` has no budget of its own
    assert whole["n"] == whole["n_of"]
    assert whole["uer_corrected"] is whole["uer_corrected_low"] is None
    assert low <= whole["uer"] <= high


def test_it_stops_when_the_interval_is_as_narrow_as_asked(run: Run, workspace: Path) -> None:
    write_onnx(workspace / "theirs.onnx")
    command = ("attack-device", "--onnx", "theirs.onnx", "--uap", "cache/full_eps10.pt", "--json")
    sizes = []
    for points in ("25", "20", "25", "0.001"):
        _, row = rows_of(run(*command, "--until-ci", points, cwd=workspace))
        sizes.append(row["n"])
        if row["n"] < row["n_of"]:
            assert 50 * (row["uer_high"] - row["uer_low"]) <= float(points)
    assert sizes[0] < sizes[1] == sizes[2] < sizes[3] == row["n_of"]


def test_a_device_that_dies_loses_nothing_that_was_stored(
    run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real runner, really killed: exit 5 says what is safe, and the next command goes on."""
    write_onnx(workspace / "theirs.onnx")
    model = sha256(workspace / "theirs.onnx")
    command = ("attack-device", "--onnx", "theirs.onnx", "--uap", "cache/full_eps10.pt", "--json")
    original = DeviceSession.predict

    def predict(self: DeviceSession, *arguments: Any, start: int, **named: Any) -> Any:
        if start >= COUNT:  # after the first chunk
            os.kill(self.pid, signal.SIGKILL)
        return original(self, *arguments, start=start, **named)

    with monkeypatch.context() as patched:
        patched.setattr(DeviceSession, "predict", predict)
        died = run(*command, "--budget", "1h", cwd=workspace)
    assert died.code == 5
    (line,) = [line for line in died.err.splitlines() if line.startswith("error:")]
    assert f"{COUNT} of " in line
    assert "safely stored" in line
    stored = {k: v for k, v in evaluated(workspace).items() if k[0] == model}
    assert [len(v) for v in stored.values()] == [COUNT, COUNT]
    rows = rows_of(run(*command, cwd=workspace))
    assert {r["n"] for r in rows} == {rows[0]["n_of"]}
    for positions in (v for k, v in evaluated(workspace).items() if k[0] == model):
        assert sorted(positions) == list(range(rows[0]["n_of"]))


def test_what_another_runtime_predicted_is_measured_again(run: Run, workspace: Path) -> None:
    write_onnx(workspace / "theirs.onnx")
    command = ("attack-device", "--onnx", "theirs.onnx", "--uap", "cache/full_eps10.pt", "--json")
    rows_of(run(*command, cwd=workspace))
    measured = runs(workspace)
    connection = sqlite3.connect(workspace / "results.db")
    connection.execute(
        "UPDATE prediction_run SET machine = json_set(machine, '$.runtime_version', '1.2.3')"
    )
    connection.commit()
    connection.close()
    rows = rows_of(run(*command, cwd=workspace))
    assert {r["n"] == r["n_of"] for r in rows} == {True}
    assert runs(workspace) == measured + 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--budget", value) for value in ("0", "-1m", "ten", "5d", "1e99h", "")),
        *(("--until-ci", value) for value in ("0", "-1", "51", "nan")),
        ("--latency", "slow"),
    ],
)
def test_a_budget_that_is_none_is_refused(
    run: Run, workspace: Path, option: str, value: str
) -> None:
    before = artefacts(workspace)
    command = ("attack-device", "--uap", "cache/full_eps10.pt")
    refused = run(*command, f"{option}={value}", cwd=workspace)
    assert refused.code == 2
    assert option in refused.err
    assert "Traceback" not in refused.err
    assert artefacts(workspace) == before


def test_an_emulated_device_has_no_latency_to_ask_for(run: Run, workspace: Path) -> None:
    command = ("attack-device", "--device", "rpi4", "--uap", "cache/full_eps10.pt")
    refused = run(*command, "--latency", "quick", cwd=workspace)
    assert refused.code == 2
    assert "emulated" in refused.err
    assert "harness devices add rpi4" in refused.err


def test_latency_is_measured_where_it_is_asked_for(run: Run, workspace: Path) -> None:
    write_onnx(workspace / "theirs.onnx")
    command = ("attack-device", "--onnx", "theirs.onnx", "--uap", "cache/full_eps10.pt", "--json")
    assert rows_of(run(*command, cwd=workspace))[0]["latency_p50_ms"] is None
    timed = rows_of(run(*command, "--latency", "quick", cwd=workspace))
    assert {r["latency_mode"] for r in timed} == {"quick"}
    assert all(r["latency_p50_ms"] > 0 for r in timed)

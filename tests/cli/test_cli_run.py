"""`harness run` at tiny scale, from an empty folder to the report, and what a change rebuilds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import (
    DATASET,
    EPS,
    EVALUATION_IMAGES,
    TARGETS,
    Outcome,
    Tiny,
    artefacts,
    contents,
    edit,
    harness,
    raw_predictions,
    succeeded,
    table,
    written,
)

from harness.records import CONTROLS, PAPER_ORDER, VARIANTS

Row = dict[str, Any]

# DESIGN, section 5.
FIELDS = re.findall(
    r"\w+",
    """
variant method dataset preset width protocol device emulated runtime machine uap_source uap_sha256
attack seed eps target n clean_accuracy uer uer_low uer_high uer_corrected uer_corrected_low
uer_corrected_high evasion_on_correct fooling_rate tsr tsr_excl_target latency_p50_ms
latency_p90_ms latency_verdict file_bytes params macs flops bops peak_rss_bytes torch_agreement
uer_gap created_at git_commit
""",
)


@pytest.fixture(scope="module")
def rows(tiny: Tiny) -> list[Row]:
    outcome = succeeded(harness("results", "--json", "--workspace", tiny.root, cwd=tiny.root))
    found = json.loads(outcome.out)
    assert isinstance(found, list)
    return found


def of_variant(names: set[str], variants: set[str]) -> set[str]:
    """The files that belong to one of the variants: sfp_eps10.pt, not sfp_cutout_eps10.pt."""

    def owner(name: str) -> str:
        return name.partition(".")[0].partition("_eps")[0]

    return {name for name in names if owner(name) in variants}


# --- the run itself ----------------------------------------------------------------------------


def test_stdout_is_the_path_of_the_report_and_nothing_else(tiny: Tiny) -> None:
    assert tiny.run.stdout == "report/index.html\n"
    assert (tiny.root / tiny.run.stdout.strip()).is_file()


def test_stderr_tells_progress_and_time_left(tiny: Tiny) -> None:
    lines = tiny.run.stderr.splitlines()
    for name in PAPER_ORDER:
        for work in (f"train {name}: ", f"export {name}: ", f"attack {name} on local: "):
            assert sum(line.startswith(work) for line in lines) == 1, work
    assert sum(" left" in line for line in lines) >= 10
    assert "\x1b" not in tiny.run.stderr  # not a terminal: plain lines
    assert "arning" not in tiny.run.stderr


def test_the_report_is_six_files_and_the_page_stands_alone(tiny: Tiny) -> None:
    names = {"index.html", "results.csv", "results.json", "report.md", "tables.tex"}
    names.add("masking.json")
    assert {path.name for path in (tiny.root / "report").iterdir()} == names
    page = (tiny.root / "report" / "index.html").read_text()
    for label in ("SFP+M", "PP3", "Q2"):
        assert label in page
    assert len(json.loads((tiny.root / "report" / "results.json").read_text())) == 440


def test_the_cache_holds_what_the_experiment_implies(tiny: Tiny) -> None:
    expected = {f"{v}{end}" for v in PAPER_ORDER for end in (".pt", ".onnx", ".json")}
    expected |= {f"{s}_eps{e}.pt" for s in (*PAPER_ORDER, *CONTROLS) for e in EPS}
    expected |= {f"{v}_eps10_t{t}.pt" for v in PAPER_ORDER for t in TARGETS}
    expected |= {"fleet_eps10.pt", *(f"fleet_without_{v}_eps10.pt" for v in PAPER_ORDER)}
    expected |= {f"{v}_eps{e}_fourier.pt" for v in PAPER_ORDER for e in EPS}
    assert set(artefacts(tiny.root)) == expected
    assert not list((tiny.root / "cache" / ".partial").glob("*"))  # and nothing unfinished


def test_uaps_stay_within_their_budget_on_whole_levels(tiny: Tiny) -> None:
    for path in (tiny.root / "cache").glob("*_eps*.pt"):
        content = torch.load(path, weights_only=True)
        levels = 255 * content["delta"].double()
        assert content["delta"].dtype == torch.float32
        assert content["dataset"] == DATASET
        assert levels.round().abs().max() <= content["eps"]
        assert (levels - levels.round()).abs().max() < 1e-4


# --- results -----------------------------------------------------------------------------------


def test_every_row_has_every_field(rows: list[Row]) -> None:
    for row in rows:
        assert set(FIELDS) <= row.keys()


KEYS = ("variant", "runtime", "uap_source", "eps", "target")


def test_rows_are_exactly_the_experiment(rows: list[Row]) -> None:
    expected = set()
    for victim in PAPER_ORDER:
        attacks: list[tuple[str | None, float | None, int | None]] = [(None, None, None)]
        attacks += [(source, e, None) for source in (*CONTROLS, victim) for e in EPS]
        attacks += [(source, 10, None) for source in PAPER_ORDER if source != victim]
        attacks += [(victim, 10, t) for t in TARGETS]
        attacks += [(source, 10, None) for source in ("fleet", f"fleet_without_{victim}")]
        assert len(attacks) == 1 + 4 + 2 + 9 + 2 + 2
        both = ("onnxruntime", "torch")
        expected |= {(victim, rt, *a, False) for a in attacks for rt in both}
        expected |= {
            (victim, rt, victim, e, None, True) for rt in both for e in EPS
        }  # without gradients
    found = [(*(r[key] for key in KEYS), r["attack"] == "fourier") for r in rows]
    assert len(found) == len(set(found)) == 440
    assert set(found) == expected


def test_what_is_absent_is_null(rows: list[Row]) -> None:
    under_attack = {"uer", "uer_low", "uer_high", "evasion_on_correct", "fooling_rate"}
    for row in rows:
        clean = row["uap_source"] is None
        assert row["n"] == EVALUATION_IMAGES
        assert row["dataset"] == DATASET
        assert (row["device"], row["emulated"]) == ("local", False)
        assert (row["width"], row["preset"]) == (4, "quickstart")
        for name in ("uap_sha256", "eps", "protocol", "attack"):
            assert (row[name] is None) == clean, name
        for name in under_attack - {"evasion_on_correct"}:
            assert (row[name] is None) == clean, name
        targeted = row["target"] is not None
        assert (row["tsr"] is None) == (row["tsr_excl_target"] is None) == (not targeted)
        on_device = row["runtime"] == "onnxruntime"
        assert (row["torch_agreement"] is not None) == on_device
        assert (row["uer_gap"] is not None) == (on_device and not clean)
        for name in ("latency_p50_ms", "latency_p90_ms", "latency_verdict", "peak_rss_bytes"):
            assert row[name] is None  # latency is off here
        for name in ("file_bytes", "params", "macs", "flops", "bops"):
            assert (row[name] is not None) == on_device
        if on_device:
            assert row["flops"] == 2 * row["macs"] > 0


def test_metrics_are_those_of_the_raw_predictions(tiny: Tiny, rows: list[Row]) -> None:
    raw = raw_predictions(tiny.root)
    ((blob,),) = table(tiny.root, "SELECT labels FROM evaluation_set")
    labels = np.frombuffer(blob, dtype="<u2").astype(int)
    with np.load(tiny.npz) as data:
        assert labels.tolist() == data["test_y"].tolist()
    for row in rows:
        model, uap, runtime = row["model_sha256"], row["uap_sha256"], row["runtime"]
        predicted, clean = raw[model, uap, runtime], raw[model, None, runtime]
        right = clean == labels
        assert row["clean_accuracy"] == pytest.approx(right.mean())
        if uap is not None:
            assert row["uer"] == pytest.approx((predicted != labels).mean())
            assert row["uer_low"] <= row["uer"] <= row["uer_high"]
            assert row["fooling_rate"] == pytest.approx((predicted != clean).mean())
            assert row["evasion_on_correct"] == pytest.approx((predicted != labels)[right].mean())
        if (target := row["target"]) is not None:
            assert row["tsr"] == pytest.approx((predicted == target).mean())
            others = labels != target
            assert row["tsr_excl_target"] == pytest.approx((predicted == target)[others].mean())
        if runtime == "onnxruntime":
            reference = raw[model, uap, "torch"]
            assert row["torch_agreement"] == pytest.approx((predicted == reference).mean())
            if uap is not None:
                gap = (predicted != labels).mean() - (reference != labels).mean()
                assert row["uer_gap"] == pytest.approx(gap)


def test_the_exported_file_predicts_what_pytorch_predicts(rows: list[Row]) -> None:
    for row in rows:
        if row["runtime"] == "onnxruntime":
            assert row["torch_agreement"] >= (1.0 if row["method"] == "apot" else 0.99)


def test_compressed_files_cost_less(rows: list[Row]) -> None:
    cost = {r["variant"]: r for r in rows if r["runtime"] == "onnxruntime"}
    for name in ("sfp", "sfp_mixup", "sfp_cutout", "pp2", "pp3", "pp4"):
        assert cost[name]["macs"] < cost["full"]["macs"]
        assert cost[name]["params"] < cost["full"]["params"]
    for name in ("q2", "q3", "q4"):
        assert cost[name]["file_bytes"] < cost["full"]["file_bytes"] / 2
        assert cost[name]["bops"] < cost["full"]["bops"]


def test_results_can_be_narrowed(run: Callable[..., Outcome], tiny: Tiny) -> None:
    chosen = run("results", "--json", "--model", "q4", "--runtime", "torch", cwd=tiny.root)
    narrowed = json.loads(succeeded(chosen).out)
    assert len(narrowed) == 22
    assert {(r["variant"], r["runtime"]) for r in narrowed} == {("q4", "torch")}
    for_people = succeeded(run("results", "--model", "q4", cwd=tiny.root))
    listed, _, below = for_people.out.partition("\ngradient masking\n")
    assert len(listed.splitlines()) == 1 + 44
    assert [line.split()[:2] for line in below.splitlines()] == [["model", "eps"], ["Q4", "10"]]
    assert for_people.err == ""


def test_the_report_can_be_written_elsewhere(
    run: Callable[..., Outcome], workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere"
    outcome = succeeded(run("report", "--out", out, "--json", cwd=workspace))
    paths = json.loads(outcome.out)
    assert set(paths) == {"html", "csv", "json", "markdown", "latex", "masking"}
    assert all(Path(path).parent == out and Path(path).stat().st_size for path in paths.values())
    assert not (workspace / "report").exists()


# --- what a second run does --------------------------------------------------------------------


def test_a_second_run_builds_nothing(workspace: Path) -> None:
    before, stored = artefacts(workspace), table(workspace, "SELECT * FROM prediction_run")
    outcome = succeeded(harness("run", cwd=workspace))
    assert outcome.err.splitlines() == ["105 already built and still valid: not built again"]
    assert outcome.out == "report/index.html\n"
    assert artefacts(workspace) == before
    assert table(workspace, "SELECT * FROM prediction_run") == stored


def test_a_sample_on_the_device_and_then_all(workspace: Path) -> None:
    """eval.device_images: PyTorch sees every image, exported models some, and later the rest."""
    config = workspace / "harness.toml"
    whole = config.read_text()
    assert "images = 100" in whole
    (workspace / "results.db").unlink()
    config.write_text(whole.replace("images = 100", "images = 100\ndevice_images = 40"))
    command = ("run", "--model", "full", "--model", "q4")
    assert succeeded(harness(*command, cwd=workspace)).out == "report/index.html\n"
    rows = json.loads(succeeded(harness("results", "--json", cwd=workspace)).out)
    seen = {(row["runtime"], row["n"], row["n_of"]) for row in rows}
    assert seen == {("torch", 100, 100), ("onnxruntime", 40, 100)}
    # PyTorch and the device agree on these images: what PyTorch says of all is what is reported.
    torch_uer = {
        (row["variant"], row["uap_sha256"]): row["uer"] for row in rows if row["runtime"] == "torch"
    }
    attacked = [r for r in rows if r["runtime"] == "onnxruntime" and r["uap_sha256"] is not None]
    assert len(attacked) == len(torch_uer) - 2
    for row in attacked:
        assert row["torch_agreement"] == 1.0
        assert row["uer_corrected"] == pytest.approx(torch_uer[row["variant"], row["uap_sha256"]])
        assert row["uer_corrected_low"] <= row["uer_corrected"] <= row["uer_corrected_high"]
    again = succeeded(harness(*command, cwd=workspace)).err.splitlines()
    assert again[-1].endswith("not built again")
    config.write_text(whole)
    runs = len(table(workspace, "SELECT id FROM prediction_run"))
    succeeded(harness(*command, cwd=workspace))
    rows = json.loads(succeeded(harness("results", "--json", cwd=workspace)).out)
    assert {(row["runtime"], row["n"]) for row in rows} == {("torch", 100), ("onnxruntime", 100)}
    added = table(workspace, "SELECT * FROM prediction_run")[runs:]
    assert len(added) == len(attacked) + 2, "PyTorch's runs are not made again"


def test_of_some_variants_only_what_they_need_and_no_fleet(empty: Path, tiny: Tiny) -> None:
    plan = ("plan", "--model", "pp3", "--model", "q4", "--json")
    planned = {row["task"] for row in json.loads(succeeded(harness(*plan, cwd=empty)).out)}
    assert artefacts(empty) == {}
    outcome = succeeded(harness("run", "--model", "pp3", "--model", "q4", cwd=empty))
    assert outcome.out == "report/index.html\n"
    done = {line.partition(":")[0] for line in outcome.err.splitlines() if ": " in line}
    assert {name for name in planned if name.startswith(("train", "export", "attack"))} <= done
    # Both start from Full, which is trained for them, and neither exported nor attacked.
    expected = {
        "full.pt",
        *(f"{v}{end}" for v in ("pp3", "q4") for end in (".pt", ".onnx", ".json")),
    }
    expected |= {f"{s}_eps{e}.pt" for s in ("pp3", "q4", *CONTROLS) for e in EPS}
    expected |= {f"{v}_eps10_t{t}.pt" for v in ("pp3", "q4") for t in TARGETS}
    expected |= {f"{v}_eps{e}_fourier.pt" for v in ("pp3", "q4") for e in EPS}
    made = artefacts(empty)
    assert set(made) == expected
    files = json.loads((empty / "report" / "results.json").read_text())
    assert {row["variant"] for row in files} == {"pp3", "q4"}
    # The same files as of a run of all: that takes them as they are.
    whole = contents(artefacts(tiny.root))
    same = {name for name in made if name.endswith(".pt")}
    assert {name: contents(made)[name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.parametrize("jobs", [1, 3])
def test_side_by_side_or_one_by_one_the_bytes_are_the_same(
    jobs: int,
    run: Callable[..., Outcome],
    empty: Path,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the tiny workspace, trained in a process of its own with a job for every core."""
    monkeypatch.setattr("harness.pipeline.context.jobs_for", lambda _accelerator: jobs)
    succeeded(run("train", "--all", cwd=empty))
    trained = contents(artefacts(empty))
    assert trained.keys() == {f"{name}.pt" for name in PAPER_ORDER}
    assert trained.items() <= contents(artefacts(tiny.root)).items()


def test_another_eps_adds_uaps_and_evaluations_only(workspace: Path) -> None:
    before = artefacts(workspace)
    ((count,),) = table(workspace, "SELECT count(*) FROM prediction_run")
    edit(workspace, "eps = [4, 10]", "eps = [4, 6.5, 10]")
    succeeded(harness("run", cwd=workspace))
    after = artefacts(workspace)
    crafted = {f"{s}_eps6.5.pt" for s in (*PAPER_ORDER, *CONTROLS)}
    searched = {f"{s}_eps6.5_fourier.pt" for s in PAPER_ORDER}
    assert written(before, after) == crafted | searched
    # Each victim under its own new UAP and both controls, by both runtimes.
    ((now,),) = table(workspace, "SELECT count(*) FROM prediction_run")
    assert now - count == 10 * 4 * 2


def test_another_learning_rate_of_pp_rebuilds_exactly_pp(
    run: Callable[..., Outcome], workspace: Path
) -> None:
    before = artefacts(workspace)
    edit(workspace, "pp_epochs = 1", "pp_epochs = 1\npp_lr = 0.02")
    succeeded(run("export", "--all", cwd=workspace))
    controls = ("--control", "random", "--control", "chessboard")
    succeeded(run("craft", "--all", *controls, cwd=workspace))
    after = artefacts(workspace)
    assert before.keys() == after.keys()
    pruned = {"pp2", "pp3", "pp4"}
    assert written(before, after) == of_variant(set(before), pruned)
    for name in pruned:
        assert before[f"{name}.pt"][0] != after[f"{name}.pt"][0]
        assert before[f"{name}.onnx"][0] != after[f"{name}.onnx"][0]
    # Rows describe what is there now: none of the model that was.
    command = ("attack-device", "--model", "pp3", "--uap", "cache/pp3_eps10.pt")
    succeeded(run(*command, cwd=workspace))
    found = json.loads(succeeded(run("results", "--model", "pp3", "--json", cwd=workspace)).out)
    assert [(r["runtime"], r["uap_source"], r["eps"]) for r in found] == [
        *(("onnxruntime", None, None), ("onnxruntime", "pp3", 10)),
        *(("torch", None, None), ("torch", "pp3", 10)),
    ]
    assert all(cached(run, workspace)[f"craft {v}_eps10"] for v in PAPER_ORDER)


def cached(run: Callable[..., Outcome], root: Path) -> dict[str, bool]:
    outcome = succeeded(run("plan", "--json", cwd=root))
    return {task["task"]: task["cached"] for task in json.loads(outcome.out)}


def test_a_parent_from_elsewhere_rebuilds_its_children(
    run: Callable[..., Outcome], workspace: Path
) -> None:
    """The same key on other weights: what another machine or library version would train."""
    path = workspace / "cache" / "full.pt"
    content = torch.load(path, weights_only=True)
    for tensor in content["weights"].values():
        if tensor.is_floating_point():
            tensor.mul_(1.01)
    torch.save(content, path)
    children = {v.name for v in VARIANTS if v.parent is not None}
    from_scratch = {v.name for v in VARIANTS if v.parent is None}
    plan = cached(run, workspace)
    for name in PAPER_ORDER:
        assert plan[f"train {name}"] == (name in from_scratch)
        assert plan[f"export {name}"] == (name in from_scratch - {"full"})
        for stem in (f"{name}_eps4", f"{name}_eps10", f"{name}_eps10_t0"):
            assert plan[f"craft {stem}"] == (name in from_scratch - {"full"})
    assert plan["craft random_eps10"]
    before = artefacts(workspace)
    succeeded(run("train", "--all", cwd=workspace))
    assert written(before, artefacts(workspace)) == {f"{name}.pt" for name in children}
    assert all(done for task, done in cached(run, workspace).items() if task.startswith("train"))


def test_a_parent_of_another_seed_is_trained_again_to_the_same_bytes(
    run: Callable[..., Outcome], workspace: Path, empty: Path
) -> None:
    """Then its children, which came from those very bytes, are still valid."""
    (empty / "harness.toml").write_text("seed = 1\n" + (empty / "harness.toml").read_text())
    succeeded(run("train", "--model", "full", cwd=empty))
    before = artefacts(workspace)
    other = empty / "cache" / "full.pt"
    assert contents(artefacts(empty))["full.pt"] != before["full.pt"][0]
    shutil.copy(other, workspace / "cache" / "full.pt")
    assert not cached(run, workspace)["train full"]
    succeeded(run("train", "--all", cwd=workspace))
    assert contents(artefacts(workspace)) == contents(before)
    assert written(before, artefacts(workspace)) == {"full.pt"}
    assert all(cached(run, workspace).values())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no manifest"])
def test_a_damaged_export_is_exported_again(
    damage: str, run: Callable[..., Outcome], workspace: Path
) -> None:
    before = artefacts(workspace)
    model = workspace / "cache" / "q4.onnx"
    content = bytearray(model.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        model.write_bytes(content)
    elif damage == "truncated":
        model.write_bytes(content[:1000])
    else:
        model.with_suffix(".json").unlink()
    outcome = succeeded(run("export", "--all", cwd=workspace))
    said = "exporting q4 again" in outcome.err and "is not the file" in outcome.err
    assert said == (damage != "no manifest")
    assert contents(artefacts(workspace)) == contents(before)


def test_a_deleted_artefact_comes_back_the_same(
    run: Callable[..., Outcome], workspace: Path
) -> None:
    before = artefacts(workspace)
    for name in ("pp3.pt", "q2.onnx", "sfp_eps10_t1.pt", "chessboard_eps4.pt"):
        (workspace / "cache" / name).unlink()
    succeeded(run("run", "--dry-run", cwd=workspace))
    succeeded(run("export", "--all", cwd=workspace))
    succeeded(run("craft", "--all", "--control", "chessboard", cwd=workspace))
    assert contents(artefacts(workspace)) == contents(before)


def test_latency_is_measured_and_reported(run: Callable[..., Outcome], workspace: Path) -> None:
    """One model through the API: the whole experiment would take fifty processes."""
    from devices.local import LocalDevice
    from harness.pipeline.context import Context
    from harness.pipeline.experiment import variant_victim
    from harness.pipeline.latency import latency_task
    from harness.workspace import open_workspace

    edit(workspace, 'mode = "off"', 'mode = "quick"')
    context = Context(open_workspace(workspace), torch.device("cpu"))
    uap = context.workspace.cache / "full_eps4.pt"
    task = latency_task(context, [variant_victim(context, "q4")], LocalDevice(), uap=uap)
    assert not task.is_done()
    # Five processes of one model: 0.1 s to warm up, 0.25 s measured, a second to start each.
    assert (task.work, task.known_s) == (0.0, pytest.approx(5 * (0.1 + 0.25 + 1.0)))
    seen: list[float] = []
    task.run(lambda fraction, _note: seen.append(fraction))
    assert task.is_done()
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    outcome = succeeded(run("results", "--json", cwd=workspace))
    for row in json.loads(outcome.out):
        timed = row["variant"] == "q4" and row["runtime"] == "onnxruntime"
        for name in ("latency_p50_ms", "latency_p90_ms", "latency_verdict", "peak_rss_bytes"):
            assert (row[name] is not None) == timed
        if timed:
            assert 0 < row["latency_p50_ms"] <= row["latency_p90_ms"]
            assert row["latency_mode"] == "quick"
    stored = table(workspace, "SELECT processes FROM latency_run")
    samples = [process["samples_ns"] for (part,) in stored for process in json.loads(part)]
    assert len(samples) == len(stored) == 5  # stored as they finish: a kill loses one at most
    assert all(len(part) >= 30 for part in samples)

"""`harness export --verify`, `--tune` and `--compat` on a finished tiny workspace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from cli_cases import (
    Outcome,
    Tiny,
    artefacts,
    contents,
    edit,
    error_line,
    succeeded,
    table,
    written,
)

from harness.records import PAPER_ORDER

Run = Callable[..., Outcome]


def test_verify_proves_every_variant_from_its_files(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    outcome = succeeded(run("export", "--verify", "--all", "--images", 12, "--json", cwd=workspace))
    proofs: list[dict[str, Any]] = json.loads(outcome.out)
    assert [proof["variant"] for proof in proofs] == list(PAPER_ORDER)
    for proof in proofs:
        agreement = proof["agreement"]
        assert proof["proved"] is True
        assert proof["problems"] == []
        assert (proof["images_clean"], proof["images_attacked"]) == (12, 12)
        assert proof["file"] == f"{proof['variant']}.onnx"
        assert proof["attacked_by"] == f"{proof['variant']}_eps10.pt"
        settings = {tuple(how.values()) for how in agreement["settings"]}
        assert settings == {(t, o, b) for t in (1, 2) for o in (True, False) for b in (1, 128)}
        assert agreement["argmax_agreement"] == 1.0
        quantised = proof["variant"].startswith("q")
        assert len(agreement["layers"]) == (2 * 19 if quantised else 8)
        assert len(proof["margins"]) == (19 if quantised else 0)
        file = workspace / "cache" / f"{proof['variant']}.onnx"
        assert proof["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert artefacts(workspace) == before


def test_verify_of_one_variant_prints_its_layers(run: Run, workspace: Path) -> None:
    out = succeeded(run("export", "--verify", "--model", "q4", "--images", 4, cwd=workspace)).out
    assert out.startswith("q4: proved\n")
    assert "0 of" in out
    assert "no 8-bit saturation on AVX2" in out
    assert "blocks.7.conv2" in out


@pytest.mark.parametrize("damage", ["onnx", "truncated", "checkpoint", "cost"])
def test_verify_does_not_believe_a_changed_file(run: Run, workspace: Path, damage: str) -> None:
    cache = workspace / "cache"
    manifest = json.loads((cache / "q3.json").read_text())
    if damage == "onnx":  # one byte of a weight, hash in the manifest made to match
        model = onnx.load(cache / "q3.onnx")
        codes = next(t for t in model.graph.initializer if t.name.endswith("conv1.weight_scale"))
        raw = bytearray(codes.raw_data)
        raw[2] ^= 0x40
        codes.raw_data = bytes(raw)
        content = model.SerializeToString()
        (cache / "q3.onnx").write_bytes(content)
        manifest["sha256"] = hashlib.sha256(content).hexdigest()
        (cache / "q3.json").write_text(json.dumps(manifest))
    elif damage == "truncated":
        (cache / "q3.onnx").write_bytes((cache / "q3.onnx").read_bytes()[:-100])
    elif damage == "checkpoint":
        (cache / "q3.pt").write_bytes((cache / "q2.pt").read_bytes())
    else:
        manifest["cost"]["macs"] -= 1
        (cache / "q3.json").write_text(json.dumps(manifest))
    outcome = run("export", "--verify", "--model", "q3", "--images", 8, cwd=workspace)
    assert outcome.code == 1
    assert outcome.out.startswith("q3: NOT PROVED\n")
    expected = {
        "onnx": "codes differ",
        "truncated": "is not the file that",
        "checkpoint": "another checkpoint",
        "cost": "cost card",
    }
    assert expected[damage] in outcome.out


def test_verify_needs_an_export(run: Run, empty: Path) -> None:
    outcome = run("export", "--verify", "--model", "sfp", cwd=empty)
    assert outcome.code == 2
    assert "harness export --model sfp" in outcome.err
    assert not (empty / "cache").exists()


def test_verify_proves_the_compat_file(run: Run, workspace: Path) -> None:
    succeeded(run("export", "--compat", "--model", "q4", cwd=workspace))
    before = artefacts(workspace)
    command = ("export", "--verify", "--compat", "--model", "q4", "--images", 8)
    said = succeeded(run(*command, cwd=workspace)).out
    assert said.startswith("q4_compat: proved\n")
    (proof,) = json.loads(succeeded(run(*command, "--json", cwd=workspace)).out)
    assert (proof["variant"], proof["file"]) == ("q4", "q4_compat.onnx")
    assert proof["proved"] is True
    file = workspace / "cache" / "q4_compat.onnx"
    assert proof["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert proof["sha256"] != hashlib.sha256((workspace / "cache/q4.onnx").read_bytes()).hexdigest()
    assert proof["agreement"]["code_mismatches"] == 0
    assert proof["agreement"]["codes_compared"] > 0
    assert len(proof["margins"]) == 19
    assert artefacts(workspace) == before
    # The packed file under its name, manifest and all, is found out.
    for end in ("onnx", "json"):
        (workspace / f"cache/q4_compat.{end}").write_bytes(
            (workspace / f"cache/q4.{end}").read_bytes()
        )
    outcome = run(*command, cwd=workspace)
    assert outcome.code == 1
    assert outcome.out.startswith("q4_compat: NOT PROVED\n")
    assert "harness.toml asks for another file" in outcome.out


def test_verify_needs_the_compat_file(run: Run, workspace: Path) -> None:
    outcome = run("export", "--verify", "--compat", "--model", "q4", cwd=workspace)
    assert outcome.code == 2
    assert error_line(outcome) == (
        "error: no cache/q4_compat.onnx: run `harness export --compat --model q4` first"
    )
    assert outcome.out == ""


def test_compat_writes_plain_bytes_beside_the_experiment(run: Run, workspace: Path) -> None:
    before = artefacts(workspace)
    out = succeeded(run("export", "--model", "q2", "--compat", cwd=workspace)).out
    assert out == "cache/q2_compat.onnx\n"
    after = artefacts(workspace)
    assert written(before, after) == {"q2_compat.onnx", "q2_compat.json"}
    model = onnx.load(workspace / "cache" / "q2_compat.onnx")
    assert not any(node.op_type == "Mod" for node in model.graph.node)
    assert max(o.version for o in model.opset_import) == 13
    attacked = succeeded(
        run(
            *("attack-device", "--uap", "cache/full_eps10.pt", "--json"),
            *("--onnx", "cache/q2_compat.onnx", "--model", "q2"),
            cwd=workspace,
        )
    )
    rows = {(row["variant"], row["uap_source"]): row for row in json.loads(attacked.out)}
    for uap in (None, "full"):
        assert rows["q2_compat", uap]["uer"] == rows["q2", uap]["uer"]
        assert rows["q2_compat", uap]["clean_accuracy"] == rows["q2", uap]["clean_accuracy"]
    again = succeeded(run("export", "--model", "q2", "--compat", cwd=workspace))
    assert "already built" in again.err


def test_tune_measures_and_exports_what_is_faster(run: Run, workspace: Path) -> None:
    succeeded(run("export", "--model", "q4", "--tune", cwd=workspace))
    tuning = json.loads((workspace / "cache/tuning.json").read_text())
    layers = tuning["variants"]["q4"]["layers"]
    assert len(layers) == 19
    fastest = {name: min(times, key=times.get) for name, times in layers.items()}
    manifest = json.loads((workspace / "cache/q4.json").read_text())
    assert manifest["tuned_kernels"] == fastest
    memory = manifest["memory"]
    assert 10_000_000 < memory["rss_load_bytes"] <= memory["rss_peak_bytes"]
    model = onnx.load(workspace / "cache/q4.onnx")
    for form, op in (("float", "Conv"), ("matmul", "MatMulInteger")):
        found = {node.name for node in model.graph.node if node.op_type == op} - {"stem"}
        assert found == {name for name, chosen in fastest.items() if chosen == form}
    # The choice stays: nothing is measured or exported again until asked for.
    before = artefacts(workspace)
    succeeded(run("export", "--all", cwd=workspace))
    assert artefacts(workspace) == before


def test_a_measured_choice_decides_the_file(run: Run, workspace: Path, tiny: Tiny) -> None:
    """The same times give the same bytes; a damaged file of times is one line."""
    path = workspace / "cache" / "tuning.json"
    succeeded(run("export", "--model", "q4", "--tune", cwd=workspace))
    measured = json.loads(path.read_text())
    measured["variants"]["q4"]["layers"] = {"blocks.0.conv1": {"integer": 2, "float": 1}}
    path.write_text(json.dumps(measured))
    succeeded(run("export", "--all", cwd=workspace))
    changed = written(contents_only(artefacts(tiny.root)), contents_only(artefacts(workspace)))
    assert changed == {"q4.onnx", "q4.json", "tuning.json"}
    # Times of another onnxruntime say nothing: the default form again.
    measured["variants"]["q4"]["conditions"]["onnxruntime"] = "1.0"
    path.write_text(json.dumps(measured))
    succeeded(run("export", "--all", cwd=workspace))
    default = contents(artefacts(tiny.root))
    assert contents(artefacts(workspace))["q4.onnx"] == default["q4.onnx"]
    path.write_text("{")
    outcome = run("export", "--all", cwd=workspace)
    assert outcome.code == 2
    assert "tuning.json is damaged" in outcome.err
    path.unlink()
    succeeded(run("export", "--all", cwd=workspace))
    assert contents(artefacts(workspace)) == contents(artefacts(tiny.root))


def contents_only(state: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    return {name: (digest, 0) for name, (digest, _) in state.items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--verify", "--tune", "--all"], "exclude each other"),
        (["--compat", "--check", "x.onnx"], "exclude each other"),
        (["--compat", "--tune", "--verify", "--all"], "exclude each other"),
        (["--compat", "--tune", "--all"], "exclude each other"),
        (["--verify", "--all", "--dry-run"], "--dry-run"),
        (["--all", "--images", "5"], "--images belongs to --verify"),
        (["--tune", "--model", "full"], "name q2, q3 or q4"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, empty: Path, options: list[str], said: str
) -> None:
    outcome = run("export", *options, cwd=empty)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (empty / "cache").exists()


def test_verify_says_when_the_configuration_asks_for_another_file(
    run: Run, workspace: Path
) -> None:
    edit(workspace, "[eval]", "[export]\nalign = 2\n\n[eval]")
    outcome = run("export", "--verify", "--model", "full", "--images", 4, cwd=workspace)
    assert outcome.code == 1
    assert "harness.toml asks for another file" in outcome.out


def test_what_was_measured_on_an_earlier_export_is_said_to_be_kept(
    run: Run, workspace: Path
) -> None:
    assert "Kept and not shown" not in succeeded(run("results", cwd=workspace)).err
    before = (workspace / "cache" / "sfp.onnx").read_bytes()
    edit(workspace, "[eval]", "[export]\nalign = 4\n\n[eval]")
    succeeded(run("export", "--model", "sfp", cwd=workspace))
    assert (workspace / "cache" / "sfp.onnx").read_bytes() != before
    ((measured,),) = table(
        workspace,
        "SELECT count(*) FROM prediction_run JOIN model ON model_sha256 = model.sha256"
        " WHERE variant = 'sfp'",
    )
    plan = succeeded(run("plan", cwd=workspace)).out
    assert "Measured before, as another file: sfp. " in plan
    attack = ("attack-device", "--uap", "cache/full_eps10.pt", "--model", "sfp")
    succeeded(run(*attack, cwd=workspace))
    assert "as another file" not in succeeded(run("plan", cwd=workspace)).out
    said = succeeded(run("results", "--json", cwd=workspace))
    expected = f"Kept and not shown: runs on files exported earlier ({measured:,} of sfp)\n"
    assert said.err == expected
    sources = {row["uap_source"] for row in json.loads(said.out) if row["variant"] == "sfp"}
    assert sources == {None, "full"}
    kept = table(workspace, "SELECT manifest FROM model WHERE variant = 'sfp'")
    assert [json.loads(manifest)["training"] for (manifest,) in kept] == ["2 epochs, one_cycle"] * 2

"""`harness export --check FILE.onnx`: what it prints, how it ends, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_cases import Outcome, environment, error_line, snapshot, succeeded, write_onnx
from onnx import TensorProto, helper, numpy_helper

Run = Callable[..., Outcome]
KEYS = {"file", "rule", "severity", "node", "cost", "remedy", "numbers"}


def write_saturating(path: Path, *, node: str = "products", layers: int = 1) -> Path:
    """Matrix products u8 x s8 at full range."""
    weight = np.full((16, 10), 127, dtype=np.int8)
    nodes = [
        helper.make_node("MatMulInteger", ["image", "w"], [f"y{i}"], name=f"{node}{i}")
        for i in range(layers)
    ]
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16])],
        [helper.make_tensor_value_info("y0", TensorProto.INT32, ["N", 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    imports = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=7), path)
    return path


def test_a_file_without_errors_ends_with_0(run: Run, tmp_path: Path) -> None:
    write_onnx(tmp_path / "theirs.onnx")
    before = snapshot(tmp_path)
    outcome = succeeded(run("export", "--check", "theirs.onnx", cwd=tmp_path))
    assert outcome.err == ""
    assert outcome.out.splitlines()[0] == "theirs.onnx: 1 note"
    assert "  note newer_than_needed\n" in outcome.out
    assert "    remedy: declare opset 13" in outcome.out
    assert snapshot(tmp_path) == before  # no workspace, nothing written


def test_errors_end_with_1_and_files_are_apart(run: Run, tmp_path: Path) -> None:
    write_onnx(tmp_path / "good.onnx")
    write_saturating(tmp_path / "bad.onnx", layers=7)
    outcome = run("export", "--check", "good.onnx", "--check", "bad.onnx", cwd=tmp_path)
    assert (outcome.code, outcome.err) == (1, "")
    good, bad = outcome.out.split("bad.onnx: ")
    assert good.startswith("good.onnx: ")
    assert "saturation" not in good
    assert bad.startswith("7 errors, ")
    assert "  error saturation (7)\n    products0: MatMulInteger u8 x s8: 10 of 10 filters" in bad
    assert f"{2 * 255 * 127:,}" in bad
    assert "products4: " in bad
    assert "products5: " not in bad
    assert "and 2 more (--json lists them)" in bad
    assert bad.count("remedy: store 7-bit weights") == 1


def test_json(run: Run, tmp_path: Path) -> None:
    write_onnx(tmp_path / "good.onnx")
    write_saturating(tmp_path / "bad.onnx", layers=7)
    outcome = run("export", "--json", "--check", "good.onnx", "--check", "bad.onnx", cwd=tmp_path)
    assert (outcome.code, outcome.err) == (1, "")
    findings = json.loads(outcome.out)
    assert all(finding.keys() == KEYS for finding in findings)
    assert [f["file"] for f in findings] == sorted((f["file"] for f in findings), reverse=True)
    errors = [f for f in findings if f["severity"] == "error"]
    assert [f["node"] for f in errors] == [f"products{i}" for i in range(7)]
    assert errors[0]["numbers"]["largest_pair_sum"] == 2 * 255 * 127


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.onnx", None, "cannot read the model missing.onnx: No such file"),
        (".", None, ". is not a file"),
        ("empty.onnx", b"", "empty.onnx is empty"),
        ("text.onnx", b"hello\n", "text.onnx: not an ONNX model"),
        ("text.onnx", b"", "is empty"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    run: Run, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    write_saturating(tmp_path / "bad.onnx")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = run("export", "--check", "bad.onnx", "--check", name, cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.out.startswith("bad.onnx: 1 error")
    assert says in error_line(outcome)


def test_external_data(run: Run, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(write_onnx(tmp_path / "whole.onnx")),
        tmp_path / "split.onnx",
        save_as_external_data=True,
        size_threshold=0,
    )
    outcome = run("export", "--check", "split.onnx", cwd=tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert "save it as one file" in error_line(outcome)


def test_too_big(run: Run, tmp_path: Path) -> None:
    from devices.model_file import MAX_MODEL_BYTES

    with (tmp_path / "big.onnx").open("wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)  # a hole: nothing is stored
    outcome = run("export", "--check", "big.onnx", cwd=tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert str(MAX_MODEL_BYTES) in error_line(outcome)


@pytest.mark.parametrize("options", ["--all", "--model q4", "--dry-run"])
def test_checking_builds_nothing(run: Run, tmp_path: Path, options: str) -> None:
    write_onnx(tmp_path / "theirs.onnx")
    outcome = run("export", "--check", "theirs.onnx", *options.split(), cwd=tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--check builds nothing" in error_line(outcome)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.onnx"]


def test_names_from_strangers_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    write_saturating(tmp_path / "bad.onnx", node="\x1b[2J\x07wiped\n")
    outcome = run("export", "--check", "bad.onnx", cwd=tmp_path)
    assert outcome.code == 1
    assert "wiped" in outcome.out
    assert "\x1b" not in outcome.out
    assert "\x07" not in outcome.out
    assert "wiped\n" not in outcome.out


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    write_onnx(tmp_path / "theirs.onnx")
    code = (
        "import sys\n"
        "from harness.cli.main import main\n"
        "sys.argv = ['harness', 'export', '--check', 'theirs.onnx', '--json']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        "heavy = {'torch', 'torchvision', 'onnxruntime'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
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


def test_our_own_exports_have_no_errors(run: Run, workspace: Path) -> None:
    files = sorted((workspace / "cache").glob("*.onnx"))
    assert len(files) == 10
    checks = [word for path in files for word in ("--check", path)]
    findings = json.loads(succeeded(run("export", "--json", *checks, cwd=workspace)).out)
    assert {finding["rule"] for finding in findings} <= {
        "masked_not_slim",
        "unaligned_channels",
        "duplicate_initializers",
    }


def test_a_file_that_cannot_be_read_does_not_hide_the_others(run: Run, tmp_path: Path) -> None:
    write_saturating(tmp_path / "theirs.onnx")
    (tmp_path / "torn.onnx").write_bytes(b"torn")
    outcome = run(
        *("export", "--check", "torn.onnx", "--check", "gone.onnx", "--check", "theirs.onnx"),
        cwd=tmp_path,
    )
    assert "saturation" in outcome.out
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert ["torn.onnx" in errors[0], "gone.onnx" in errors[1], len(errors)] == [True, True, 2]
    assert outcome.code != 0

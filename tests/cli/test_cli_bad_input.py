"""Bad input: one clear line, the right exit code, nothing written, nothing executed.

Most of the table runs in this process; `test_as_a_user_sees_it` repeats some of it in a child.
"""

from __future__ import annotations

import fcntl
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_cases import (
    SHAPE,
    Outcome,
    Tiny,
    edit,
    error_line,
    harness,
    snapshot,
    uap_content,
    write_onnx,
    write_uap,
)
from onnx import TensorProto

from devices.model_file import MAX_MODEL_BYTES

FAILED, USAGE = 1, 2
Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Case:
    """A command, what is wrong with its input, and how it must end."""

    name: str
    command: str
    """`{dir}` is a folder for files from elsewhere, beside the workspace."""
    says: tuple[str, ...]
    """Parts of the error line."""
    code: int = USAGE
    prepare: Callable[[Path, Path], object] = field(default=lambda workspace, folder: None)
    """(workspace, folder): puts the bad input there."""


def check(run: Run, case: Case, *, workspace: Path, folder: Path) -> None:
    case.prepare(workspace, folder)
    before = snapshot(workspace), snapshot(folder)
    outcome = run(*case.command.format(dir=folder).split(), cwd=workspace)
    line = error_line(outcome)
    for part in case.says:
        assert part.format(dir=folder) in line, line
    assert outcome.code == case.code, line
    assert outcome.out == ""
    assert (snapshot(workspace), snapshot(folder)) == before
    assert not (folder / "executed").exists()
    assert len(line) < 600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where files from elsewhere lie."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    return path


def table(*cases: Case) -> pytest.MarkDecorator:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# --- names and numbers ---------------------------------------------------------------------------

UNKNOWN_VARIANT = ("unknown variant 'q5'", "choose from full, sfp,")
UNKNOWN_DEVICE = ("unknown device 'rpi99'", "local")
UAP = "--uap cache/full_eps10.pt"


@table(
    Case("train unknown", "train --model q5", UNKNOWN_VARIANT),
    Case("train one unknown", "train --model full --model q5", UNKNOWN_VARIANT),
    Case("export unknown", "export --model q5", UNKNOWN_VARIANT),
    Case("craft unknown", "craft --model q5 --eps 10 --json", UNKNOWN_VARIANT),
    Case("attack unknown", f"attack-device --model q5 {UAP} --json", UNKNOWN_VARIANT),
    Case("results unknown", "results --model q5 --json", UNKNOWN_VARIANT),
    Case("train none", "train --json", ("--model VARIANT", "--all")),
    Case("train both", "train --all --model full", ("--model VARIANT", "--all")),
    Case("export none", "export", ("--model VARIANT", "--all")),
    Case("export both", "export --all --model q4", ("--model VARIANT", "--all")),
    Case("craft none", "craft --eps 10", ("--model VARIANT", "--all")),
    Case("craft both", "craft --all --model q4", ("--model VARIANT", "--all")),
    Case("attack both", f"attack-device --all --model q4 {UAP}", ("--model VARIANT", "--all")),
    Case("attack no uap", "attack-device --model full", ("--uap FILE", "--transfer EPS")),
    Case("transfer 0", "attack-device --transfer 0 --json", ("--transfer 0", "from 1 to 255")),
    Case("transfer nan", "attack-device --transfer nan", ("--transfer nan", "from 1 to 255")),
    Case("train fleet", "train --model fleet", ("fleet is no model", "harness craft")),
    Case("attack fleet", f"attack-device --model fleet {UAP}", ("fleet is no model",)),
    Case("without unknown", "craft --model fleet_without_q5 --eps 10", UNKNOWN_VARIANT),
    Case("without int8", "craft --model fleet_without_int8", ("int8 is only made from full",)),
    Case("fleet both", "craft --all --model fleet", ("--model VARIANT", "--all")),
    Case("seeds 0", "craft --model full --seeds 0", ("--seeds", "0")),
    Case("attack device", f"attack-device --device rpi99 {UAP} --json", UNKNOWN_DEVICE),
    Case("run device", "run --device rpi99", UNKNOWN_DEVICE),
    Case("plan device", "plan --device rpi99 --json", UNKNOWN_DEVICE),
    Case("probe device", "devices probe rpi99 --json", UNKNOWN_DEVICE),
    Case("report device", "report --device rpi99", ("rpi99",)),
    Case("eps 0", "craft --model full --eps 0", ("--eps 0", "from 1 to 255")),
    Case("eps negative", "craft --model full --eps -3", ("--eps -3", "from 1 to 255")),
    Case("eps 300", "craft --model full --eps 300", ("--eps 300", "from 1 to 255")),
    Case("eps nan", "craft --model full --eps nan", ("--eps nan", "from 1 to 255")),
    Case("eps inf", "craft --model full --eps inf", ("--eps inf", "from 1 to 255")),
    Case("eps text", "craft --model full --eps ten", ("--eps", "ten")),
    Case("target", "craft --model full --target 10", ("target 10", "10 classes")),
    Case("target negative", "craft --model full --target -1", ("--target", "-1")),
    Case("control", "craft --control stripes", ("stripes", "chessboard")),
    Case("runtime", "results --runtime tflite", ("tflite", "onnxruntime")),
    Case("cuda", "train --model full --accelerator cuda", ("no CUDA", "--accelerator cpu")),
    Case("command", "trian", ("No such command 'trian'",)),
    Case("option", "train --modle full", ("No such option", "--modle")),
    Case("preset", "run --preset quick", ("preset", "quick")),
    Case("dataset conflict", "run --dataset digits", ("--dataset digits contradicts", "edit")),
    Case("preset conflict", "run --preset paper --json", ("--preset paper contradicts",)),
    Case("seed conflict", "plan --seed 5", ("--seed 5 contradicts", "seed = 0")),
    Case("init again", "init", ("harness.toml exists", "--workspace")),
)
def test_names_and_numbers(case: Case, run: Run, workspace: Path, folder: Path) -> None:
    if "cuda" in case.command and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    check(run, case, workspace=workspace, folder=folder)


# --- perturbations -------------------------------------------------------------------------------


class Executes:
    """Unpickled by anything careless, makes a folder."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sentinel),))


def put_uap(**changes: Any) -> Callable[[Path, Path], object]:
    return lambda workspace, folder: write_uap(folder / "bad.pt", **changes)


def truncated_uap(workspace: Path, folder: Path) -> None:
    content = write_uap(folder / "bad.pt").read_bytes()
    (folder / "bad.pt").write_bytes(content[: len(content) // 2])


def flipped_uap(workspace: Path, folder: Path) -> None:
    content = bytearray(write_uap(folder / "bad.pt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "bad.pt").write_bytes(content)


def code_in_archive(workspace: Path, folder: Path) -> None:
    torch.save(uap_content(meta={"x": Executes(folder / "executed")}), folder / "bad.pt")


def code_in_pickle(workspace: Path, folder: Path) -> None:
    content = pickle.dumps({"delta": Executes(folder / "executed")})
    (folder / "bad.pt").write_bytes(content)


def delta(value: float = 0.0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.full(shape, value)


def one_pixel(value: float) -> torch.Tensor:
    tensor = delta()
    tensor[1, 5, 7] = value
    return tensor


ATTACK = "attack-device --model full --uap {dir}/bad.pt"
BAD_UAP = "UAP {dir}/bad.pt"


@table(
    Case("missing", ATTACK, ("no UAP file {dir}/bad.pt", "cache/full_eps10.pt")),
    Case("missing, other folder", "attack-device --uap full_eps10.pt", ("no UAP file",)),
    Case("missing, unknown source", "attack-device --uap cache/q5_eps10.pt", ("no UAP file",)),
    Case("eps 0 by name", "attack-device --uap cache/full_eps0.pt", ("eps 0", "from 1 to 255")),
    Case("eps 999 by name", "attack-device --uap cache/full_eps999.pt", ("eps 999", "255")),
    Case("seed by name", f"attack-device --uap cache/full_eps10_s{2**31}.pt", ("2147483648",)),
    Case("target by name", "attack-device --uap cache/full_eps10_t77.pt", ("77", "10 classes")),
    Case("control with target", "attack-device --uap cache/random_eps10_t3.pt", ("target",)),
    Case("attack by name", "attack-device --uap cache/full_eps10_pgd.pt", ("attack 'pgd'",)),
    Case("truncated", ATTACK, (BAD_UAP, "cut off"), prepare=truncated_uap),
    Case("flipped", ATTACK, (BAD_UAP, "damaged"), prepare=flipped_uap),
    Case("code", ATTACK, (BAD_UAP, "not executed"), prepare=code_in_archive),
    Case("pickle", ATTACK, (BAD_UAP, "not a .pt file"), prepare=code_in_pickle),
    Case(
        *("text", ATTACK, (BAD_UAP, "not a .pt file")),
        prepare=lambda workspace, folder: (folder / "bad.pt").write_text("delta = 10\n"),
    ),
    Case(
        *("empty file", ATTACK, (BAD_UAP, "not a .pt file")),
        prepare=lambda workspace, folder: (folder / "bad.pt").touch(),
    ),
    Case(
        *("a folder", ATTACK, (BAD_UAP,)),
        prepare=lambda workspace, folder: (folder / "bad.pt").mkdir(),
    ),
    Case(
        *("a tensor", ATTACK, (BAD_UAP, "not a dictionary of delta, eps")),
        prepare=lambda workspace, folder: torch.save(delta(), folder / "bad.pt"),
    ),
    Case(
        *("a checkpoint", "attack-device --model full --uap cache/full.pt", ("no 'delta'",)),
    ),
    Case("other size", ATTACK, ("[3, 8, 8]",), prepare=put_uap(delta=delta(0, (3, 8, 8)))),
    Case("two axes", ATTACK, (BAD_UAP, "[C, H, W]"), prepare=put_uap(delta=delta(0, (32, 32)))),
    Case("float64", ATTACK, (BAD_UAP, "float32"), prepare=put_uap(delta=delta().double())),
    Case("no elements", ATTACK, (BAD_UAP,), prepare=put_uap(delta=delta(0, (3, 0, 32)))),
    Case("other data set", ATTACK, ("'cifar10'",), prepare=put_uap(dataset="cifar10")),
    Case("nan", ATTACK, ("not finite",), prepare=put_uap(delta=one_pixel(float("nan")))),
    Case("inf", ATTACK, ("not finite",), prepare=put_uap(delta=one_pixel(float("inf")))),
    Case("over budget", ATTACK, ("11.000/255",), prepare=put_uap(delta=one_pixel(11 / 255))),
    Case("in levels", ATTACK, ("over its eps",), prepare=put_uap(delta=delta(10.0))),
    Case("no eps", ATTACK, ("no 'eps'",), prepare=put_uap(eps=None)),
    Case("no delta", ATTACK, ("no 'delta'",), prepare=put_uap(delta=None)),
    Case("eps 0", ATTACK, ("eps is 0",), prepare=put_uap(eps=0.0)),
    Case("eps text", ATTACK, ("eps is a str",), prepare=put_uap(eps="10")),
    Case("target out of range", ATTACK, ("targets class 10",), prepare=put_uap(target=10)),
    Case("good and bad", f"{ATTACK} {UAP} --json", (BAD_UAP,), prepare=put_uap(eps=None)),
)  # fmt: skip
def test_perturbations(case: Case, run: Run, workspace: Path, folder: Path) -> None:
    check(run, case, workspace=workspace, folder=folder)


def test_a_perturbation_of_ours_that_is_damaged(run: Run, workspace: Path, folder: Path) -> None:
    """Named, it might be somebody's; what the experiment implies is made again."""
    path = workspace / "cache" / "full_eps10.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    case = Case("", f"attack-device {UAP} --json", ("full_eps10.pt", "cut off"))
    check(run, case, workspace=workspace, folder=folder)
    done = run("craft", "--model", "full", "--eps", "10", cwd=workspace)
    assert done.code == 0, done.err
    assert "crafting full_eps10 again: UAP" in done.err
    assert path.read_bytes() == whole


# --- models --------------------------------------------------------------------------------------


def put_onnx(name: str = "bad.onnx", **changes: Any) -> Callable[[Path, Path], object]:
    return lambda workspace, folder: write_onnx(folder / name, **changes)


def oversized(workspace: Path, folder: Path) -> None:
    with (folder / "bad.onnx").open("wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)  # sparse: takes no space


def external(workspace: Path, folder: Path) -> None:
    model = onnx.load(write_onnx(folder / "whole.onnx"))
    onnx.save_model(
        model,
        folder / "bad.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="weights.bin",
    )
    (folder / "whole.onnx").unlink()
    assert (folder / "weights.bin").exists()


def corrupt(workspace: Path, folder: Path) -> None:
    content = write_onnx(folder / "bad.onnx").read_bytes()
    (folder / "bad.onnx").write_bytes(content[: len(content) // 2])


BROUGHT = f"attack-device --onnx {{dir}}/bad.onnx {UAP}"


@table(
    Case("missing", BROUGHT, ("cannot read the model {dir}/bad.onnx",)),
    Case("oversized", BROUGHT, ("limit",), prepare=oversized),
    Case("external data", BROUGHT, ("external data", "single file"), prepare=external),
    Case("corrupt", BROUGHT, ("not an ONNX model", "damaged"), prepare=corrupt),
    Case(
        *("text", BROUGHT, ("not an ONNX model",)),
        prepare=lambda workspace, folder: (folder / "bad.onnx").write_text("hello\n"),
    ),
    Case(
        *("empty", BROUGHT, ("is empty",)),
        prepare=lambda workspace, folder: (folder / "bad.onnx").touch(),
    ),
    Case(
        *("folder", BROUGHT, ("cannot read the model",)),
        prepare=lambda workspace, folder: (folder / "bad.onnx").mkdir(),
    ),
    Case("float input", BROUGHT, ("`image`, uint8",), prepare=put_onnx(kind=TensorProto.FLOAT)),
    Case("image size", BROUGHT, ("[3, 64, 64]", "[3, 32, 32]"), prepare=put_onnx(side=64)),
    Case("classes", BROUGHT, ("7 classes", "of 10"), prepare=put_onnx(classes=7)),
    Case(
        "named like a variant",
        f"attack-device --onnx {{dir}}/full.onnx {UAP} --json",
        ("full.onnx is called like a variant", "rename"),
        prepare=put_onnx("full.onnx"),
    ),
)
def test_models(case: Case, run: Run, workspace: Path, folder: Path) -> None:
    check(run, case, workspace=workspace, folder=folder)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def resaved(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flipped, "damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "cut off"),
    "text": (lambda path: path.write_text("weights\n"), "not a .pt file"),
    "uap": (write_uap, "not a checkpoint"),
    "nan": (
        lambda path: resaved(path, lambda c: next(iter(c["weights"].values())).fill_(math.nan)),
        "not finite",
    ),
    "shape": (lambda path: resaved(path, lambda c: c["spec"].update(width=5)), "wrong shape"),
    "code": (
        lambda path: resaved(
            path,
            lambda c: c.update(meta=Executes(path.parents[2] / "elsewhere" / "executed")),
        ),
        "not executed",
    ),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_damaged_checkpoint(damage: str, run: Run, workspace: Path, folder: Path) -> None:
    spoil, says = CHECKPOINTS[damage]
    spoil(workspace / "cache" / "full.pt")
    commands = ["train --model full", "export --model pp2 --json"]
    if damage == "flipped":
        commands += ["run", "craft --model q2", f"attack-device {UAP}", "plan --json"]
    for command in commands:
        case = Case("", command, ("cache/full.pt", says))
        check(run, case, workspace=workspace, folder=folder)


# --- the configuration ---------------------------------------------------------------------------

TOML: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "syntax": ("width = 4", "width = ", ("not valid TOML", "line 4")),
    "unknown key": ("width = 4", "wdith = 4", ("unknown key 'wdith'", "width")),
    "key in table": ("pp_epochs = 1", "pp_epoch = 1", ("unknown key 'train.pp_epoch'",)),
    "unknown table": ("[eval]", "[evaluation]", ("unknown key 'evaluation'", "eval")),
    "type": ("width = 4", 'width = "wide"', ("width must be a whole number", "'wide'")),
    "type in table": ("pp_epochs = 1", "pp_epochs = 1.5", ("train.pp_epochs", "whole number")),
    "list": ("eps = [4, 10]", 'eps = [4, "x"]', ("craft.eps[1] must be a number", "'x'")),
    "table for key": ("width = 4", "width = {a = 1}", ("width",)),
    "key for table": ("width = 4", "width = 4\nexport = 3", ("'export' must be a table",)),
    "range": ("width = 4", "width = 0", ("width = 0", "from 1 to 1024")),
    "eps": ("eps = [4, 10]", "eps = [4, 300]", ("craft.eps[1] = 300.0", "from 1 to 255")),
    "eps nan": ("eps = [4, 10]", "eps = [nan]", ("craft.eps[0]", "nan")),
    "target": ("targets = [0, 1]", "targets = [0, 12]", ("craft.targets", "12", "0 to 9")),
    "preset": ('"quickstart"', '"quick"', ("unknown preset 'quick'", "quickstart")),
    "arch": ("width = 4", 'width = 4\narch = "vgg"', ("arch", "resnet18")),
    "protocol": ("width = 4", 'width = 4\nprotocol = "p"', ("protocol", "clean")),
    "mode": ('mode = "off"', 'mode = "fast"', ("latency.mode", "quick")),
}


@pytest.mark.parametrize("mistake", TOML)
def test_a_malformed_configuration(mistake: str, run: Run, workspace: Path, folder: Path) -> None:
    old, new, says = TOML[mistake]
    edit(workspace, old, new)
    case = Case("", "run --json", says)
    check(run, case, workspace=workspace, folder=folder)


COMMANDS = (
    *("run", "plan", "train --all", "craft --all", "export --all", f"attack-device {UAP}"),
    *("report", "results --json"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_malformed_configuration(
    command: str, run: Run, workspace: Path, folder: Path
) -> None:
    edit(workspace, "width = 4", "wdith = 4")
    case = Case("", command, ("harness.toml", "'wdith'"))
    check(run, case, workspace=workspace, folder=folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configuration_is_a_folder(command: str, run: Run, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    (root / "harness.toml").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    case = Case("", command, ("cannot read harness.toml", "directory"))
    check(run, case, workspace=root, folder=tmp_path / "elsewhere")


def test_the_configuration_is_not_text(run: Run, workspace: Path, folder: Path) -> None:
    (workspace / "harness.toml").write_bytes(b"width = 4 # \xff\xfe\n")
    check(run, Case("", "run", ("not UTF-8",)), workspace=workspace, folder=folder)


@pytest.mark.parametrize("command", ["run", "plan", "train --all", f"attack-device {UAP}"])
@pytest.mark.parametrize("lost", ["gone", "empty"])
def test_what_was_built_is_not_overwritten_where_the_configuration_is_lost(
    lost: str, command: str, run: Run, workspace: Path, folder: Path
) -> None:
    if lost == "gone":
        (workspace / "harness.toml").unlink()
        says = ("holds models or results but no harness.toml", "put it back")
    else:
        (workspace / "harness.toml").write_text("# nothing\n")
        says = ("harness.toml says nothing", "put back what it said")
    check(run, Case("", command, says), workspace=workspace, folder=folder)


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "plan", "train --all", "craft --all --json"])
def test_the_data_file_is_gone(
    command: str, run: Run, workspace: Path, folder: Path, tiny: Tiny
) -> None:
    edit(workspace, str(tiny.npz), str(folder / "gone.npz"))
    case = Case("", command, ("{dir}/gone.npz does not exist", "train_x"))
    check(run, case, workspace=workspace, folder=folder)


def without_a_key(path: Path, tiny: Tiny) -> None:
    with np.load(tiny.npz) as data:
        np.savez(path, **{key: data[key] for key in ("train_x", "train_y", "test_x")})


def half_of_it(path: Path, tiny: Tiny) -> None:
    content = tiny.npz.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def floats(path: Path, tiny: Tiny) -> None:
    with np.load(tiny.npz) as data:
        np.savez(path, **{**data, "train_x": data["train_x"] / np.float32(255)})


def pickled_labels(path: Path, tiny: Tiny) -> None:
    without_a_key(path, tiny)
    sentinel = path.parent / "executed"
    with zipfile.ZipFile(path, "a") as archive, archive.open("test_y.npy", "w") as file:
        labels = np.array([Executes(sentinel)], dtype=object)
        np.lib.format.write_array(file, labels, allow_pickle=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (without_a_key, "has no test_y"),
        (half_of_it, "cannot be read"),
        (floats, "must be uint8"),
        (pickled_labels, "Python objects"),
    ],
)
def test_a_bad_data_file(
    make: Callable[[Path, Tiny], None], says: str, run: Run, folder: Path, tiny: Tiny
) -> None:
    """Also in a new folder: no harness.toml is left that the corrected command contradicts."""
    make(folder / "bad.npz", tiny)
    root = folder / "new"
    root.mkdir()
    case = Case("", "run --dataset {dir}/bad.npz --json", ("{dir}/bad.npz", says))
    check(run, case, workspace=root, folder=folder)


def test_no_network(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    env = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    env |= {"no_proxy": "", "NO_PROXY": ""}
    root = tmp_path / "workspace"
    outcome = harness(
        *("run", "--dataset", "cifar10", "--workspace", root, "--data-dir", tmp_path / "data"),
        cwd=tmp_path,
        **env,
    )
    line = error_line(outcome)
    assert outcome.code == FAILED
    assert outcome.out == ""
    for part in ("CIFAR-10", str(tmp_path / "data"), "no network", "--data-dir", "FILE.npz"):
        assert part in line
    assert not root.exists()


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["results --json", "results", "report", "report --json"])
def test_nothing_to_read_in_an_empty_folder(command: str, run: Run, folder: Path) -> None:
    case = Case("", command, ("no harness.toml", "harness run"))
    check(run, case, workspace=folder, folder=folder)


@pytest.mark.parametrize("command", ["results --json", "report --json"])
def test_nothing_measured_yet(command: str, run: Run, empty: Path, folder: Path) -> None:
    case = Case("", command, ("no results", "harness run"), FAILED)
    check(run, case, workspace=empty, folder=folder)


def test_a_report_of_an_empty_store(run: Run, empty: Path, folder: Path) -> None:
    from harness.store import open_store

    open_store(empty / "results.db").close()
    case = Case("", "report", ("no results",), FAILED)
    check(run, case, workspace=empty, folder=folder)
    outcome = run("results", "--json", cwd=empty)
    assert (outcome.code, outcome.out) == (0, "[]\n")  # an array, of nothing


@pytest.mark.parametrize("command", ["results", "report", f"attack-device --model full {UAP}"])
def test_the_store_is_something_else(command: str, run: Run, workspace: Path, folder: Path) -> None:
    for leftover in workspace.glob("results.db*"):
        leftover.unlink()
    (workspace / "results.db").write_text("not a database, but long enough to be one\n" * 100)
    case = Case("", command, ("results.db", "results store", "move it away"), FAILED)
    check(run, case, workspace=workspace, folder=folder)


@table(
    Case("init under a file", "init --workspace {dir}/file/ws", ("write", "file/ws"), FAILED),
    Case("init in proc", "init --workspace /proc/ws", ("cannot write /proc/ws",), FAILED),
    Case("train", "train --model full --workspace {dir}/file/ws", ("cannot write",), FAILED),
    Case("run", "run --workspace /proc/ws", ("cannot write",), FAILED),
    Case("a file", "run --workspace {dir}/file", ("--workspace", "is a file")),
    Case("report", "report --out {dir}/file/report", ("cannot write the report",), FAILED),
    Case("report in proc", "report --out /proc/report", ("cannot write the report",), FAILED),
)  # fmt: skip
def test_a_folder_that_cannot_be_written(
    case: Case, run: Run, workspace: Path, folder: Path
) -> None:
    """Not by permissions, which do not stop root."""
    (folder / "file").write_text("in the way\n")
    check(run, case, workspace=workspace, folder=folder)


def test_the_cache_cannot_be_written(run: Run, empty: Path, folder: Path) -> None:
    (empty / "cache").write_text("in the way\n")
    case = Case("", "train --model full", ("cannot write", "cache"), FAILED)
    outcome = run(*case.command.split(), cwd=empty)
    assert outcome.code == FAILED
    assert "cannot write" in error_line(outcome)


def test_a_second_harness_in_the_same_workspace(run: Run, workspace: Path, folder: Path) -> None:
    (workspace / "cache" / "full_eps10.pt").unlink()  # there is something to do
    with (workspace / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for command in ("run", "train --all", "craft --all", f"attack-device {UAP} --json"):
            case = Case("", command, ("another harness is working", "--workspace"), FAILED)
            check(run, case, workspace=workspace, folder=folder)
        assert run("results", "--json", cwd=workspace).code == 0  # reading needs no lock
        assert run("plan", "--json", cwd=workspace).code == 0


@pytest.mark.parametrize(
    "command",
    [
        "attack-device --uap mine.pt",
        "attack-device --uap cache/full_eps10_t77.pt",
        "craft --model full --target 77",
        "train --all --dry-run --accelerator cpu --json",
        "run --dataset nowhere.npz",
        "run --dataset nosuchdata",
    ],
)
def test_a_new_folder_stays_empty(command: str, run: Run, folder: Path) -> None:
    outcome = run(*command.split(), cwd=folder)
    if "--dry-run" not in command:
        assert outcome.code == USAGE
        error_line(outcome)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("train --model q5", USAGE),
        ("craft --model full --eps 300 --json", USAGE),
        ("attack-device --model full --uap bad.pt --json", USAGE),
        ("attack-device --onnx bad.onnx --uap cache/full_eps10.pt", USAGE),
        ("train --all --workspace harness.toml/ws", FAILED),
    ],
)
def test_as_a_user_sees_it(command: str, code: int, workspace: Path) -> None:
    code_in_archive(workspace, workspace)
    corrupt(workspace, workspace)
    before = snapshot(workspace)
    outcome = harness(*command.split(), cwd=workspace)
    assert (outcome.code, outcome.out) == (code, "")
    error_line(outcome)
    assert snapshot(workspace) == before
    assert not (workspace / "executed").exists()

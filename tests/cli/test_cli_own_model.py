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
from factory_cases import GRAY, Lab, of_results, own
from PIL import Image
from torch import nn

from harness import unfinished
from harness.crafting.perturbation import load_perturbation
from harness.models.brought import Blamed
from harness.pipeline import craft_pass
from harness.records import UsageError
from harness.store import open_store

Run = Callable[..., Outcome]
IMAGES = 200
CONTROLS = ("random", "chessboard")


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
    with np.load(lab.root / "gray.npz") as data:
        images, labels = data["test_x"].transpose(0, 3, 1, 2).astype(np.int16), data["test_y"]
    session = onnxruntime.InferenceSession((root / "cache" / "gray.onnx").read_bytes())
    delta = load_perturbation(root / uap).delta_255

    def wrong(x: np.ndarray) -> float:
        pixels = np.ascontiguousarray(x.clip(0, 255).astype(np.uint8))
        (logits,) = session.run(None, {"image": pixels})
        return float(np.mean(logits.argmax(axis=1) != labels))

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
    assert refused.code == 2
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
    assert last.startswith("error: export of Branching refused, no file written: its code decides")
    assert "user_bad.py:" in last
    assert "write torch.where" in last
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
    *_, last = outcome.err.splitlines()  # after what their module prints
    assert said in last
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


def test_all_that_were_brought_are_timed_together(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    text = (root / "harness.toml").read_text().replace('mode = "off"', 'mode = "quick"')
    (root / "harness.toml").write_text(text)
    succeeded(run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root))

    def runs() -> dict[str, int]:
        with open_store(root / "results.db") as store:
            names = {sha256: model.variant for sha256, model in store.models().items()}
            found = [names[stored.run.model_sha256] for stored in store.latencies()]
        return {name: found.count(name) for name in set(found)}

    before = runs()
    succeeded(run("run", *own(pruned, "half"), "--workspace", root, cwd=lab.root))
    assert runs() == {"whole": 2 * before["whole"], "half": before["whole"]}


def test_a_sample_is_a_sample_for_earlier_models_too(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("images = 0", "images = 0\ndevice_images = 50"))
    for checkpoint, name in ((lab.root / "gray.pt", "whole"), (pruned, "half")):
        succeeded(run("run", *own(checkpoint, name), "--workspace", root, cwd=lab.root))
    rows = [row for row in of_results(run, root) if row["runtime"] == "onnxruntime"]
    assert {(row["variant"], row["n"]) for row in rows} == {("whole", 50), ("half", 50)}


def test_what_their_model_prints_is_no_data(run: Run, lab: Lab, root: Path) -> None:
    options = ("--factory", "user_nets:talking", "--checkpoint", "gray.pt", *GRAY[4:])
    done = succeeded(run("attack-device", *options, "--json", "--workspace", root, cwd=lab.root))
    assert json.loads(done.out)
    assert "forward of a user who prints" in done.err


def test_an_error_while_it_is_evaluated_is_said_to_be_theirs() -> None:
    class Late(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no\nmore")

    with pytest.raises(UsageError, match="evaluating it raised ValueError: no more"):
        Blamed(Late(), "evaluating it")(torch.zeros(1))


def test_a_control_alone_is_attacked_with_under_the_authors_protocol(
    run: Run, lab: Lab, root: Path
) -> None:
    config = root / "harness.toml"
    config.write_text(f'protocol = "paper"\n{config.read_text()}')
    attack = ("attack-device", *GRAY, "--uap", "cache/random_eps16.pt", "--json")
    done = succeeded(run(*attack, "--workspace", root, cwd=lab.root))
    assert {row["uap_source"] for row in json.loads(done.out)} == {"random", None}


def test_a_search_that_was_killed_leaves_nothing_behind_when_it_is_made(
    run: Run, lab: Lab, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = craft_pass.craft_fourier, []

    def killed_in_the_second(*args: Any, **more: Any) -> Any:
        calls.append(more["partial"])
        if len(calls) == 2:
            more["progress"] = lambda _passes: (_ for _ in ()).throw(KeyboardInterrupt)
        return real(*args, **more)

    monkeypatch.setattr(unfinished, "SAVE_INTERVAL_SECONDS", -1.0)
    monkeypatch.setattr(craft_pass, "craft_fourier", killed_in_the_second)
    craft = ("craft", *GRAY, "--attack", "fourier", "--eps", "4", "--eps", "16")
    assert run(*craft, "--workspace", root, cwd=lab.root).code == 130
    made = {path.name for path in (root / "cache").glob("*.pt")}
    assert made == {"gray_eps4_fourier.pt"}
    succeeded(run(*craft, "--workspace", root, cwd=lab.root))
    assert len(set(calls)) == 1  # the state of the one search is where the next looks for it
    assert list((root / "cache" / ".partial").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_perturbation_is_made_again(run: Run, lab: Lab, root: Path, damage: str) -> None:
    craft = ("craft", *GRAY, "--eps", "4", "--workspace", root)
    succeeded(run(*craft, cwd=lab.root))
    path = root / "cache" / "gray_eps4.pt"
    before = path.read_bytes()
    path.write_bytes(before[:-300] if damage == "cut" else b"")
    told = succeeded(run(*craft, cwd=lab.root))
    assert "crafting gray_eps4 again: UAP" in told.err
    assert path.read_bytes() == before


def test_classes_in_another_order_are_told(run: Run, lab: Lab, root: Path, tmp_path: Path) -> None:
    state = torch.load(lab.root / "gray.pt")
    swapped = [0, 1, 2, 4, 3, 5, 6, 8, 7, 9]
    for key in ("head.weight", "head.bias"):
        state[key] = state[key][swapped]
    torch.save(state, tmp_path / "swapped.pt")
    options = own(tmp_path / "swapped.pt", "net")
    told = succeeded(run("export", *options, "--workspace", root, cwd=lab.root))
    (warning,) = [line for line in told.err.splitlines() if line.startswith("warning")]
    assert "the classes are likely in another order" in warning
    assert "logit 3 as 4, logit 4 as 3, logit 7 as 8, logit 8 as 7" in warning


def test_evaluation_images_that_are_training_images_are_told(
    run: Run, lab: Lab, tmp_path: Path
) -> None:
    with np.load(lab.root / "gray.npz") as data:
        same = {key: data[key] for key in ("train_x", "train_y")}
    np.savez(tmp_path / "same.npz", **same, test_x=same["train_x"], test_y=same["train_y"])
    where = ("--dataset", tmp_path / "same.npz", "--workspace", tmp_path / "w")
    told = succeeded(run("export", *GRAY, *where, cwd=lab.root))
    assert "evaluation images are training images too" in told.err


@pytest.mark.parametrize("package", ["export", "reports"])
def test_a_module_called_like_ours_is_named(
    run: Run, lab: Lab, tmp_path: Path, package: str
) -> None:
    where = ("--dataset", "gray.npz", "--workspace", tmp_path / "w")
    refused = run("export", "--factory", f"{package}:make", *where, cwd=lab.root)
    assert refused.code == 2
    assert f"{package} is a package of the harness itself" in error_line(refused)


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("run", "take one with --factory"),
        ("plan", "take one with --factory"),
        ("attack-device --uap cache/gray_eps4.pt", "--onnx cache/gray.onnx"),
    ],
)
def test_the_ten_variants_are_not_trained_unasked_beside_models_of_their_own(
    run: Run, lab: Lab, root: Path, command: str, remedy: str
) -> None:
    succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    before = sorted((root / "cache").iterdir())
    refused = run(*command.split(), cwd=root)
    assert refused.code == 2
    assert remedy in error_line(refused)
    assert sorted((root / "cache").iterdir()) == before
    succeeded(run("attack-device", "--uap", "cache/gray_eps4.pt", "--onnx", "cache/gray.onnx",
                  cwd=root))  # fmt: skip


def test_a_matrix_of_the_ten_variants_is_not_trained_for_a_model_of_their_own(
    run: Run, lab: Lab, root: Path
) -> None:
    refused = run("attack-device", *GRAY, "--transfer", "4", "--workspace", root, cwd=lab.root)
    assert refused.code == 2
    assert "--transfer is of the ten variants" in error_line(refused)
    assert not (root / "cache").exists()


def test_a_folder_data_set_is_found_from_anywhere(run: Run, lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    done = run("init", "--dataset", "my photos", "--workspace", "w", cwd=tmp_path)
    assert succeeded(done).code == 0
    plan = run("plan", "--workspace", tmp_path / "w", "--json", cwd=lab.root)
    assert json.loads(succeeded(plan).out)


def test_pytorch_is_asked_as_a_file_of_one_image_is() -> None:
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return x.flatten(1)

    pixels = torch.rand(5, 1, 2, 2)
    for alone in (True, False):
        assert torch.equal(Blamed(Counting(), "it", alone=alone)(pixels), pixels.flatten(1))
    assert seen == [1, 1, 1, 1, 1, 5]

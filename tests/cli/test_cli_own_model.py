"""A user's own PyTorch classifier through the whole product: export, attack, time, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli_cases import Outcome, error_line, succeeded
from factory_cases import GRAY, Lab
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


def test_any_name_that_is_allowed_is_found_again(run: Run, lab: Lab, root: Path) -> None:
    """Capitals and dashes too: a class is often the factory."""
    for name in ("Gray", "my-net", "a_b"):
        options = own(lab.root / "gray.pt", name)
        done = succeeded(
            run("attack-device", *options, "--json", "--workspace", root, cwd=lab.root)
        )
        sources = {row["uap_source"] for row in json.loads(done.out)}
        assert sources == {name, "random", "chessboard", None}


@pytest.mark.parametrize("name", ["tuning", "q4_compat", "Full", "INT8", "Chessboard"])
def test_a_name_of_another_file_is_refused(run: Run, lab: Lab, root: Path, name: str) -> None:
    outcome = run("export", *own(lab.root / "gray.pt", name), "--workspace", root, cwd=lab.root)
    assert outcome.code == 2
    assert f"--name {name} is what" in error_line(outcome)


def test_a_model_crafted_on_otherwise_is_left_out_and_said_to_be(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    succeeded(run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root))
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("epochs = 3", "epochs = 2"))
    done = succeeded(run("run", *own(pruned, "half"), "--workspace", root, cwd=lab.root))
    assert "whole does not meet this model, it was exported, or crafted on, with other" in done.err
    command = "harness run --factory user_nets:gray --input-range 1 --mean 0.4 --std 0.1"
    assert f"{command} --name whole" in done.err
    pairs = {(row["variant"], row["uap_source"]) for row in of_results(run, root)}
    assert not pairs & {("whole", "half"), ("half", "whole")}
    page = " ".join((root / "report" / "index.html").read_text().split())
    assert "Not crafted with the same settings (whole; half)" in page
    # Crafted on anew, it takes part.
    again = run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root)
    assert "does not meet" not in succeeded(again).err
    pairs = {(row["variant"], row["uap_source"]) for row in of_results(run, root)}
    assert pairs >= {("whole", "half"), ("half", "whole")}
    assert "Not crafted with the same" not in (root / "report" / "index.html").read_text()


def test_a_file_put_in_the_place_of_another_is_left_out(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    """Or perturbations of one model would stand for another."""
    for checkpoint, name in ((lab.root / "gray.pt", "whole"), (pruned, "half")):
        succeeded(run("run", *own(checkpoint, name), "--workspace", root, cwd=lab.root))
    cache = root / "cache"
    for end in (".onnx", ".json"):
        (cache / f"half{end}").write_bytes((cache / f"whole{end}").read_bytes())
    done = succeeded(
        run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root)
    )
    assert "half does not meet this model" in done.err


def test_an_edit_of_their_code_is_noticed(run: Run, lab: Lab, root: Path) -> None:
    def exported(factory: str) -> bytes:
        options = ("--factory", factory, "--checkpoint", "gray.pt", *GRAY[4:], "--name", "net")
        succeeded(run("export", *options, "--workspace", root, cwd=lab.root))
        return (root / "cache" / "net.onnx").read_bytes()

    plain = exported("user_nets:gray")
    assert exported("user_nets:clamped") != plain  # the same weights, nearly the same logits
    assert exported("user_nets:gray") == plain


def test_what_the_manifest_beside_a_foreign_file_claims_is_not_believed(
    run: Run, lab: Lab, root: Path
) -> None:
    succeeded(run("export", *GRAY, "--workspace", root, cwd=lab.root))
    cache = root / "cache"
    manifest = json.loads((cache / "gray.json").read_text())
    manifest["cost"]["macs"] = 1
    (cache / "gray.json").write_text(json.dumps(manifest))
    attack = ("attack-device", "--onnx", cache / "gray.onnx", "--uap", "cache/random_eps16.pt")
    done = succeeded(run(*attack, "--json", "--workspace", root, cwd=lab.root))
    counted = 14 * 10 * 16 * 25 + 7 * 5 * 32 * 16 * 9 + 32 * 7 * 5 * 10
    assert {row["macs"] for row in json.loads(done.out)} == {counted}
    for damage in ({"metadata": "text"}, {"agreement": []}, {"format": 99}):
        (cache / "gray.json").write_text(json.dumps({**manifest, **damage}))
        succeeded(run("export", *GRAY, "--workspace", root, cwd=lab.root))
        assert json.loads((cache / "gray.json").read_text())["cost"]["macs"] == counted


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


def test_a_copy_of_a_file_does_not_take_its_results(
    run: Run, lab: Lab, root: Path, tmp_path: Path
) -> None:
    succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    before = len(of_results(run, root))
    copy, called_so = tmp_path / "deployed.onnx", tmp_path / "gray.onnx"
    copy.write_bytes((root / "cache" / "gray.onnx").read_bytes())
    attack = ("attack-device", "--uap", "cache/gray_eps4.pt", "--workspace", root)
    refused = run(*attack, "--onnx", copy, cwd=lab.root)
    assert refused.code == 2
    assert "is the file that was measured here as gray: call it gray.onnx" in error_line(refused)
    other = onnx.load(root / "cache" / "gray.onnx")
    other.producer_name = "somebody"
    onnx.save(other, called_so)
    refused = run(*attack, "--onnx", called_so, cwd=lab.root)
    assert refused.code == 2
    assert "is called like your model gray" in error_line(refused)
    assert len(of_results(run, root)) == before
    # Under its own name it is what it was.
    succeeded(run(*attack, "--onnx", root / "cache" / "gray.onnx", cwd=lab.root))
    assert len(of_results(run, root)) == before


def test_two_names_of_one_file_are_refused(run: Run, lab: Lab, root: Path, tmp_path: Path) -> None:
    succeeded(run("export", *GRAY, "--workspace", root, cwd=lab.root))
    files = [tmp_path / f"{name}.onnx" for name in "ab"]
    for file in files:
        file.write_bytes((root / "cache" / "gray.onnx").read_bytes())
    onnx_options = [part for file in files for part in ("--onnx", file)]
    attack = ("attack-device", *onnx_options, "--uap", "cache/random_eps4.pt")
    refused = run(*attack, "--workspace", root, cwd=lab.root)
    assert refused.code == 2
    assert "two --onnx files are the same file" in error_line(refused)


def test_what_was_crafted_on_other_weights_is_no_longer_that_models(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    for checkpoint, name in ((lab.root / "gray.pt", "whole"), (pruned, "half")):
        succeeded(run("run", *own(checkpoint, name), "--workspace", root, cwd=lab.root))

    def crossed() -> list[str]:
        return [
            row["uap_sha256"]
            for row in of_results(run, root)
            if (row["variant"], row["uap_source"], row["runtime"])
            == ("whole", "half", "onnxruntime")
        ]

    (old,) = crossed()
    state = torch.load(pruned)
    state["head.bias"] += 0.5
    torch.save(state, pruned)
    attack = ("attack-device", *own(pruned, "half"), "--uap", "cache/random_eps16.pt")
    succeeded(run(*attack, "--workspace", root, cwd=lab.root))
    assert crossed() == []  # half is another model now; nothing was crafted on it yet
    listed = succeeded(run("results", "--workspace", root, cwd=root))
    assert "runs under perturbations crafted earlier (" in listed.err
    used = ("attack-device", *own(lab.root / "gray.pt", "whole"), "--uap", "cache/half_eps16.pt")
    told = succeeded(run(*used, "--workspace", root, cwd=lab.root))
    assert "half_eps16.pt was crafted on another model than cache/half.onnx is of" in told.err
    succeeded(run("run", *own(pruned, "half"), "--workspace", root, cwd=lab.root))
    (new,) = crossed()
    assert new != old


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


def test_a_damaged_manifest_is_said_to_leave_a_model_out(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    succeeded(run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root))
    (root / "cache" / "whole.json").write_text("")
    told = succeeded(run("run", *own(pruned, "half"), "--workspace", root, cwd=lab.root))
    assert "its file, or the manifest beside it, is damaged" in told.err


def test_the_same_convention_written_otherwise_is_the_same_model(
    run: Run, lab: Lab, tmp_path: Path
) -> None:
    base = ("--factory", "user_nets:attention", "--checkpoint", "attention.pth")
    where = ("--dataset", "colour.npz", "--workspace", tmp_path / "w")
    short, long = ("--mean", "0.4", "--std", "0.1"), ("--mean", "0.4,0.4,0.4", "--std", "0.10")
    succeeded(run("export", *base, *short, *where, cwd=lab.root))
    again = succeeded(run("export", *base, *long, *where, cwd=lab.root))
    assert "1 already built and still valid" in again.err


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


def test_its_own_file_named_by_onnx_stays_what_it_is(run: Run, lab: Lab, root: Path) -> None:
    succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))

    def record() -> dict[str, Any]:
        with open_store(root / "results.db") as store:
            (model,) = store.models().values()
        return model.manifest

    before = record()
    assert before["metadata"]["identity"]
    attack = ("attack-device", "--onnx", root / "cache" / "gray.onnx", "--uap")
    succeeded(run(*attack, "cache/gray_eps4.pt", "--workspace", root, cwd=lab.root))
    assert record() == before


def test_a_saved_copy_of_a_perturbation_is_somebodys_file(run: Run, lab: Lab, root: Path) -> None:
    craft = ("craft", *GRAY, "--eps", "4", "--workspace", root)
    succeeded(run(*craft, cwd=lab.root))
    cache = root / "cache"
    (cache / "kept.pt").write_bytes((cache / "gray_eps4.pt").read_bytes())
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("epochs = 3", "epochs = 2"))
    uaps = ("--uap", "cache/gray_eps4.pt", "--uap", "cache/kept.pt")
    for order in (uaps, uaps[2:] + uaps[:2]):
        attack = ("attack-device", *GRAY, *order, "--json", "--workspace", root)
        rows = json.loads(succeeded(run(*attack, cwd=lab.root)).out)
        assert {row["uap_source"] for row in rows} == {None, "gray", "gray (elsewhere)"}


def test_a_perturbation_of_earlier_weights_is_shown_as_one(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    succeeded(run("run", *own(lab.root / "gray.pt", "net"), "--workspace", root, cwd=lab.root))
    succeeded(run("export", *own(pruned, "net"), "--workspace", root, cwd=lab.root))
    attack = ("attack-device", *own(lab.root / "gray.pt", "whole"), "--uap", "cache/net_eps16.pt")
    done = succeeded(run(*attack, "--json", "--workspace", root, cwd=lab.root))
    sources = {row["uap_source"] for row in json.loads(done.out)}
    assert sources == {None, "net (earlier)"}


def test_what_is_kept_and_not_shown_is_counted_once(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    uap = ("--uap", "cache/net_eps4.pt", "--workspace", root)
    for checkpoint in (lab.root / "gray.pt", pruned):
        succeeded(run("attack-device", *own(checkpoint, "net"), *uap, cwd=lab.root))
    told = succeeded(run("results", "--workspace", root, cwd=root)).err
    assert told == "Kept and not shown: runs on files exported earlier (4 of net)\n"


def test_a_file_that_the_user_keeps_in_the_cache_is_no_model_left_out(
    run: Run, lab: Lab, root: Path
) -> None:
    succeeded(run("export", *GRAY, "--workspace", root, cwd=lab.root))
    cache = root / "cache"
    (cache / "mine.onnx").write_bytes((cache / "gray.onnx").read_bytes())
    told = succeeded(run("run", *GRAY, "--workspace", root, cwd=lab.root))
    assert "does not meet" not in told.err


def test_models_measured_on_other_images_do_not_meet(
    run: Run, lab: Lab, root: Path, pruned: Path
) -> None:
    """Or a model would be judged by a transfer alone, its own perturbation unseen."""
    succeeded(run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root))
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("images = 0", "images = 150"))
    done = succeeded(run("run", *own(pruned, "half"), "--workspace", root, cwd=lab.root))
    assert "whole does not meet this model, it was not measured on the present eval" in done.err
    page = " ".join((root / "report" / "index.html").read_text().split())
    assert "Only half was attacked" in page
    succeeded(run("run", *own(lab.root / "gray.pt", "whole"), "--workspace", root, cwd=lab.root))
    assert "Against whole" in (root / "report" / "index.html").read_text()  # measured first


def test_a_strangers_perturbation_does_not_take_the_place_of_a_models(
    run: Run, lab: Lab, root: Path, tmp_path: Path
) -> None:
    craft = ("craft", *GRAY, "--eps", "4", "--workspace", root)
    succeeded(run(*craft, cwd=lab.root))
    succeeded(run("export", *GRAY, "--workspace", root, cwd=lab.root))
    content = torch.load(root / "cache" / "gray_eps4.pt")
    torch.save({**content, "delta": content["delta"].flip(2).contiguous()}, tmp_path / "flip.pt")
    (tmp_path / "copy.pt").write_bytes((root / "cache" / "gray_eps4.pt").read_bytes())
    uaps = [part for name in ("flip", "copy") for part in ("--uap", tmp_path / f"{name}.pt")]
    done = succeeded(
        run("attack-device", *GRAY, *uaps, "--json", "--workspace", root, cwd=lab.root)
    )
    sources = {row["uap_source"] for row in json.loads(done.out)}
    assert sources == {None, "gray", "gray (elsewhere)"}


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

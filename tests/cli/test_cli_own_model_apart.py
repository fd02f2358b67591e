"""What a user's own models are told apart by: names, weights, settings, images, copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from cli_cases import Outcome, error_line, succeeded
from factory_cases import GRAY, Lab, of_results, own

from harness.store import open_store

Run = Callable[..., Outcome]


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
    assert sources == {None, "net (other model)"}


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

"""`harness audit` on a tiny workspace: arms are built once, in slices too, and never mixed up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import Outcome, Tiny, snapshot, succeeded

from harness.audit.arms import in_seed
from harness.audit.contrasts import Meeting
from harness.pipeline.audit import Audit
from harness.pipeline.context import Context
from harness.workspace import open_workspace


def workspace(tiny: Tiny, root: Path) -> Path:
    """A copy of the finished workspace, which the audit takes its models from."""
    shutil.copytree(tiny.root, root)
    return root


def test_one_question_and_again_at_once(
    run: Callable[..., Outcome], tiny: Tiny, tmp_path: Path
) -> None:
    root = workspace(tiny, tmp_path / "w")
    out = succeeded(run("audit", "--question", "split", "--workspace", root, cwd=tmp_path)).out
    assert "train" not in out
    assert out.strip() == str(root / "audit" / "audit.md")
    arms = {path.name for path in (root / "audit").iterdir() if path.is_dir()}
    assert arms == {"crafted_apart", "crafted_on_test"}
    for arm in arms:  # nothing of the arm bears on training: the models are the workspace's
        for name in ("full", "sfp", "pp3", "q4"):
            theirs = (root / "audit" / arm / "cache" / f"{name}.pt").read_bytes()
            assert theirs == (root / "cache" / f"{name}.pt").read_bytes()
    report = json.loads((root / "audit" / "audit.json").read_text())
    asked = {entry["name"]: entry for entry in report["questions"]}
    assert [len(c["each"]) for c in asked["split"]["contrasts"]] == [4, 1]
    assert asked["seeds"]["contrasts"] == []
    assert asked["seeds"]["conclusions"] == []
    before = snapshot(root)
    again = succeeded(run("audit", "--question", "split", "--workspace", root, cwd=tmp_path))
    assert "train" not in again.err
    after = snapshot(root)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"audit/audit.md", "audit/audit.json"} | {
        name for name in before if "results.db" in name
    }
    assert {name: after[name][0] for name in after if name.startswith("audit/audit.")} == {
        name: before[name][0] for name in before if name.startswith("audit/audit.")
    }


def test_in_slices_it_ends_where_a_whole_run_does(
    run: Callable[..., Outcome], tiny: Tiny, tmp_path: Path
) -> None:
    root = workspace(tiny, tmp_path / "w")
    command = ("audit", "--question", "unit_masks", "--workspace", root, "--time-limit")
    codes = []
    while not codes or codes[-1] == 124:
        done = run(*command, "2s" if len(codes) < 3 else "10m", cwd=tmp_path)
        codes.append(done.code)
        assert "Traceback" not in done.err
    assert codes[-1] == 0
    assert 124 in codes
    report = json.loads((root / "audit" / "audit.json").read_text())
    (asked,) = (entry for entry in report["questions"] if entry["name"] == "unit_masks")
    assert [c["units"] for c in asked["contrasts"]] == [3, 3, 3]
    # The arm's PP models are its own, its Full is the workspace's.
    arm = root / "audit" / "unit_masks" / "cache"
    assert (arm / "pp2.pt").read_bytes() != (root / "cache" / "pp2.pt").read_bytes()
    assert (arm / "full.pt").read_bytes() == (root / "cache" / "full.pt").read_bytes()


def test_what_is_written_up_is_what_is_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most seeds for which most is measured; a file of another configuration is no file."""
    root = workspace(tiny, tmp_path / "w")
    audit = Audit(Context(open_workspace(root), torch.device("cpu")))

    def seeds() -> dict[str, int]:
        return {q.name: len(q.contrasts[0].changed) for q in audit.asked()}

    usual = {"split": 4, "batch_norm": 4, "attack": 4, "loss_and_step": 4}
    trained = ("unit_masks", "seeds", "methods", "architecture", "sfp_training")
    assert seeds() == usual | dict.fromkeys(trained, 3)
    for name in [in_seed("base", i) for i in range(1, 5)]:
        (root / "audit" / name).mkdir(parents=True)
        (root / "audit" / name / "harness.toml").write_text("")
    # Five seeds were asked for, but more is measured of three; and when all is, of five.
    assert seeds() == usual | dict.fromkeys(trained, 3)
    with monkeypatch.context() as everything:
        everything.setattr(Audit, "wrong", lambda *_: np.zeros(1, dtype=bool))
        assert seeds() == usual | dict.fromkeys(trained, 3) | {"seeds": 5, "methods": 5}
    assert audit.wrong(Meeting("base", "q4", "base", "full"), 10.0) is not None
    assert audit.wrong(Meeting("base", "q4", "seed3", "full"), 10.0) is None
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("apot_epochs = 1", "apot_epochs = 2"))
    changed = Audit(Context(open_workspace(root), torch.device("cpu")))
    assert changed.wrong(Meeting("base", "q4", "base", "full"), 10.0) is None
    assert changed.wrong(Meeting("base", "full", "base", "full"), 10.0) is not None


def test_a_question_of_one_seed_is_written_up_on_a_part_of_the_test_images(
    run: Callable[..., Outcome], tiny: Tiny, tmp_path: Path
) -> None:
    """Another seed draws other images of them: only what compares seeds is refused."""
    root = workspace(tiny, tmp_path / "w")
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("images = 100", "images = 60"))
    asked = run("audit", "--question", "attack", "--workspace", root, cwd=tmp_path)
    assert succeeded(asked).out.strip() == str(root / "audit" / "audit.md")
    report = json.loads((root / "audit" / "audit.json").read_text())
    (entry,) = (entry for entry in report["questions"] if entry["name"] == "attack")
    assert entry["contrasts"][0]["label"] == "white-box: attack momentum instead"
    assert entry["not_measured"] == []


def test_seeds_on_other_images_are_refused(
    run: Callable[..., Outcome], tiny: Tiny, tmp_path: Path
) -> None:
    root = workspace(tiny, tmp_path / "w")
    config = root / "harness.toml"
    config.write_text(config.read_text().replace("images = 100", "images = 60"))
    done = run("audit", "--question", "seeds", "--workspace", root, cwd=tmp_path)
    assert done.code == 2
    assert (
        done.err.strip().splitlines()[-1].startswith("error: eval.images = 60 draws other images")
    )


def test_questions_are_listed_and_unknown_ones_named(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    listed = succeeded(run("audit", "--list", cwd=tmp_path)).out
    assert [line.split()[0] for line in listed.splitlines()][:3] == [
        "split",
        "batch_norm",
        "attack",
    ]
    as_data = json.loads(succeeded(run("audit", "--list", "--json", cwd=tmp_path)).out)
    assert [f"{q['name']:14} {q['title']}" for q in as_data] == listed.splitlines()
    done = run("audit", "--question", "speed", cwd=tmp_path)
    assert done.code == 2
    assert "no question 'speed': choose from split" in done.err
    assert run("audit", cwd=tmp_path).code == 2  # no workspace here
    assert list(tmp_path.iterdir()) == []


def test_test_images_are_what_the_arm_crafts_on(tiny: Tiny) -> None:
    """The tiny set's evaluation and training images differ: or the arm would be none."""
    data = np.load(tiny.npz)
    train = {image.tobytes() for image in data["train_x"]}
    assert not any(image.tobytes() in train for image in data["test_x"])

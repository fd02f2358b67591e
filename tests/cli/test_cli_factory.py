"""`harness craft --factory`: a user's own PyTorch classifier, as users write them."""

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
from factory_cases import ATTENTION, EPS, GOOD, GRAY, MEAN, STD, Lab
from torch import nn

from harness.crafting.perturbation import Perturbation, load_perturbation
from harness.inference import predict
from harness.models.brought import BroughtModel, Convention
from harness.models.brought_checks import check_attackable

CPU = torch.device("cpu")

Run = Callable[..., Outcome]


def assert_one_line_error(outcome: Outcome, *, code: int, mentions: list[str]) -> None:
    assert outcome.code == code, outcome.err
    line = error_line(outcome)
    for part in mentions:
        assert part in line


def craft(run: Run, lab: Lab, workspace: Path, *more: object, data: str = "gray.npz") -> Outcome:
    return run("craft", "--dataset", data, "--workspace", workspace, *more, cwd=lab.root)


def deployed(lab: Lab, kind: str) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """The user's model made without the harness's loader, and the images it is judged on."""
    scope: dict[str, Any] = {}
    exec(GOOD, scope)
    network = scope[kind]()
    content = torch.load(lab.root / {"gray": "gray.pt", "attention": "attention.pth"}[kind])
    state = content.get("state_dict", content)
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    data = np.load(lab.root / {"gray": "gray.npz", "attention": "colour.npz"}[kind])
    images = np.ascontiguousarray(data["test_x"].transpose(0, 3, 1, 2))

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.eval()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            x = pixels.clone(memory_format=torch.contiguous_format)
            return self.network((x / 255 - MEAN) / STD)

    return Pixels(), images, data["test_y"]


def uer(lab: Lab, kind: str, path: Path) -> float:
    model, images, labels = deployed(lab, kind)
    predicted = predict(model, images, load_perturbation(path).delta_255, device=CPU)
    return float(np.mean(predicted != labels))


@pytest.mark.parametrize(
    ("kind", "options", "data", "shape"),
    [
        ("gray", GRAY, "gray.npz", (1, 28, 20)),
        ("attention", ATTENTION, "colour.npz", (3, 32, 32)),
    ],
)
def test_the_attack_breaks_the_users_model(
    run: Run,
    lab: Lab,
    tmp_path: Path,
    kind: str,
    options: tuple[object, ...],
    data: str,
    shape: tuple[int, ...],
) -> None:
    root = tmp_path / "w"
    wanted = ("--control", "random", "--eps", EPS)
    done = succeeded(craft(run, lab, root, *options, *wanted, data=data))
    assert "warning" not in done.err
    files = [root / "cache" / f"{name}_eps{EPS}.pt" for name in ("random", kind)]
    assert done.out.split() == [str(path) for path in files], "what their code prints is no data"
    made = load_perturbation(files[1])
    assert made.source == kind
    assert made.delta.shape == shape
    assert np.abs(made.delta_255).max() == EPS
    assert made.meta["clean_accuracy"] > 0.7
    rates = [uer(lab, kind, path) for path in files]
    assert rates[1] > rates[0] + 0.3, rates

    again = succeeded(craft(run, lab, root, *options, *wanted, data=data))
    assert "2 already built and still valid" in again.err


def test_targets_names_and_what_a_file_depends_on(run: Run, lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "w"
    options = (*GRAY, "--name", "my-net", "--eps", EPS, "--target", 3)
    done = succeeded(craft(run, lab, root, *options, "--json"))
    path = root / "cache" / f"my-net_eps{EPS}_t3.pt"
    assert json.loads(done.out) == [str(path)]
    made = load_perturbation(path)
    assert (made.source, made.target) == ("my-net", 3)
    model, images, labels = deployed(lab, "gray")

    def hits(uap: Perturbation | None) -> float:
        delta = None if uap is None else uap.delta_255
        return float(np.mean(predict(model, images, delta, device=CPU)[labels != 3] == 3))

    assert hits(made) > hits(None) + 0.3

    before = path.read_bytes()
    state = torch.load(lab.root / "gray.pt")
    state["head.bias"] = state["head.bias"] + 0.1
    torch.save(state, tmp_path / "other.pt")
    changed = ("--checkpoint", tmp_path / "other.pt")
    succeeded(craft(run, lab, root, *options, *changed))
    assert path.read_bytes() != before, "other weights: another perturbation"
    succeeded(craft(run, lab, root, *options))
    assert path.read_bytes() == before, "the same weights: the same bytes"


def test_their_exported_file_is_attacked_with_it(run: Run, lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "w"
    succeeded(craft(run, lab, root, *GRAY, "--name", "net", "--eps", EPS, "--control", "random"))

    model, images, labels = deployed(lab, "gray")
    onnx_file = _export(model, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(onnx_file.read_bytes())
    (logits,) = session.run(None, {"image": images})
    assert float(np.mean(logits.argmax(1) == labels)) > 0.7
    done = succeeded(
        run(
            *("attack-device", "--onnx", onnx_file, "--json", "--workspace", root),
            *("--uap", f"cache/net_eps{EPS}.pt", "--uap", f"cache/random_eps{EPS}.pt"),
            cwd=tmp_path,
        )
    )
    rows = {row["uap_source"]: row for row in json.loads(done.out)}
    assert rows["net"]["uer"] > rows["random"]["uer"] + 0.3
    assert rows["net"]["uer"] == uer(lab, "gray", root / "cache" / f"net_eps{EPS}.pt")


def _export(model: nn.Module, path: Path) -> Path:
    """As a user would, with the tool of their choice."""
    import warnings

    class Deployed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(image.float())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Deployed().eval(),
            (torch.zeros(2, 1, 28, 20, dtype=torch.uint8),),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            dynamo=False,
        )
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--input-range", "255"), ["convention is likely wrong", "--mean"]),
        ((), ["warning: clean accuracy is", "convention is likely wrong"]),
        (
            ("--checkpoint", "untrained.pt"),
            ["not shown to be better than a guess", "check the checkpoint"],
        ),
    ],
)
def test_a_wrong_convention_is_told(
    run: Run, lab: Lab, tmp_path: Path, options: tuple[str, ...], said: list[str]
) -> None:
    if "untrained.pt" in options:
        scope: dict[str, Any] = {}
        exec(GOOD, scope)
        torch.manual_seed(1)
        torch.save(scope["gray"]().state_dict(), lab.root / "untrained.pt")
    base = ("--factory", "user_nets:gray", "--checkpoint", "gray.pt", "--eps", EPS, "--dry-run")
    done = succeeded(craft(run, lab, tmp_path / "w", *base, *options))
    (line,) = [line for line in done.err.splitlines() if line.startswith("warning")]
    for part in said:
        assert part in line
    assert not (tmp_path / "w").exists(), "a dry run builds nothing"


FACTORIES = [
    ("user_bad", "PACKAGE.MODULE:FUNCTION"),
    ("user_bad.py:good", "no module"),
    ("user_bad:1", "PACKAGE.MODULE:FUNCTION"),
    ("user_absent:make", "there is no module user_absent"),
    ("user_broken:make", "needs the module 'not_a_module_of_anybody'"),
    ("user_crashing:make", "raised ZeroDivisionError: division by zero"),
    ("user_bad:absent", "has no 'absent'"),
    ("user_bad:number", "is a int, not a function"),
    ("user_bad:needs_an_argument", "missing 1 required positional argument"),
    ("user_bad:raises", "raised RuntimeError: the disk of weights is missing"),
    ("user_bad:leaves", "raised SystemExit: usage: train.py"),
    ("user_bad:no_module", "returned a dict, not a torch.nn.Module"),
    ("user_bad:five_classes", "has 5 classes; the data set has 10"),
    ("user_bad:other_size", "given float32 images [4, 1, 28, 20], raised RuntimeError"),
    ("user_bad:returns_tuple", "returns a tuple, not a tensor of logits"),
    ("user_bad:returns_map", "returns float32 [4, 10, 1, 1] for 4 images"),
    ("user_bad:returns_labels", "returns int64 [4] for 4 images"),
    ("user_bad:returns_nan", "logits that are not finite"),
    ("user_bad:detached", "no gradient reaches the input"),
    ("user_bad:rounded", "no gradient reaches the input"),
    ("user_bad:noisy", "differently every time"),
    ("user_bad:BatchStatistics", "depends on the other images of the batch"),
]


@pytest.mark.parametrize(("factory", "said"), FACTORIES, ids=[f for f, _ in FACTORIES])
def test_what_cannot_be_attacked_is_one_line(
    run: Run, lab: Lab, tmp_path: Path, factory: str, said: str
) -> None:
    outcome = craft(run, lab, tmp_path / "w", "--factory", factory, "--eps", EPS)
    assert_one_line_error(outcome, code=2, mentions=[said])
    assert not (tmp_path / "w").exists(), "nothing half-written"


def test_too_little_memory_is_no_traceback(run: Run, lab: Lab, tmp_path: Path) -> None:
    outcome = craft(run, lab, tmp_path / "w", "--factory", "user_bad:out_of_memory")
    assert_one_line_error(outcome, code=1, mentions=["ran out of memory", "craft.inner_batch"])


def _checkpoints(root: Path) -> None:
    fitting = {"fc.weight": torch.zeros(10, 560), "fc.bias": torch.zeros(10)}
    torch.save({"fc.weight": fitting["fc.weight"], "head": torch.zeros(1)}, root / "keys.pt")
    torch.save(fitting | {"fc.weight": torch.zeros(10, 9)}, root / "shape.pt")
    torch.save(nn.Linear(2, 2), root / "whole.pt")
    torch.save({"epoch": 3, "loss": 0.1}, root / "no_weights.pt")
    torch.save([1, 2], root / "list.pt")
    (root / "text.pt").write_text("weights")
    torch.save(fitting, root / "cut.pt")
    (root / "cut.pt").write_bytes((root / "cut.pt").read_bytes()[:-400])


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("absent.pt", ["cannot read checkpoint", "No such file"]),
        ("keys.pt", ["1 missing (fc.bias)", "1 not of the model (head)"]),
        ("shape.pt", ["1 of another shape (fc.weight [10, 9] for [10, 560])"]),
        ("whole.pt", ["was not executed", "state_dict"]),
        ("no_weights.pt", ["holds a dictionary of epoch, loss", "state dict"]),
        ("list.pt", ["holds no weights"]),
        ("text.pt", ["not a file of torch.save, or is damaged"]),
        ("cut.pt", ["not a file of torch.save, or is damaged"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    run: Run, lab: Lab, tmp_path: Path, checkpoint: str, said: list[str]
) -> None:
    _checkpoints(tmp_path)
    options = ("--factory", "user_bad:good", "--checkpoint", tmp_path / checkpoint)
    outcome = craft(run, lab, tmp_path / "w", *options)
    assert_one_line_error(outcome, code=2, mentions=[checkpoint, *said])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--checkpoint", "gray.pt"), "--factory PKG:FN"),
        (("--mean", "0.5"), "--factory PKG:FN"),
        ((*GRAY, "--model", "full"), "exclude each other"),
        ((*GRAY, "--name", "full"), "what a variant, a control or a fleet is called"),
        ((*GRAY, "--name", "fleet"), "what a variant, a control or a fleet is called"),
        ((*GRAY, "--name", "fleet_without_q4"), "what a variant, a control or a fleet is called"),
        ((*GRAY, "--name", "a_eps3"), "does not hold _eps"),
        ((*GRAY, "--name", "../x"), "a name has letters"),
        ((*GRAY, "--mean", "0.5,0.5,0.5"), "--mean has 3 values, but images here have 1 channel"),
        ((*GRAY, "--mean", "125"), "--mean 125 is outside pixels in [0, 1]"),
        ((*GRAY, "--std", "0"), "--std 0 must be above 0"),
        ((*GRAY, "--std", "nan"), "must be above 0"),
        ((*GRAY, "--mean", "high"), "is no list of numbers"),
        ((*GRAY, "--eps", "0.5"), "must be from 1 to 255"),
        ((*GRAY, "--eps", EPS, "--target", 10), "there are 10 classes"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    run: Run, lab: Lab, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    outcome = craft(run, lab, tmp_path / "w", *options)
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_the_authors_protocol_is_of_their_variants(run: Run, lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "w"
    root.mkdir()
    (root / "harness.toml").write_text(f'dataset = "{lab.root}/gray.npz"\nprotocol = "paper"\n')
    outcome = run("craft", *GRAY, "--workspace", root, cwd=lab.root)
    assert_one_line_error(outcome, code=2, mentions=["protocol = 'clean'"])


def test_help_says_that_it_runs_code(run: Run, lab: Lab) -> None:
    done = succeeded(run("craft", "--help", cwd=lab.root))
    assert "This runs your code" in " ".join(done.out.split())


def test_weights_stay_as_they_are_and_code_counts_as_identity() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 4))
    model = BroughtModel(network, Convention(1, (0.5,), (0.25,)))
    assert not network.training
    assert not any(p.requires_grad for p in model.parameters())
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    pixels = torch.from_numpy(images).float()
    expected = network((pixels / 255 - 0.5) / 0.25)
    torch.testing.assert_close(
        model(pixels.contiguous(memory_format=torch.channels_last)), expected
    )
    digest = check_attackable(model, images, classes=4, what="it")
    assert digest == check_attackable(model, images, classes=4, what="it")
    rewritten = BroughtModel(nn.Sequential(*network, nn.Tanh()), Convention(1, (0.5,), (0.25,)))
    assert list(rewritten.state_dict()) == list(model.state_dict())
    assert digest != check_attackable(rewritten, images, classes=4, what="it")

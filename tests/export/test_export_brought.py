"""A user's own PyTorch model to ONNX: whoever writes the file, a comparison decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import brought
from export.brought import export_brought
from export.cost import uncounted_operators
from export.exporter import Exported, load_manifest
from export.lint import lint_file
from harness.records import UsageError

CLASSES = tuple("abcd")
SHAPE = (3, 12, 10)


class Plain(nn.Module):
    """Convolutions, batch norm with statistics of its own, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.norm.running_mean = torch.randn(6)
        self.head = nn.Linear(6 * 6 * 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x / 255)).relu().view(x.shape[0], -1))


class CountsItsBatch(Plain):
    """`len` makes a constant of the size of the batch for every exporter."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x / 255)).relu().view(len(x), -1))


class Attentive(nn.Module):
    """`nn.MultiheadAttention`, whose fast path in eval mode ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(30, 3, batch_first=True)
        self.head = nn.Linear(12 * 30, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x / 255).permute(0, 2, 1, 3).reshape(x.shape[0], 12, 30)
        return self.head(self.attention(tokens, tokens, tokens)[0].flatten(1))


class Branching(nn.Module):
    """Which way it goes depends on the image: a file holds one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.dark, self.bright = nn.Linear(360, 4), nn.Linear(360, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) / 255
        return torch.cat(
            [self.bright(i) if i.mean() > 0.5 else self.dark(i) for i in flat.split(1)]
        )


def images(n: int = 70) -> np.ndarray:
    """Dark and bright ones in turn."""
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 120, (n, *SHAPE), dtype=np.uint8)
    dark[1::2] += 130
    return dark


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(requires_grad=False)


def export(model: nn.Module, out: Path, *, calibration: np.ndarray | None = None) -> Exported:
    return export_brought(
        model,
        out=out,
        calibration=images() if calibration is None else calibration,
        classes=CLASSES,
        metadata={"variant": out.stem, "factory": "nets:make"},
    )


def answers(path: Path, x: np.ndarray, *, at_once: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(path.read_bytes())
    parts = [x[i : i + at_once] for i in range(0, len(x), at_once)]
    return np.concatenate([session.run(["logits"], {"image": part})[0] for part in parts])


@pytest.mark.parametrize("kind", [Plain, Attentive])
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_the_file_is_the_model_at_every_size_of_a_batch(kind, at_once, tmp_path):
    model, x = made(kind), images()[:50]
    exported = export(model, tmp_path / "net.onnx")
    expected = model(torch.from_numpy(x).float()).numpy()
    found = answers(exported.path, x, at_once=at_once)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert exported.agreement.passed
    assert exported.agreement.images == 70


def test_what_the_file_and_its_manifest_say(tmp_path):
    exported = export(made(Plain), tmp_path / "net.onnx")
    model = onnx.load(exported.path)
    (entry,) = model.graph.input
    assert entry.name == "image"
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    manifest = load_manifest(exported.path)
    assert manifest["exporter"] == "TorchScript"
    assert manifest["input"]["shape"] == ["N", *SHAPE]
    assert manifest["min_onnxruntime"] is None  # not tried: their operators are theirs
    assert manifest["metadata"]["factory"] == "nets:make"
    assert manifest["classes"] == list(CLASSES)
    convolution, linear = 6 * 5 * 6 * 3 * 9, 6 * 6 * 5 * 4
    assert manifest["cost"]["macs"] == convolution + linear
    assert not [finding for finding in lint_file(exported.path) if finding.severity == "error"]


def test_products_are_counted_where_the_file_leaves_shapes_open(tmp_path, monkeypatch):
    exported = export(made(Attentive), tmp_path / "net.onnx")
    # 12 tokens of width 30, 3 heads: in, scores, weighted values, out; then the head.
    macs = [12 * 30 * 90, 12 * 12 * 30, 12 * 12 * 30, 12 * 30 * 30, 12 * 30 * 4]
    assert exported.cost.macs == sum(macs)
    assert exported.cost.file_bytes == exported.path.stat().st_size

    def only_any_batch(model: nn.Module, example: Tensor, any_batch: bool) -> brought.Written:
        if not any_batch:
            raise RuntimeError("no")
        return brought._traced(model, example, any_batch)

    monkeypatch.setattr(brought, "WAYS", (("one", only_any_batch, None),))
    cost = export(made(Attentive), tmp_path / "net.onnx").cost
    assert 0 < cost.macs < sum(macs)
    assert uncounted_operators(cost)


def test_nothing_of_this_machine_is_in_the_file_and_the_same_model_gives_the_same_bytes(tmp_path):
    first = export(made(Plain), tmp_path / "net.onnx")
    content = first.path.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"test_export_brought" not in content
    assert export(made(Plain), tmp_path / "net.onnx").sha256 == first.sha256
    other = made(Plain)
    other.head.bias += 0.1
    assert export(other, tmp_path / "net.onnx").sha256 != first.sha256


def test_code_that_counts_its_batch_gets_a_file_of_one_image_at_a_time(tmp_path):
    model, x = made(CountsItsBatch), images()[:20]
    exported = export(model, tmp_path / "net.onnx")
    found = answers(exported.path, x, at_once=1)
    expected = model(torch.from_numpy(x).float()).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert load_manifest(exported.path)["input"]["shape"] == [1, *SHAPE]
    assert exported.agreement.images == brought.MOST_ONE_BY_ONE


def test_a_branch_that_one_example_takes_is_not_the_function(tmp_path):
    with pytest.raises(
        UsageError, match=r"export of net refused, no file written: .*TorchScript: "
    ):
        export(made(Branching), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def wrong(model: nn.Module, example: Tensor, any_batch: bool) -> brought.Written:
    """An exporter that is off by little: 0.01 on the first logit."""

    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = model(x)
            return logits + 1e-2 * F.one_hot(torch.zeros_like(logits[:, 0]).long(), 4)

    return brought._traced(Off(), example, any_batch)


def crashing(_model: nn.Module, _example: Tensor, _any_batch: bool) -> brought.Written:
    raise RuntimeError("no operator\nfor that")


@pytest.mark.parametrize("first", [wrong, crashing])
def test_the_first_file_that_is_the_function_is_taken(
    first: Callable[..., brought.Written], tmp_path, monkeypatch
):
    ways = (("first", first, None), ("second", brought._traced, None))
    monkeypatch.setattr(brought, "WAYS", ways)
    exported = export(made(Plain), tmp_path / "net.onnx")
    assert load_manifest(exported.path)["exporter"] == "second"


def test_a_refusal_says_what_each_exporter_said_first(tmp_path, monkeypatch):
    ways = (("one", wrong, None), ("two", crashing, None), ("one", crashing, 1))
    monkeypatch.setattr(brought, "WAYS", ways)
    with pytest.raises(UsageError) as refused:
        export(made(Plain), tmp_path / "net.onnx")
    text = str(refused.value)
    assert "one: not the same function, logits differ by" in text
    assert "two: no operator for that" in text
    assert text.count("one: ") == 1
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_refusal(tmp_path):
    export(made(Plain), tmp_path / "net.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError):
        export(made(Branching), tmp_path / "net.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"net.onnx", "net.json"}


def test_without_onnxscript_the_other_exporter_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(brought.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"torch\.export: not tried, .*pip install onnxscript"):
        export(made(Branching), tmp_path / "net.onnx")


def test_torch_export_writes_what_is_the_function_too(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="torch.export writes ONNX through onnxscript")
    monkeypatch.setattr(brought, "WAYS", (("torch.export", brought._captured, None),))
    model, x = made(Attentive), images()[:9]
    exported = export(model, tmp_path / "net.onnx")
    expected = model(torch.from_numpy(x).float()).numpy()
    assert np.abs(answers(exported.path, x, at_once=4) - expected).max() < 1e-5
    assert b"test_export_brought" not in exported.path.read_bytes()
    assert json.loads(exported.manifest_path.read_text())["exporter"] == "torch.export"


def test_the_exporters_leave_the_process_as_it_was(tmp_path, capfd):
    import logging

    before = (torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable)
    export(made(Attentive), tmp_path / "net.onnx")
    with pytest.raises(UsageError):
        export(made(Branching), tmp_path / "net.onnx")
    assert (torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable) == before
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""


class Product(Plain):
    """An operator whose products nobody counts."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(self.conv(x / 255)).relu().view(x.shape[0], -1)
        return torch.einsum("nc,kc->nk", flat, self.head.weight)


def test_a_model_that_cannot_be_counted_is_exported_all_the_same(tmp_path):
    exported = export(made(Product), tmp_path / "net.onnx")
    assert uncounted_operators(exported.cost) == ("Einsum",)
    x = images()[:5]
    expected = made(Product)(torch.from_numpy(x).float()).numpy()
    assert np.abs(answers(exported.path, x, at_once=5) - expected).max() < 1e-4
    assert load_manifest(exported.path)["nominal_bits"]


def test_what_a_model_is_called_changes_its_file_but_not_its_size(tmp_path):
    short, long = (export(made(Plain), tmp_path / f"{name}.onnx") for name in ("n", "n" * 40))
    assert short.sha256 != long.sha256  # a store tells files apart by this
    assert short.cost.file_bytes == long.cost.file_bytes


def test_descriptions_are_taken_out_of_branches_too():
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["z"], doc_string="/home/me")], "then", [], []
    )
    branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, doc_string="/home/me")
    model = onnx.helper.make_model(onnx.helper.make_graph([branch], "g", [], []))
    model.graph.node[0].metadata_props.add(key="stack", value="/home/me/net.py")
    brought._strip(model)
    assert b"/home/me" not in model.SerializeToString()
    assert model.graph.node[0].attribute[0].g.node[0].op_type == "Identity"


def test_logits_and_class_names_must_be_as_many(tmp_path):
    with pytest.raises(ValueError, match="3 class names for a model of 4 classes"):
        export_brought(
            made(Plain),
            out=tmp_path / "net.onnx",
            calibration=images(),
            classes=("a", "b", "c"),
            metadata={},
        )


class Bright(Plain):
    """Does something else to bright images, of which the data has none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 2 if x.mean() > 200 else x)


class Checked(Plain):
    """A check that no image can fail: a decision all the same, as tracing sees it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.min() < 0:
            raise ValueError("pixels below 0")
        return super().forward(x)


def dark() -> np.ndarray:
    return images()[::2] // 2


def test_a_branch_that_the_data_never_takes_is_found_by_images_unlike_it(tmp_path):
    with pytest.raises(UsageError, match="TorchScript: not the same function, on images unlike"):
        export(made(Bright), tmp_path / "net.onnx", calibration=dark())
    assert list(tmp_path.iterdir()) == []


class Standardised(Plain):
    """Each image by its own deviation, as many pipelines do: of one colour it has none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.instance_norm(1e3 * (x - 110.3) / 50.7))


class OfColours(Plain):
    """A branch that only images of one colour take."""

    def forward(self, x: Tensor) -> Tensor:
        spread = x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True)
        return super().forward(x) * (1.0 if bool((spread > 1e-3).all()) else 1.1)


def test_rounding_that_a_model_enlarges_on_images_of_one_colour_is_no_other_function(tmp_path):
    exported = export(made(Standardised), tmp_path / "net.onnx")
    assert exported.path.exists()


def test_a_branch_that_only_images_of_one_colour_take_is_found(tmp_path):
    with pytest.raises(UsageError, match="of one colour"):
        export(made(OfColours), tmp_path / "net.onnx")


def test_a_decision_that_no_image_shows_is_named(tmp_path):
    exported = export(made(Checked), tmp_path / "net.onnx", calibration=dark())
    (decision,) = exported.manifest["decided_on_tensors"]
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1)
                if "if x.min() < 0" in text)  # fmt: skip
    assert decision == f"test_export_brought.py:{line}"
    assert export(made(Plain), tmp_path / "p.onnx").manifest["decided_on_tensors"] == []


class FakeQuantised(Plain):
    """Weights rounded on the way, as training with them does."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.conv.weight.abs().max() / 7
        weight = (self.conv.weight / scale).round().clamp(-7, 7) * scale
        y = F.conv2d(x / 255, weight, self.conv.bias, stride=2, padding=1)
        return self.head(self.norm(y).relu().view(x.shape[0], -1))


def test_weights_that_are_computed_are_counted(tmp_path):
    plain, rounded = (export(made(k), tmp_path / "n.onnx").cost for k in (Plain, FakeQuantised))
    assert rounded.macs == plain.macs
    # The exporter folds batch norm into stored weights alone: four values a channel are apart.
    assert rounded.params == 6 * 27 + 6 + 6 * 6 * 5 * 4 + 4


class ShapeChecked(Plain):
    """Decides on sizes alone, which no image changes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("three channels")
        return super().forward(x)


class Itemised(Plain):
    """Decides on a number taken out of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.mean().item() > 254 else x)


def test_a_decision_on_sizes_is_none(tmp_path):
    exported = export(made(ShapeChecked), tmp_path / "net.onnx")
    assert exported.manifest["decided_on_tensors"] == []
    assert (exported.manifest["exporter"], exported.cost.opset) == ("TorchScript", brought.OPSET)


def test_a_number_taken_out_of_a_tensor_is_a_decision(tmp_path):
    exported = export(made(Itemised), tmp_path / "net.onnx")
    assert len(exported.manifest["decided_on_tensors"]) == 1

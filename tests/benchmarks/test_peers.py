"""What others would do instead, beside what the harness does: accuracy, size and latency.

    HARNESS_WORKSPACE=workspace pytest tests/benchmarks/test_peers.py --benchmark-enable -s

Peers: dropping pruned filters and forgetting their constants, or moving those to the next bias;
Torch-Pruning; torch.onnx on the fake-quantised model; onnxruntime's static int8.

Models are those of a finished workspace, of which copies are used, or of a short training on the
same data (quickstart: real digits, width 8). All files of a test run in turn at batch 1 on one
thread, so that they meet the same machine; a printed ratio is a median over the median of the file
named. Nothing is asserted about time.
"""

from __future__ import annotations

import copy
import io
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from devices.local import LocalDevice
from export.cost import cost_card
from export.float_graph import float_graph
from export.graph import serialise
from export.integer_graph import integer_graph, layer_shapes
from export.runtime import RunSettings, open_session, run
from export.slim import slim
from export.static_int8 import quantise
from export.tuning import TIMED_RUNS, fastest, tune
from export.verify import verify_integer
from harness.compression.sfp import zero_weakest_filters
from harness.models.apot import MIN_ALPHA, ApotConv2d
from harness.models.checkpoint import load_checkpoint
from harness.models.folded import FoldedBlock, FoldedResNet, fold, make_conv
from harness.models.integer import IntegerResNet
from harness.models.integerise import integerise
from harness.models.resnet import ModelSpec, ResNet, build_model
from harness.pipeline.checkpoints import train_tasks
from harness.pipeline.context import Context
from harness.pipeline.experiment import attack_tasks, register_current
from harness.pipeline.uap_names import transfer_name
from harness.presets import preset_named
from harness.results import result_rows
from harness.workspace import CONFIG_NAME, Workspace, create_workspace, open_workspace

PAIRS = 200
WIDE_PAIRS = 40
WIDE = 64
KEEP_RATES = (None, 0.9, 0.5)
"""Of soft filter pruning; None is what the workspace has."""
KEPT = ("full.pt", "sfp.pt", "q4.pt")
ONE_THREAD = RunSettings(threads=1, batch_size=1)
Array = np.ndarray[Any, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Lab:
    """Trained models, and images they never saw."""

    context: Context

    @property
    def images(self) -> Array:
        return self.context.data.evaluation.images

    @property
    def labels(self) -> Array:
        return self.context.data.evaluation.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.context.image_shape

    def model(self, name: str) -> ResNet:
        return load_checkpoint(self.context.workspace.checkpoint(name)).build()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Lab:
    root = tmp_path_factory.mktemp("peers")
    finished = os.environ.get("HARNESS_WORKSPACE")
    workspace = _copy(Path(finished), root) if finished else _small(root, request)
    context = Context(workspace, torch.device("cpu"))
    threads = torch.get_num_threads()
    context.build(train_tasks(context, ["full", "sfp", "q4"]))
    torch.set_num_threads(threads)
    return Lab(context)


def _copy(finished: Path, root: Path) -> Workspace:
    (root / "cache").mkdir()
    shutil.copy(finished / CONFIG_NAME, root)
    workspace = open_workspace(root)
    uap = transfer_name(Context(workspace, torch.device("cpu")), "full")
    for name in (*KEPT, workspace.uap(uap).name):
        if (finished / "cache" / name).exists():
            shutil.copy(finished / "cache" / name, root / "cache")
    return workspace


def _small(root: Path, request: pytest.FixtureRequest) -> Workspace:
    config = preset_named("quickstart")
    if not request.config.getoption("--benchmark-enable"):  # only that it runs
        config = replace(
            config,
            width=4,
            train=replace(config.train, epochs=1, apot_epochs=1),
            craft=replace(config.craft, attack_images=128, epochs=1),
            eval=replace(config.eval, images=100),
        )
    return create_workspace(root, config)


@pytest.fixture
def say(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line, where there is something to say: not of models that were hardly trained."""

    def speak(line: str) -> None:
        if benchmark.enabled:
            with capsys.disabled():
                sys.stdout.write(f"\n{line}")

    return speak


# --- measuring -----------------------------------------------------------------------------------


@dataclass
class Peer:
    """One file, and what to feed it."""

    content: bytes
    feed: Array

    def __post_init__(self) -> None:
        self.session: InferenceSession = open_session(self.content, ONE_THREAD)

    def once(self) -> None:
        self.session.run(["logits"], {"image": self.feed})


def medians_ms(peers: dict[str, Peer], pairs: int) -> dict[str, float]:
    """Median latency of each, all of them taking turns."""
    taken: dict[str, list[int]] = {name: [] for name in peers}
    for turn in range(pairs + 10):
        for name, peer in peers.items():
            began = time.perf_counter_ns()
            peer.once()
            elapsed = time.perf_counter_ns() - began
            if turn >= 10:
                taken[name].append(elapsed)
    return {name: float(np.median(times)) / 1e6 for name, times in taken.items()}


def report(
    benchmark: BenchmarkFixture,
    say: Say,
    peers: dict[str, Peer],
    facts: dict[str, str],
    *,
    base: str,
    pairs: int = PAIRS,
) -> None:
    """One line a peer: what it is worth, its latency, and the ratio to `base`."""
    pairs = pairs if benchmark.enabled else 1
    taken = medians_ms(peers, pairs)
    for name, ms in taken.items():
        ratio = ms / taken[base]
        benchmark.extra_info[name] = {"facts": facts[name], "latency_ratio": round(ratio, 3)}
        say(f"  {name:24s} {facts[name]}; {ms:.3f} ms, {ratio:.2f} x {base}")
    benchmark.pedantic(peers[base].once, rounds=1)


def float_file(model: FoldedResNet, shape: tuple[int, int, int]) -> bytes:
    return serialise(float_graph(model, image_shape=shape, metadata={}))


def macs(content: bytes, shape: tuple[int, int, int]) -> str:
    return f"{cost_card(content, image_shape=shape).macs / 1e6:.2f} MMACs"


def in_torch(model: nn.Module, images: Array) -> Array:
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(images).float()).numpy()
    return logits


# --- slimming ------------------------------------------------------------------------------------


def naive(model: FoldedResNet, *, into_bias: bool) -> FoldedResNet:
    """Zeroed filters gone, and what they emit with them, or into the next bias."""
    blocks = []
    for block in model.blocks():
        kept = (block.conv1.weight != 0).flatten(1).any(dim=1)
        constant = torch.relu(block.conv1.bias) * ~kept
        moved = (block.conv2.weight * constant[:, None, None]).sum((1, 2, 3))
        first, second = block.conv1, block.conv2
        blocks.append(
            FoldedBlock(
                make_conv(first.weight[kept], first.bias[kept], stride=first.stride[0], padding=1),
                make_conv(
                    second.weight[:, kept], second.bias + moved * into_bias, stride=1, padding=1
                ),
                block.shortcut,
            )
        )
    return FoldedResNet(model.mean_255, model.stem, blocks, model.fc)


def by_torch_pruning(model: ResNet, shape: tuple[int, int, int]) -> FoldedResNet:
    """The same filters removed by Torch-Pruning, which follows them through batch norm."""
    tp = pytest.importorskip("torch_pruning", reason="pip install 'uap-edge-harness[peers]'")
    pruned = copy.deepcopy(model)
    for parameter in pruned.parameters():
        parameter.requires_grad_(requires_grad=True)  # its graph is traced through gradients
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=torch.zeros(1, *shape))
    for block in pruned.blocks():
        zeroed = (block.conv1.weight == 0).flatten(1).all(dim=1).nonzero().flatten().tolist()
        if zeroed:
            group = graph.get_pruning_group(block.conv1, tp.prune_conv_out_channels, idxs=zeroed)
            assert graph.check_pruning_group(group)
            group.prune()
    return fold(pruned.eval())


@pytest.fixture(scope="module", params=KEEP_RATES)
def pruned(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> ResNet:
    """A model that soft filter pruning trained, its zeroed filters still in it."""
    keep, config = request.param, lab.context.config
    if keep is None:
        return lab.model("sfp")
    if not request.config.getoption("--benchmark-enable"):
        pytest.skip("one keep rate is enough to see that it runs; make bench trains the others")
    config = replace(config, train=replace(config.train, sfp_keep=keep))
    folder = tmp_path_factory.mktemp("keep")
    context = Context(create_workspace(folder, config), torch.device("cpu"))
    threads = torch.get_num_threads()
    context.build(train_tasks(context, ["sfp"]))
    torch.set_num_threads(threads)
    return Lab(context).model("sfp")


def compare_slimming(
    benchmark: BenchmarkFixture,
    say: Say,
    lab: Lab,
    model: ResNet,
    files: dict[str, FoldedResNet],
    *,
    base: str,
) -> dict[str, float]:
    """Say what each is worth; returns its agreement with the masked model."""
    expected = in_torch(model, lab.images)
    inner = [(block.conv1.weight == 0).flatten(1).all(dim=1) for block in model.blocks()]
    zeroed = torch.cat(inner)
    say(
        f"soft filter pruning, {int(zeroed.sum())} of {len(zeroed)} filters inside blocks zeroed, "
        f"{len(lab.images)} images:"
    )
    peers, facts, agreements = {}, {}, {}
    for name, network in files.items():
        content = float_file(network, lab.shape)
        logits = run(open_session(content), lab.images)
        predicted = logits.argmax(axis=1)
        agreements[name] = float((predicted == expected.argmax(axis=1)).mean())
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        peers[name] = Peer(content, lab.images[:1])
        facts[name] = (
            f"{agreements[name]:.1%} of predictions are the masked model's, logits off by "
            f"{error:.0e} of the largest, accuracy {(predicted == lab.labels).mean():.1%}, "
            f"{macs(content, lab.shape)}"
        )
    report(benchmark, say, peers, facts, base=base)
    assert agreements["exact"] >= 0.999
    return agreements


@pytest.mark.benchmark(group="peers")
def test_slimming(benchmark: BenchmarkFixture, say: Say, lab: Lab, pruned: ResNet) -> None:
    masked = fold(pruned)
    files = {
        "masked, not slim": masked,
        "exact": slim(masked)[0],
        "drop the filters": naive(masked, into_bias=False),
        "constants into the bias": naive(masked, into_bias=True),
    }
    agreements = compare_slimming(benchmark, say, lab, pruned, files, base="masked, not slim")
    assert agreements["exact"] >= max(agreements.values()) - 0.001


@pytest.mark.benchmark(group="peers")
def test_torch_pruning(benchmark: BenchmarkFixture, say: Say, lab: Lab, pruned: ResNet) -> None:
    files = {
        "exact": slim(fold(pruned))[0],
        "Torch-Pruning": by_torch_pruning(pruned, lab.shape),
    }
    compare_slimming(benchmark, say, lab, pruned, files, base="exact")


# --- quantisation --------------------------------------------------------------------------------


def by_torch_onnx(model: ResNet, shape: tuple[int, int, int]) -> bytes:
    """The fake-quantised training model as PyTorch exports it; takes float pixels."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter that needs no new package is deprecated
            torch.onnx.export(
                model,
                (torch.zeros(2, *shape),),
                file,
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
                opset_version=17,
                dynamo=False,
            )
    except Exception as error:
        pytest.skip(f"torch.onnx cannot export the fake-quantised model: {error}")
    return file.getvalue()


def levels_that_differ(model: ResNet, twin: IntegerResNet, images: Array) -> float:
    """Share of activation levels that fake quantisation and the twin do not have in common."""
    fake: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}

    def keep_fake(name: str) -> Callable[..., None]:
        def hook(conv: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(conv, ApotConv2d)
            step = conv.activation_alpha.clamp(min=MIN_ALPHA) / conv.activation_max
            units = (inputs[0] / step).clamp(0, conv.activation_max)
            cells = (units * 2).to(torch.int32).clamp_(0, len(conv.activation_table) - 1)
            fake[name] = conv.activation_table[cells.long()]

        return hook

    def keep_whole(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: whole.__setitem__(name, output)

    handles = []
    for index, (block, integer) in enumerate(zip(model.blocks(), twin.blocks(), strict=True)):
        for name, conv, table in (
            (f"{index}.conv1", block.conv1, integer.quantise.levels),
            (f"{index}.conv2", block.conv2, integer.conv1.output.levels),
        ):
            handles.append(conv.register_forward_pre_hook(keep_fake(name)))
            handles.append(table.register_forward_hook(keep_whole(name)))
    in_torch(model, images)
    in_torch(twin, images)
    for handle in handles:
        handle.remove()
    differ = sum(int((fake[name] != whole[name]).sum()) for name in fake)
    return differ / sum(levels.numel() for levels in fake.values())


@pytest.mark.benchmark(group="peers")
def test_exporting_the_fake_quantised_model(
    benchmark: BenchmarkFixture, say: Say, lab: Lab
) -> None:
    model = lab.model("q4")
    twin = integerise(model)
    graph = integer_graph(twin, image_shape=lab.shape, metadata={})
    content = serialise(graph)
    theirs = by_torch_onnx(model, lab.shape)
    agreement = verify_integer(content, twin, lab.images)
    expected = in_torch(twin, lab.images).argmax(axis=1)
    session = open_session(theirs)
    (logits,) = session.run(["logits"], {"image": lab.images.astype(np.float32)})
    share = float((logits.argmax(axis=1) == expected).mean())
    flipped = levels_that_differ(model, twin, lab.images)
    say(f"Q4 at width {model.spec.width}, {len(lab.images)} images, against the twin:")
    facts = {
        "integer graph": f"{len(content) / 1000:.0f} KB, {agreement.argmax_agreement:.1%} of "
        f"predictions, {agreement.code_mismatches} of {agreement.codes_compared:,} codes differ",
        "torch.onnx": f"{len(theirs) / 1000:.0f} KB, {share:.1%} of predictions, "
        f"{flipped:.3%} of levels differ",
    }
    peers = {
        "integer graph": Peer(content, lab.images[:1]),
        "torch.onnx": Peer(theirs, lab.images[:1].astype(np.float32)),
    }
    report(benchmark, say, peers, facts, base="integer graph")
    assert agreement.argmax_agreement == 1.0
    assert agreement.code_mismatches == 0


@pytest.mark.benchmark(group="peers")
def test_static_int8(benchmark: BenchmarkFixture, say: Say, lab: Lab) -> None:
    """The same UAP on Full, on what onnxruntime makes of it, and on Q4."""
    context, device = lab.context, LocalDevice()
    uap = f"cache/{transfer_name(context, 'full').stem}.pt"
    names = ["full", "int8", "q4"]
    threads = torch.get_num_threads()
    tasks, victims, paths = attack_tasks(
        context, variants=names, onnx_files=[], uaps=[uap], device=device
    )
    context.build(tasks)
    register_current(context, victims, paths)
    torch.set_num_threads(threads)
    with context.open_store() as store:
        rows = {
            (row.variant, row.uap_source): row
            for row in result_rows(store)
            if row.runtime == "onnxruntime"
        }
    peers, facts = {}, {}
    say(f"the same UAP ({uap}), width {context.config.width}, {len(lab.images)} images:")
    for name in names:
        clean, attacked = rows[name, None], rows[name, "full"]
        content = context.workspace.onnx(name).read_bytes()
        facts[name] = (
            f"{len(content) / 1000:.0f} KB, accuracy {clean.clean_accuracy:.1%}, "
            f"UER {attacked.uer:.1%}, as PyTorch on {clean.torch_agreement:.1%} clean and "
            f"{attacked.torch_agreement:.1%} attacked"
        )
        peers[name] = Peer(content, lab.images[:1])
    report(benchmark, say, peers, facts, base="full")
    assert rows["q4", None].torch_agreement == rows["q4", "full"].torch_agreement == 1.0


# --- latency at the paper's width ----------------------------------------------------------------


def wide(width: int, *, bits: int | None = None, keep: float = 1.0) -> ResNet:
    """ResNet-18 with random weights: as fast as a trained one."""
    spec = ModelSpec("resnet18", width, 3, 10, (125, 122, 113), (63.0, 62.1, 66.7), bits=bits)
    model = build_model(spec, seed=0).eval()
    if keep < 1:
        zero_weakest_filters(model, keep=keep)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.1)
    return model.requires_grad_(requires_grad=False)


@pytest.mark.benchmark(group="peers")
def test_latency_at_width_64(benchmark: BenchmarkFixture, say: Say) -> None:
    shape = (3, 32, 32)
    images = np.random.default_rng(0).integers(0, 256, (16, *shape), dtype=np.uint8)
    width = WIDE if benchmark.enabled else 16
    plain, zeroed = fold(wide(width)), fold(wide(width, keep=0.9))
    graph = float_graph(plain, image_shape=shape, metadata={})
    network = integerise(wide(width, bits=4))
    runs = TIMED_RUNS if benchmark.enabled else 1
    tuned = {n: fastest(t) for n, t in tune(network, image_shape=shape, runs=runs).items()}
    unproduct = dict.fromkeys(layer_shapes(network, image_shape=shape), "integer")
    files = {
        "unpruned fp32": serialise(graph),
        "SFP exact": float_file(slim(zeroed)[0], shape),
        "SFP aligned to 8": float_file(slim(zeroed, align=8)[0], shape),
        "Q4, nothing measured": serialise(integer_graph(network, image_shape=shape, metadata={})),
        "Q4 as tuned": serialise(
            integer_graph(network, image_shape=shape, metadata={}, kernels=tuned)
        ),
        "Q4 all convolutions": serialise(
            integer_graph(network, image_shape=shape, metadata={}, kernels=unproduct)
        ),
        "static int8": quantise(graph, images, metadata={}),
    }
    say(f"latency at width {width}, random weights, batch 1, one thread:")
    facts = {
        name: f"{macs(content, shape)}, {len(content) / 1e6:.2f} MB"
        for name, content in files.items()
    }
    peers = {name: Peer(content, images[:1]) for name, content in files.items()}
    report(benchmark, say, peers, facts, base="unpruned fp32", pairs=WIDE_PAIRS)


@pytest.mark.benchmark(group="peers")
def test_latency_at_width_64_without_vnni(
    benchmark: BenchmarkFixture, say: Say, tmp_path: Path
) -> None:
    """The same on the same processor, its AVX-512 and VNNI hidden from onnxruntime."""
    if not benchmark.enabled:
        pytest.skip("a benchmark only: it runs the one above in a process of its own")
    if not re.search(r"\bcpuid_fault\b", Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor or its hypervisor cannot make CPUID trap")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    library = tmp_path / "avx2_only.so"
    source = Path(__file__).with_name("avx2_only.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    inner = f"{__file__}::test_latency_at_width_64"
    ran = subprocess.run(
        # pytest's faulthandler would take the signal that the library lives by.
        [sys.executable, "-m", "pytest", "-s", "-pno:faulthandler", inner, "--benchmark-enable"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    say("as a processor with AVX2 and without VNNI:")
    for line in ran.stdout.splitlines():
        if " x unpruned fp32" in line:
            say(line)
    benchmark.pedantic(lambda: None, rounds=1)

"""What every package shares: the words, the result records, the errors.

Standard library only: `devices`, which runs without torch, imports it. It reads no file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["full", "sfp", "pp", "apot"]
Runtime = Literal["torch", "onnxruntime"]
Verdict = Literal["VALID", "UNSTABLE", "INVALID"]
LATENCY_PROCESSES = 5
"""Fresh processes of one latency measurement."""


# --- errors: one class per exit code of the command line -------------------------------------


class HarnessError(Exception):
    """A failure whose message is one line for the user: what is wrong, where, what to do."""

    exit_code = 1


class UsageError(HarnessError):
    """The request itself is wrong: an unknown name, a malformed file, a conflicting flag."""

    exit_code = 2


class MeasurementInvalid(HarnessError):
    """Something was measured, but the measurement cannot be trusted."""

    exit_code = 4


class DeviceUnreachable(HarnessError):
    """The device did not answer, or stopped answering."""

    exit_code = 5


class TimeLimitReached(HarnessError):
    """The time the user gave is over, and there is work left."""

    exit_code = 124
    """As of timeout(1), so that a loop can tell "go on" from "failed"."""


# --- words -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One model of the paper: how it is called in the code, and in the paper's figures."""

    name: str
    method: Method
    label: str
    parent: str | None = None
    """The variant whose checkpoint this one starts from; None when trained from scratch."""
    bits: int | None = None
    """Weight and activation bits of the hidden layers (APoT)."""
    augment: Literal["mixup", "cutout"] | None = None
    """Regularisation beside soft filter pruning."""
    stage: int | None = None
    """The residual stage whose output is pruned (PP), counted as in the paper: 2, 3 or 4."""


@dataclass(frozen=True)
class Derived:
    """Another way to deploy a variant: made from it at export, never trained or crafted on."""

    name: str
    method: str
    label: str
    parent: str
    """The variant it is made from, and that it is compared with."""


VARIANTS: tuple[Variant, ...] = (
    Variant("full", "full", "Full"),
    Variant("sfp", "sfp", "SFP"),
    Variant("sfp_mixup", "sfp", "SFP+M", augment="mixup"),
    Variant("sfp_cutout", "sfp", "SFP+C", augment="cutout"),
    Variant("pp2", "pp", "PP2", parent="full", stage=2),
    Variant("pp3", "pp", "PP3", parent="full", stage=3),
    Variant("pp4", "pp", "PP4", parent="full", stage=4),
    Variant("q4", "apot", "Q4", parent="full", bits=4),
    Variant("q3", "apot", "Q3", parent="q4", bits=3),
    Variant("q2", "apot", "Q2", parent="q3", bits=2),
)
"""In build order: a variant's parent comes before it."""

PAPER_ORDER = ("full", "sfp", "sfp_mixup", "sfp_cutout", "pp2", "pp3", "pp4", "q2", "q3", "q4")
DERIVED: tuple[Derived, ...] = (Derived("int8", "int8", "INT8", parent="full"),)
"""Optional: exported and attacked when named, no part of the experiment."""
DEPLOYABLE = (*PAPER_ORDER, *(derived.name for derived in DERIVED))
"""Everything that can be exported and attacked, in the order it is shown."""
CONTROLS = ("random", "chessboard")
"""Perturbations that no model was attacked to obtain; an attack that loses to them is weak."""

BLOCKS_PER_STAGE: dict[str, tuple[int, ...]] = {"resnet18": (2, 2, 2, 2), "resnet20": (3, 3, 3)}
"""Residual blocks in each stage; widths double. The authors' quantised models were ResNet-20."""

_BY_NAME = {variant.name: variant for variant in VARIANTS}
_DERIVED_BY_NAME = {derived.name: derived for derived in DERIVED}


def variant_named(name: str) -> Variant:
    """The variant called `name`: one that is trained.

    Raises:
        UsageError: no such variant, the message lists those there are; or one that is derived
            from a variant, the message says what to do with which.
    """
    if name in _DERIVED_BY_NAME:
        parent = _DERIVED_BY_NAME[name].parent
        raise UsageError(
            f"{name} is only made from {parent} at export (harness export --model {name}): "
            f"train, craft on and verify {parent}"
        )
    if name not in _BY_NAME:
        raise UsageError(f"unknown variant {name!r}: choose from {', '.join(PAPER_ORDER)}")
    return _BY_NAME[name]


def deployable_named(name: str) -> Variant | Derived:
    """What `name` is exported as.

    Raises:
        UsageError: nothing is called so; the message lists what there is.
    """
    if name not in DEPLOYABLE:
        raise UsageError(f"unknown variant {name!r}: choose from {', '.join(DEPLOYABLE)}")
    return _DERIVED_BY_NAME.get(name) or _BY_NAME[name]


def trained_for(name: str) -> Variant:
    """The variant whose checkpoint `name` is exported from: itself, or what it derives from.

    Raises:
        UsageError: nothing is called so; the message lists what there is.
    """
    deployable = deployable_named(name)
    return deployable if isinstance(deployable, Variant) else variant_named(deployable.parent)


# --- observations: raw, as the store keeps them ------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where an inference ran. Everything a reader needs to judge whether two rows compare."""

    arch: str
    """As `platform.machine()` on the device: x86_64, aarch64."""
    cpu: str
    cores: int
    os: str
    python: str
    runtime_version: str
    """Version of onnxruntime or of torch."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSet:
    """The images a metric is computed on. `labels` are class indices; `examples` a few images."""

    sha256: str
    dataset: str
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    image_shape: tuple[int, int, int]
    examples: bytes
    """uint8 [E, C, H, W], C-ordered: the first E images, for pictures in the report."""
    note: str = ""
    """What a reader must know of the set, printed beside the results; may be empty."""


@dataclass(frozen=True)
class CostCard:
    """What one ONNX file costs, counted on the file itself (FACTS F)."""

    file_bytes: int
    gzip_bytes: int
    params: int
    nonzeros: int
    macs: int
    bops_nominal: int
    """sum over layers of MACs x weight bits x activation bits, at the bits of the method."""
    bops_executed: int
    """The same at the bits the kernels execute: 8 for integer convolutions, 32 for float."""
    opset: int
    layers: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelRecord:
    """An exported model: the file that is deployed, and where it came from."""

    sha256: str
    variant: str
    """A variant of the paper, or the stem of a file the user brought with --onnx."""
    method: str
    dataset: str
    preset: str
    arch: str
    width: int | None
    """None, like the seed, for a model the user brought."""
    seed: int | None
    cost: CostCard
    manifest: dict[str, Any]


@dataclass(frozen=True)
class UapRecord:
    """A perturbation: `delta` float32 [C, H, W], C-ordered bytes, in [0, 1] pixel units."""

    sha256: str
    source: str
    attack: str
    protocol: str
    dataset: str
    seed: int
    eps: float
    """l-infinity budget in 1/255 units."""
    target: int | None
    shape: tuple[int, int, int]
    delta: bytes
    meta: dict[str, Any]
    own: bool = True
    """Made by this workspace; False for a file the user brought. Both may share every label."""


@dataclass(frozen=True)
class PredictionRun:
    """Predictions of one model on an evaluation set or a sample of it, clean or under one UAP."""

    model_sha256: str
    evaluation_sha256: str
    uap_sha256: str | None
    device: str
    emulated: bool
    runtime: Runtime
    machine: Machine
    predictions: tuple[int, ...]
    seconds: float
    indices: tuple[int, ...] | None = None
    """Positions in the evaluation set; None for all. Samples add up (`harness.sampling`)."""


@dataclass(frozen=True)
class LatencyProcess:
    """One fresh process of a latency measurement: raw, warm-up apart, nothing dropped."""

    load_ns: int
    first_ns: int
    warmup_ns: tuple[int, ...]
    samples_ns: tuple[int, ...]
    telemetry: tuple[dict[str, Any], ...]
    """Governor, frequency, temperature, load about once a second, off the timed thread."""
    rss_load_bytes: int | None
    rss_peak_bytes: int | None


@dataclass(frozen=True)
class LatencyRun:
    """Batch-1 latency of one model on one device."""

    model_sha256: str
    device: str
    emulated: bool
    runtime: Runtime
    machine: Machine
    mode: Literal["quick", "full"]
    threads: int
    processes: tuple[LatencyProcess, ...]


# --- what is derived from them -----------------------------------------------------------------


@dataclass(frozen=True)
class ResultRow:
    """One (variant, device, runtime, UAP or clean, evaluation set). Absent is None, never 0.

    Rates are fractions in [0, 1], as in the paper, section 3: UER counts clean mistakes too.
    """

    variant: str
    method: str
    dataset: str
    preset: str
    width: int | None
    protocol: str | None
    device: str
    emulated: bool
    runtime: str
    machine: str
    uap_source: str | None
    uap_sha256: str | None
    attack: str | None
    seed: int | None
    """The seed the UAP was crafted with; the model's own seed on a clean row."""
    eps: float | None
    target: int | None
    evaluation_sha256: str
    n: int
    """Images evaluated. Every rate of a row, and what it is compared with, is of these images."""
    n_of: int
    """Images of the evaluation set: the row is a sample where n is smaller."""
    clean_accuracy: float | None
    clean_accuracy_low: float | None
    clean_accuracy_high: float | None
    uer: float | None
    uer_low: float | None
    uer_high: float | None
    uer_corrected: float | None
    """Of a sample: the UER estimated for the whole set (`metrics.corrected_rate`)."""
    uer_corrected_low: float | None
    uer_corrected_high: float | None
    evasion_on_correct: float | None
    fooling_rate: float | None
    tsr: float | None
    tsr_low: float | None
    tsr_high: float | None
    tsr_excl_target: float | None
    latency_p50_ms: float | None
    latency_p90_ms: float | None
    latency_verdict: str | None
    latency_mode: str | None
    energy_mj: float | None
    instructions: int | None
    file_bytes: int | None
    params: int | None
    macs: int | None
    flops: int | None
    bops: int | None
    peak_rss_bytes: int | None
    torch_agreement: float | None
    """Share of images on which this runtime predicts what PyTorch predicts on the same bytes."""
    uer_gap: float | None
    """UER here minus UER of PyTorch on the same images: the deployment gap."""
    model_sha256: str
    created_at: str
    git_commit: str | None

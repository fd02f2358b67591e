"""The experiment as data: the frozen `Config` that `harness.toml` holds.

Enters: nothing. Leaves: the keys, their types, what each means, and the paper's values. Read and
written by `harness.config_file`, checked by `harness.config_rules`; presets change the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

REFERENCE_EPS_255 = 10.0


@dataclass(frozen=True)
class TrainConfig:
    """Training and compression. Defaults are the paper's; presets change what they must."""

    epochs: int = 160
    """Of the models that are trained from scratch: full and the SFP variants."""
    batch_size: int = 250
    """Images of one step, of every variant."""
    lr: float = 0.1
    """Learning rate, of the models that are trained from scratch."""
    momentum: float = 0.9
    """Of SGD, for every variant."""
    weight_decay: float = 1e-4
    """L2 penalty, for every variant."""
    schedule: str = "step"
    """`step`: divide by 10 at `decay_epochs`; `one_cycle`: linear up for a fifth, then down."""
    decay_epochs: tuple[int, ...] = (80, 120)
    """Epochs after which `step` divides the learning rate."""
    nesterov: bool = False
    """Whether SGD's momentum is Nesterov's."""
    precision: str = "fp32"
    """`bf16`: products in bfloat16 on a GPU, weights and sums in float32; no effect on a CPU."""
    crop_padding: int = 4
    """Pixels of padding for random crops; 0 turns augmentation off, flips included."""
    bn_eps: float = 1e-5
    """Batch norm rescales every filter to unit variance down to variances of about this, so with
    a small value a filter's norm says little of its importance, and a filter that returns from
    zero takes part at full strength within a step. Long schedules get over that; short ones need
    a larger value for soft filter pruning to settle (docs/adr/0004)."""
    sfp_keep: float = 0.9
    """Share of filters that soft filter pruning keeps."""
    sfp_coupling: str = "layer"
    """`layer`: every layer zeroes its own weakest filters (the paper); `stage`: one set of channels
    for all layers of a stage, another algorithm, whose block outputs can be cut too."""
    sfp_start: str = "scratch"
    """`scratch`, as the authors did, or `full`: soft filter pruning goes on from Full's weights, as
    the other methods do, so that what differs is the method and not the seed (the audit)."""
    mixup_alpha: float = 1.0
    """Beta distribution of the mixing weight of variant sfp_mixup."""
    cutout_size: int = 16
    """Side of the square that variant sfp_cutout blanks, in pixels."""
    pp_keep: float = 0.7
    """Share of channels that post-training pruning keeps."""
    pp_granularity: str = "channel"
    """`channel`: can be slimmed; `unit`: the authors' mask on single activations, cannot."""
    pp_epochs: int = 20
    """Fine-tuning of the pruned variants; they start from full."""
    pp_lr: float = 0.01
    """Learning rate of that."""
    apot_epochs: int = 100
    """Training of the quantised variants; q4 starts from full, q3 from q4, q2 from q3."""
    apot_lr: float = 0.04
    """Learning rate of that."""
    apot_alpha_lr_activation: float = 0.1
    """Learning rate of the clips of activations (the authors' value)."""
    apot_alpha_lr_weight: float = 0.02
    """Learning rate of the clips of weights (the authors' value)."""


@dataclass(frozen=True)
class CraftConfig:
    """Universal perturbations: what is crafted, and for how long."""

    eps: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
    """l-infinity budgets of the untargeted UAPs, in 1/255 units."""
    transfer_eps: float | str | tuple[float, ...] = REFERENCE_EPS_255
    """The budgets of the transfer matrix: one, a list, or `all` for those of `eps`. The targeted
    UAPs have 10 where it is one of them, else the largest."""
    targets: str | tuple[int, ...] = "all"
    """Target classes: `all`, or a list of class indices; an empty list for none."""
    attack_images: int = 50_000
    """Training images that are crafted on."""
    epochs: int = 10
    """Passes over them for one perturbation."""
    batch_size: int = 500
    """Attack `sgd`: images of one step. Every attack has epochs times images gradients to spend; a
    gradient counts as two forward passes, of which `fourier` needs 32,768 at most."""
    step: float = 0.2
    """Step of one update, as a fraction of eps; `fourier` has none."""
    beta: float = 8.0
    """Each sample's loss is clamped here, so that no single image dominates."""
    inner_batch: int = 32
    """Attack `momentum`: images of one step, in place of `batch_size`; fewer make more steps."""
    momentum: float = 0.8
    """Attack `momentum`: what is kept of the steps before."""
    restarts: int = 1
    """Starts of every UAP crafted with gradients; the one that does best on a part of the attack
    images is kept."""
    seeds: int = 1
    """Crafting seeds: every UAP again with `seed` + 1, + 2, ..., as a file of its own."""
    split: str = "protocol"
    """Images that are crafted on: `attack` or `evaluation`; `protocol`: as that has it, attack for
    `clean` and evaluation for `paper`. Only under `paper` (the audit takes its choices apart)."""
    batch_norm: str = "protocol"
    """Batch norm while crafting under protocol `paper`: `eval` or `train` mode for all; `protocol`:
    in train mode where the authors had it so."""
    fleet_epochs: int = 20
    """Passes over the attack images for a UAP of the whole fleet, whose models share them; 0: none
    is crafted, and none with one model left out."""

    @property
    def transfer_budgets(self) -> tuple[float, ...]:
        """The budgets of the transfer matrix, ascending, without repeats."""
        if isinstance(self.transfer_eps, str):
            return tuple(sorted(self.eps))
        if isinstance(self.transfer_eps, tuple):
            return tuple(sorted(set(self.transfer_eps)))
        return (self.transfer_eps,)

    @property
    def reference_eps(self) -> float:
        """The transfer budget that headlines: 10 if it is one, else the largest."""
        budgets = self.transfer_budgets
        return REFERENCE_EPS_255 if REFERENCE_EPS_255 in budgets else budgets[-1]


@dataclass(frozen=True)
class ExportConfig:
    """The ONNX files."""

    align: int = 8
    """Widths that slimming leaves are rounded up to a multiple of this; 1 keeps them exact."""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on the device."""

    images: int = 10_000
    """Evaluation images; 0 for all."""
    device_images: int = 0
    """Of them, how many exported models are run on, a stratified sample; PyTorch sees all, and what
    it says of the rest corrects the rates. 0 for all: exact, and for wide networks hours."""
    batch_size: int = 128
    """Images of one call; predictions do not depend on it."""
    threads: int = 2
    """Intra-op threads of onnxruntime; always explicit. Predictions do not depend on it."""


@dataclass(frozen=True)
class LatencyConfig:
    """Batch-1 latency. `quick` is labelled not comparable; `off` measures none."""

    mode: str = "full"
    """`full`: the whole protocol, minutes a model; `quick`: not to be compared; `off`: none."""
    threads: int = 1
    """Intra-op threads of onnxruntime while it is timed."""


@dataclass(frozen=True)
class Config:
    """One experiment. A workspace holds exactly one."""

    dataset: str = "digits"
    """`digits`, `cifar10`, `svhn`, a FILE.npz, or a folder of class folders."""
    arch: str = "resnet18"
    """`resnet18` or `resnet20`."""
    width: int = 64
    """Channels of the first stage; 64 is the paper's."""
    preset: str = "paper"
    """Where keys come from that a file leaves out; this one has all of them."""
    protocol: str = "clean"
    """`clean`: crafted on training images, in eval mode, in whole pixel levels; `paper`: as the
    authors did, evaluation images included."""
    attack: str = "sgd"
    """`momentum`: the strongest here; `sgd`: the paper's; `fourier`: without gradients."""
    seed: int = 0
    """Of initial weights, the order of images, starts of attacks: all that is random."""
    train: TrainConfig = field(default_factory=TrainConfig)
    craft: CraftConfig = field(default_factory=CraftConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)

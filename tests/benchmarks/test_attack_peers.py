"""The attacks judged against what others would use: same model, images and budget.

    HARNESS_WORKSPACE=workspace pytest tests/benchmarks/test_attack_peers.py --benchmark-enable -s

Ours: the attacks of `harness craft`. Peers: the universal perturbations of the Adversarial
Robustness Toolbox (extra `peers`), with its defaults and tuned in its favour, and a plain
transcription of the loop the authors ran. The model is `full` of a finished workspace
(HARNESS_WORKSPACE; with its data), or of a short training on the digits. Images, batches and epochs
are those of its harness.toml. HARNESS_PEERS chooses rows: a regular expression, such as
"ours|FGSM.*TSR at 10"; HARNESS_PEERS_SEEDS, 1 to 3, how many seeds: with DeepFool inside, ART takes
minutes a perturbation (pytest --timeout 0).

Everybody's perturbation is judged as a device receives it: whole pixel levels within the budget, on
images no attack saw. Gradients are counted by a hook where they pass the logits, one an image and
backward pass; forward passes without a gradient apart. Seconds are CPU time on one thread. Nothing
is asserted about who wins: docs/adr/0009 keeps a run.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from harness.config import Config
from harness.crafting.perturbation import to_levels
from harness.crafting.together import Job, Request, craft_together
from harness.crafting.waves import FourierSettings, craft_fourier
from harness.data.dataset import Dataset, Split, load_dataset
from harness.inference import predict
from harness.models.checkpoint import load_checkpoint
from harness.models.folded import fold
from harness.models.resnet import ModelSpec, ResNet, build_model
from harness.pipeline.attack_settings import MAKERS, for_target
from harness.presets import preset_named
from harness.workspace import open_workspace

CPU = torch.device("cpu")
SEEDS_AND_TARGETS = ((0, 0), (1, 3), (2, 6))
AUTHORS_EPOCHS = 10
Array = np.ndarray[Any, Any]


class Counted(nn.Module):
    """A model that counts the images it sees, by what they cost."""

    def __init__(self, model: nn.Module, *, scale: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.gradients = self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x * self.scale if self.scale != 1 else x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        else:
            self.forwards += len(x)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


@dataclass(frozen=True)
class Lab:
    """One trained model, the images to craft on, the images to be judged on."""

    trained: ResNet
    config: Config
    attack: Split
    evaluation: Split
    scratch: Path

    @property
    def name(self) -> str:
        return f"full, width {self.config.width}, {Path(self.config.dataset).stem}"


@dataclass(frozen=True)
class Wanted:
    """What every contender is asked for; eps in pixel levels."""

    eps: float
    target: int | None
    seed: int


@dataclass(frozen=True)
class Made:
    """A contender's answer to one request."""

    levels: Array
    cpu_s: float
    gradients: int
    forwards: int


Contender = Callable[[Lab, Wanted], tuple[Array, Counted]]
"""(perturbation [C, H, W] in pixel levels, the model it was crafted on)."""


# --- ours ------------------------------------------------------------------------------------


def ours(attack: str, epochs: int | None = None) -> Contender:
    def craft(lab: Lab, wanted: Wanted) -> tuple[Array, Counted]:
        settings = lab.config.craft if epochs is None else replace(lab.config.craft, epochs=epochs)
        model = Counted(fold(lab.trained)).requires_grad_(requires_grad=False).eval()
        (found,) = craft_together(
            model,
            lab.attack,
            [Job(Request(wanted.eps, wanted.target), wanted.seed)],
            for_target(MAKERS[attack](settings, len(lab.attack), False, False), wanted.target).rule,
            key=f"{attack} {epochs} {wanted}",
            partial=lab.scratch / "partial.pt",
            device=CPU,
            progress=lambda _images: None,
        )
        return found.delta_255, model

    return craft


def ours_without_gradients(lab: Lab, wanted: Wanted) -> tuple[Array, Counted]:
    settings = MAKERS["fourier"](lab.config.craft, len(lab.attack), False, False)
    assert isinstance(settings, FourierSettings)
    model = Counted(fold(lab.trained)).requires_grad_(requires_grad=False).eval()
    found = craft_fourier(
        [model],
        lab.attack,
        eps=wanted.eps,
        target=wanted.target,
        seed=wanted.seed,
        settings=settings,
        key=str(wanted),
        partial=lab.scratch / f"{wanted}.pt",
        device=CPU,
        progress=lambda _forwards: None,
    )
    return found.delta_255, model


# --- the authors' loop -----------------------------------------------------------------------


def authors_loop(epochs: int | None = None) -> Contender:
    """As their code has it (the paper's section 3), on a model in eval mode, weights not frozen."""

    def craft(lab: Lab, wanted: Wanted) -> tuple[Array, Counted]:
        config = lab.config.craft
        model = Counted(lab.trained.requires_grad_()).eval()
        images, labels = torch.from_numpy(lab.attack.images), torch.from_numpy(lab.attack.labels)
        rng = np.random.default_rng(wanted.seed)
        start = rng.choice(np.array([-1, 1], dtype=np.float32), size=images.shape[1:])
        delta, eps = torch.from_numpy(start) * (wanted.eps / 2), wanted.eps
        for _ in range(epochs or config.epochs):
            for first in range(0, len(images), config.batch_size):
                part = slice(first, first + config.batch_size)
                y = labels[part]
                if wanted.target is not None:
                    y = torch.full_like(y, wanted.target)
                delta = delta.detach().requires_grad_()
                logits = model((images[part].float() + delta).clamp(0, 255))
                loss = F.cross_entropy(logits, y, reduction="none").clamp(max=config.beta).mean()
                (loss if wanted.target is None else -loss).backward()
                assert delta.grad is not None
                step = config.step * eps * delta.grad.sign()
                delta = (delta.detach() + step).clamp(-eps, eps)
        lab.trained.zero_grad(set_to_none=True)
        return delta.detach().numpy(), model

    return craft


# --- the Adversarial Robustness Toolbox --------------------------------------------------------


def art(inner: str, *, inner_eps: float | None = None, **params: Any) -> Contender:
    """Its attack of that kind; `inner_eps` of the inner step, as a fraction of the budget."""

    def craft(lab: Lab, wanted: Wanted) -> tuple[Array, Counted]:
        from art.attacks.evasion import TargetedUniversalPerturbation, UniversalPerturbation
        from art.estimators.classification import PyTorchClassifier

        # Its defaults are of pixels in [0, 1].
        model = Counted(fold(lab.trained), scale=255.0).requires_grad_(requires_grad=False).eval()
        n_classes = lab.trained.spec.classes
        classifier = PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=lab.attack.images.shape[1:],
            nb_classes=n_classes,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        # It draws from the process's generators.
        random.seed(wanted.seed)
        np.random.seed(wanted.seed)  # noqa: NPY002
        x = lab.attack.images.astype(np.float32) / 255
        budget = wanted.eps / 255
        inner_params = {k[6:]: v for k, v in params.items() if k.startswith("inner_")}
        common = {k: v for k, v in params.items() if not k.startswith("inner_")}
        if inner_eps is not None:
            inner_params["eps"] = inner_eps * budget
            inner_params["eps_step"] = inner_params["eps"]
        if inner == "deepfool":
            inner_params["verbose"] = False
        common |= {"attacker": inner, "eps": budget, "norm": np.inf}
        if wanted.target is None:
            attack = UniversalPerturbation(
                classifier, attacker_params=inner_params or None, verbose=False, **common
            )
            attack.generate(x, y=np.eye(n_classes, dtype=np.float32)[lab.attack.labels])
        else:
            inner_params["targeted"] = True
            attack = TargetedUniversalPerturbation(
                classifier, attacker_params=inner_params, **common
            )
            y = np.zeros((len(x), n_classes), dtype=np.float32)
            y[:, wanted.target] = 1
            attack.generate(x, y=y)
        return np.asarray(attack.noise)[0] * 255, model

    return craft


CONTENDERS: dict[str, Contender] = {
    "ours: momentum": ours("momentum"),
    "ours: sgd": ours("sgd"),
    "ours: fourier": ours_without_gradients,
    "authors' loop": authors_loop(),
    "ours: momentum, 10 epochs": ours("momentum", AUTHORS_EPOCHS),
    "ours: sgd, 10 epochs": ours("sgd", AUTHORS_EPOCHS),
    "authors' loop, 10 epochs": authors_loop(AUTHORS_EPOCHS),
    "ART: FGSM inside, defaults": art("fgsm"),
    "ART: FGSM inside, step eps/4": art("fgsm", inner_eps=0.25, delta=0.05, max_iter=5),
    "ART: FGSM inside, step 2 eps": art("fgsm", inner_eps=2.0, delta=0.05, max_iter=5),
}
UNTARGETED_ONLY: dict[str, Contender] = {
    "ART: DeepFool inside, defaults": art("deepfool"),
    "ART: DeepFool inside, one pass": art("deepfool", max_iter=1, delta=0.0),
}


# --- the comparison ----------------------------------------------------------------------------


def make(lab: Lab, contender: Contender, wanted: Wanted) -> Made:
    began_s = time.process_time()
    delta_255, model = contender(lab, wanted)
    cpu_s = time.process_time() - began_s
    assert np.abs(delta_255).max() <= wanted.eps + 1e-3
    levels = to_levels(np.asarray(delta_255, dtype=np.float64), eps=wanted.eps)
    return Made(levels, cpu_s, model.gradients, model.forwards)


def success(lab: Lab, made: Made, target: int | None) -> float:
    """UER, or TSR where there is a target; of the evaluation images, in percent."""
    predicted = predict(fold(lab.trained), lab.evaluation.images, made.levels, device=CPU)
    hit = predicted != lab.evaluation.labels if target is None else predicted == target
    return 100 * float(hit.mean())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lab]:
    pytest.importorskip(
        "art", reason="pip install adversarial-robustness-toolbox (extra `peers`) to compare"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scratch = tmp_path_factory.mktemp("attack_peers")
    finished = os.environ.get("HARNESS_WORKSPACE")
    real = request.config.getoption("--benchmark-enable")
    if finished and real:
        root = Path(finished).resolve()
        config = open_workspace(root).config
        dataset = config.dataset
        if dataset.endswith(".npz"):
            config = replace(config, dataset=str(root / dataset))
        trained = load_checkpoint(root / "cache" / "full.pt").build()
    else:
        config, trained = preset_named("quickstart"), None
        if not real:  # only that it runs
            craft = replace(config.craft, attack_images=8, epochs=1, batch_size=4)
            config = replace(config, craft=craft, eval=replace(config.eval, images=32))
    data = load_dataset(
        config.dataset,
        attack_images=config.craft.attack_images,
        evaluation_images=config.eval.images or None,
        seed=config.seed,
    )
    if trained is None:
        trained = _train(data, epochs=6 if real else 1)
    yield Lab(trained, config, data.attack, data.evaluation, scratch)
    torch.set_num_threads(threads)


def _train(data: Dataset, *, epochs: int) -> ResNet:
    spec = ModelSpec("resnet18", 8, 3, 10, mean_255=data.mean_255, std_255=data.std_255)
    model = build_model(spec, seed=0).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pixels, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(128)[: 10 * epochs]:
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[batch].float()), labels[batch]).backward()
            optimiser.step()
    return model.eval()


def test_ours_and_peers(benchmark: BenchmarkFixture, lab: Lab) -> None:
    n_seeds = int(os.environ.get("HARNESS_PEERS_SEEDS", "3")) if benchmark.enabled else 1
    runs = SEEDS_AND_TARGETS[:n_seeds]
    only = re.compile(os.environ.get("HARNESS_PEERS", ""))
    # As (eps, whether targeted).
    questions = [(10.0, False), (10.0, True), (4.0, False)][: None if benchmark.enabled else 2]
    clean = predict(fold(lab.trained), lab.evaluation.images, None, device=CPU)
    lines = [
        f"{lab.name}: {len(lab.attack)} attack images, {lab.config.craft.epochs} epochs; clean "
        f"error {100 * float((clean != lab.evaluation.labels).mean()):.1f} % of "
        f"{len(lab.evaluation)}; seeds {len(runs)}",
        "| | eps | UER or TSR of each seed, % | CPU s | gradients | forwards |",
        "|---|---|---|---|---|---|",
    ]
    sys.stderr.write("\n" + "\n".join(lines) + "\n")
    for eps, targeted in questions:
        contenders = CONTENDERS if targeted else CONTENDERS | UNTARGETED_ONLY
        for name, contender in contenders.items():
            label = f"{name}, {'TSR' if targeted else 'UER'} at {eps:g}"
            if not only.search(label):
                continue
            made, rates = [], []
            for seed, target in runs:
                wanted = Wanted(eps, target if targeted else None, seed)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the peer's imports
                    made.append(make(lab, contender, wanted))
                rates.append(success(lab, made[-1], wanted.target))
            if name == "ours: sgd":  # the counter tells the truth of what we know
                assert {m.gradients for m in made} == {lab.config.craft.epochs * len(lab.attack)}
            row = {
                "rates": rates,
                "cpu_s": float(np.median([m.cpu_s for m in made])),
                "gradients": int(np.median([m.gradients for m in made])),
                "forwards": int(np.median([m.forwards for m in made])),
            }
            what = "TSR" if targeted else "UER"
            benchmark.extra_info[label] = row
            sys.stderr.write(
                f"| {name} | {eps:g} | {what} {' / '.join(f'{r:.1f}' for r in rates)} | "
                f"{row['cpu_s']:.1f} | {row['gradients']:,} | {row['forwards']:,} |\n"
            )
    wanted = Wanted(10.0, None, 0)
    benchmark.pedantic(make, args=(lab, ours("momentum"), wanted), rounds=1)

"""The CUDA path: the same stages on a GPU. Run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.compression.variants import Build, build_variant
from harness.crafting.perturbation import random_sign, to_levels
from harness.crafting.sgd import SgdSettings, craft_sgd
from harness.crafting.together import Request
from harness.crafting.waves import FourierSettings, craft_fourier
from harness.data.dataset import Dataset, Split, load_dataset
from harness.inference import predict
from harness.models import kernels
from harness.models.apot import ApotConv2d
from harness.models.folded import fold
from harness.models.fused import FusedResNet, can_fuse
from harness.models.integerise import integerise
from harness.models.resnet import ResNet
from harness.pipeline.checkpoints import deployed_form
from harness.presets import preset_named
from harness.records import variant_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = SgdSettings(
    epochs=3, batch_size=64, step=0.2, beta=8.0, shuffle=True, batch_statistics=False
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", attack_images=256, evaluation_images=200, seed=0)


def train(name: str, data: Dataset, parent: ResNet | None, folder: Path) -> ResNet:
    config = preset_named("quickstart")
    config = replace(config, train=replace(config.train, epochs=4, apot_epochs=1))
    return build_variant(
        Build(
            variant=variant_named(name),
            config=config,
            data=data,
            parent=parent,
            key=name,
            partial=folder / f"{name}.pt",
            device=CUDA,
            progress=lambda done, total, note: None,
        )
    )


@pytest.fixture(scope="module")
def full(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> ResNet:
    return train("full", data, None, tmp_path_factory.mktemp("full"))


def accuracy(predictions: np.ndarray, split: Split) -> float:
    return float(np.mean(predictions == split.labels))


def test_trained_on_cuda_predicts_the_same_on_cpu(data: Dataset, full: ResNet) -> None:
    images = data.evaluation.images
    on_gpu = predict(full.to(CUDA), images, None, device=CUDA)
    on_cpu = predict(full.to(CPU), images, None, device=CPU)
    assert accuracy(on_gpu, data.evaluation) > 0.8
    assert np.mean(on_gpu == on_cpu) >= 0.995


def test_training_side_by_side_changes_no_weight(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, ResNet] = {}
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as a command sets it

    def work(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        with torch.cuda.stream(torch.cuda.Stream()):
            made[name] = train("full", data, None, folder).cpu()

    work("alone")
    crew = [threading.Thread(target=work, args=(name,)) for name in ("one", "other")]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    alone = made["alone"].state_dict()
    for name in ("one", "other"):
        for key, tensor in made[name].state_dict().items():
            assert torch.equal(tensor, alone[key]), (name, key)


@pytest.mark.parametrize("name", ["q4", "q2"])
def test_kernels_have_the_values_of_the_operations(
    name: str, data: Dataset, full: ResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SMALLEST", 0)
    trained = train(name, data, full.to(CPU), tmp_path)
    layers = [m for m in trained.modules() if isinstance(m, ApotConv2d)]
    twin = integerise(trained.to(CPU)).to(CUDA)
    trained.to(CUDA)
    pixels = torch.from_numpy(data.evaluation.images[:64]).float().to(CUDA)
    with torch.no_grad():
        activations = torch.relu(trained.bn1(trained._stem(pixels)))

    def everything() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaf = pixels.clone().requires_grad_()
        logits = twin(leaf.contiguous(memory_format=torch.channels_last))
        exact = [logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]]
        x = activations.clone().requires_grad_()
        out = layers[0](x)
        wanted = [x, layers[0].weight, layers[0].activation_alpha, layers[0].weight_alpha]
        return exact, [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        exact, close = everything()
        monkeypatch.setattr(kernels, "usable", lambda _x: False)
        plain, nearly = everything()
    for one, other in zip(exact, plain, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(close, nearly, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_predictions_are_those_of_float32(data: Dataset, full: ResNet) -> None:
    split = data.evaluation
    noise = np.random.default_rng(0).integers(-40, 41, split.images.shape[1:]).astype(np.int16)
    model = full.to(CUDA)
    for delta in (None, noise):
        predicted = predict(model, split.images, delta, device=CUDA)
        pixels = torch.from_numpy(split.images).to(torch.int16)
        pixels = (pixels + (0 if delta is None else torch.from_numpy(delta))).clamp(0, 255)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = model(pixels.float().to(CUDA)).argmax(dim=1).cpu().numpy()
        assert np.array_equal(predicted, expected)


def test_integer_network_is_exact_on_cuda(data: Dataset, full: ResNet, tmp_path: Path) -> None:
    twin = integerise(train("q4", data, full.to(CPU), tmp_path).to(CPU))
    pixels = torch.from_numpy(data.evaluation.images[:64]).float()
    with torch.inference_mode():
        stem_cpu = twin.stem(pixels - twin.mean_255)
        twin.to(CUDA)
        stem_gpu = twin.stem(pixels.to(CUDA) - twin.mean_255)
    assert torch.equal(stem_cpu, stem_gpu.cpu())


def test_fused_network_has_the_gradients_of_the_folded_one(data: Dataset, full: ResNet) -> None:
    folded = fold(full.to(CPU)).to(CUDA)
    assert can_fuse(folded)
    pixels = torch.from_numpy(data.attack.images).float().to(CUDA)
    labels = torch.from_numpy(data.attack.labels).to(CUDA)

    def gradient(network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = pixels.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(network(leaf), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0].flatten()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        fused, plain = gradient(FusedResNet(folded)), gradient(folded)
    assert torch.nn.functional.cosine_similarity(fused, plain, dim=0) > 0.98


def test_crafting_on_cuda_beats_random_sign(data: Dataset, full: ResNet, tmp_path: Path) -> None:
    model = deployed_form(full.to(CPU)).to(CUDA)
    crafted = craft_sgd(
        model,
        data.attack,
        Request(10.0),
        SETTINGS,
        seed=0,
        key="uap",
        partial=tmp_path / "uap.pt",
        device=CUDA,
        progress=lambda images: None,
    )
    assert np.abs(crafted.delta_255).max() <= 10.0
    split = data.evaluation
    uap = to_levels(crafted.delta_255, eps=10.0)
    control = to_levels(random_sign(uap.shape, eps=10.0, seed=1), eps=10.0)
    attacked = predict(model, split.images, uap, device=CUDA)
    under_control = predict(model, split.images, control, device=CUDA)
    assert accuracy(attacked, split) < accuracy(under_control, split) - 0.2


def test_a_wave_found_on_cuda_does_what_one_found_on_a_cpu_does(
    data: Dataset, full: ResNet, tmp_path: Path
) -> None:
    model, split = deployed_form(full.to(CPU)), data.evaluation
    rates = []
    for device in (CPU, CUDA):
        found = craft_fourier(
            [model.to(device)],
            data.attack,
            eps=10.0,
            target=None,
            seed=0,
            settings=FourierSettings(passes=1_500),
            key=str(device),
            partial=tmp_path / f"{device.type}.pt",
            device=device,
            progress=lambda _forwards: None,
        )
        assert found.found.forwards <= 1_500
        uap = to_levels(found.delta_255, eps=10.0)
        rates.append(accuracy(predict(model, split.images, uap, device=device), split))
    control = to_levels(random_sign(uap.shape, eps=10.0, seed=1), eps=10.0)
    assert max(rates) < accuracy(predict(model, split.images, control, device=CUDA), split) - 0.2
    assert abs(rates[0] - rates[1]) < 0.1

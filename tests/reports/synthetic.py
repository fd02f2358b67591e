"""A results store with plausible numbers: the paper's CIFAR-10 rates over 600 planted images.

Rates are planted exactly (k of n images wrong); which images is drawn with a seed and shared
between attacks, so that paired tests behave as on real data. Run as a script to look at a report:
`python -m tests.reports.synthetic FOLDER`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.records import (
    PAPER_ORDER,
    CostCard,
    EvaluationSet,
    LatencyProcess,
    LatencyRun,
    Machine,
    ModelRecord,
    PredictionRun,
    Runtime,
    UapRecord,
    variant_named,
)
from harness.store import Store, open_store

N, CLASSES, SIDE = 600, 10, 32
EPS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CLEAN = dict(
    zip(PAPER_ORDER, (0.94, 0.80, 0.86, 0.84, 0.92, 0.935, 0.94, 0.905, 0.925, 0.92), strict=True)
)
WHITE_BOX = {
    "full": (0.10, 0.24, 0.50, 0.71, 0.82, 0.88),
    "sfp": (0.20, 0.34, 0.51, 0.65, 0.78, 0.83),
    "sfp_mixup": (0.14, 0.31, 0.53, 0.77, 0.85, 0.87),
    "sfp_cutout": (0.18, 0.25, 0.42, 0.64, 0.77, 0.85),
    "pp2": (0.11, 0.35, 0.49, 0.72, 0.86, 0.88),
    "pp3": (0.10, 0.30, 0.52, 0.70, 0.83, 0.88),
    "pp4": (0.10, 0.27, 0.49, 0.73, 0.82, 0.88),
    "q2": (0.12, 0.20, 0.36, 0.51, 0.63, 0.71),
    "q3": (0.09, 0.17, 0.31, 0.47, 0.54, 0.65),
    "q4": (0.10, 0.16, 0.33, 0.42, 0.57, 0.67),
}
CHESSBOARD = {
    "full": (0.16, 0.36, 0.59, 0.77, 0.86, 0.89),
    "sfp": (0.21, 0.21, 0.21, 0.21, 0.22, 0.22),
    "sfp_mixup": (0.15, 0.21, 0.30, 0.39, 0.46, 0.52),
    "sfp_cutout": (0.17, 0.18, 0.22, 0.30, 0.40, 0.50),
    "pp2": (0.21, 0.44, 0.61, 0.76, 0.86, 0.89),
    "pp3": (0.15, 0.34, 0.58, 0.77, 0.86, 0.88),
    "pp4": (0.16, 0.36, 0.59, 0.77, 0.86, 0.89),
    "q2": (0.16, 0.31, 0.43, 0.53, 0.61, 0.65),
    "q3": (0.17, 0.31, 0.43, 0.52, 0.61, 0.68),
    "q4": (0.19, 0.38, 0.50, 0.58, 0.65, 0.70),
}
TRANSFER = {  # victim: UER at eps 10 by source, in PAPER_ORDER
    "full": (0.82, 0.46, 0.45, 0.48, 0.83, 0.82, 0.80, 0.44, 0.37, 0.39),
    "sfp": (0.31, 0.78, 0.34, 0.46, 0.32, 0.35, 0.34, 0.33, 0.31, 0.30),
    "sfp_mixup": (0.38, 0.69, 0.85, 0.72, 0.69, 0.45, 0.43, 0.32, 0.39, 0.35),
    "sfp_cutout": (0.36, 0.58, 0.44, 0.77, 0.46, 0.39, 0.38, 0.41, 0.38, 0.36),
    "pp2": (0.82, 0.56, 0.57, 0.59, 0.86, 0.81, 0.81, 0.42, 0.43, 0.44),
    "pp3": (0.81, 0.47, 0.46, 0.48, 0.83, 0.83, 0.80, 0.43, 0.36, 0.40),
    "pp4": (0.81, 0.45, 0.44, 0.47, 0.83, 0.82, 0.82, 0.44, 0.37, 0.39),
    "q2": (0.67, 0.66, 0.62, 0.69, 0.77, 0.67, 0.67, 0.63, 0.54, 0.54),
    "q3": (0.67, 0.57, 0.60, 0.62, 0.77, 0.67, 0.67, 0.57, 0.54, 0.54),
    "q4": (0.68, 0.53, 0.57, 0.61, 0.79, 0.69, 0.66, 0.58, 0.53, 0.57),
}
TSR = {
    "full": (0.49, 0.59, 0.54, 0.39, 0.73, 0.38, 0.71, 0.59, 0.45, 0.73),
    "sfp": (0.35, 0.27, 0.47, 0.49, 0.50, 0.42, 0.45, 0.47, 0.58, 0.52),
    "sfp_mixup": (0.31, 0.52, 0.37, 0.05, 0.39, 0.07, 0.33, 0.25, 0.26, 0.49),
    "sfp_cutout": (0.27, 0.33, 0.52, 0.36, 0.35, 0.21, 0.46, 0.40, 0.32, 0.42),
    "pp2": (0.45, 0.46, 0.72, 0.61, 0.80, 0.44, 0.76, 0.53, 0.69, 0.64),
    "pp3": (0.52, 0.50, 0.69, 0.58, 0.78, 0.39, 0.72, 0.55, 0.60, 0.73),
    "pp4": (0.48, 0.62, 0.62, 0.58, 0.75, 0.43, 0.69, 0.58, 0.44, 0.73),
    "q2": (0.23, 0.30, 0.37, 0.23, 0.60, 0.22, 0.69, 0.41, 0.37, 0.50),
    "q3": (0.21, 0.38, 0.54, 0.32, 0.54, 0.25, 0.61, 0.39, 0.44, 0.58),
    "q4": (0.23, 0.34, 0.40, 0.44, 0.57, 0.26, 0.69, 0.46, 0.47, 0.63),
}
RANDOM_EXTRA = (0.004, 0.012, 0.028, 0.05, 0.085, 0.13)
"""Random signs: clean error plus this, by eps."""
SIZES = {  # file bytes, params, MACs, latency ms
    "full": (44.70e6, 11.17e6, 555e6, 6.31), "sfp": (40.46e6, 10.11e6, 507e6, 5.94),
    "sfp_mixup": (40.46e6, 10.11e6, 507e6, 5.91), "sfp_cutout": (40.46e6, 10.11e6, 507e6, 5.97),
    "pp2": (44.12e6, 11.03e6, 538e6, 6.20), "pp3": (42.42e6, 10.60e6, 538e6, 6.17),
    "pp4": (41.88e6, 10.47e6, 544e6, 6.22), "q2": (2.88e6, 11.17e6, 555e6, 3.42),
    "q3": (4.72e6, 11.17e6, 555e6, 3.55), "q4": (5.67e6, 11.17e6, 555e6, 3.61),
}  # fmt: skip
MACHINE = Machine("x86_64", "Example CPU 2.5 GHz", 2, "Linux 6.1", "3.11.9", "1.23.2")


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def evaluation_set(**changes: Any) -> EvaluationSet:
    values: dict[str, Any] = {
        "sha256": sha("evaluation"),
        "dataset": "digits",
        "classes": NAMES,
        "labels": tuple(i % CLASSES for i in range(N)),
        "image_shape": (3, SIDE, SIDE),
        "examples": examples().tobytes(),
        "note": "One rendering per original image, so images are independent.",
    }
    return EvaluationSet(**{**values, **changes})


def examples(count: int = 6) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Real digits in colour, uint8 [E, 3, 32, 32]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(5)
    images = []
    for label in range(count):
        grey = digits.images[np.flatnonzero(digits.target == label)[0]] / 16  # [8, 8]
        mask = np.kron(np.pad(grey, 0), np.ones((4, 4)))  # [32, 32]
        back, ink = rng.uniform(60, 120, 3), rng.uniform(140, 210, 3)
        images.append(back[:, None, None] + mask * (ink - back)[:, None, None])
    return np.clip(np.array(images), 0, 255).astype(np.uint8)


def cost(name: str) -> CostCard:
    size, params, macs, _ = SIZES[name]
    bits = variant_named(name).bits or 32
    executed = 8 if bits < 32 else 32
    return CostCard(
        int(size), int(size * 0.9), int(params), int(params * 0.98), int(macs),
        int(macs * bits * bits), int(macs * executed * executed), 21,
    )  # fmt: skip


def model(name: str, **changes: Any) -> ModelRecord:
    values: dict[str, Any] = {
        "sha256": sha("model", name), "variant": name, "method": variant_named(name).method,
        "dataset": "digits", "preset": "quickstart", "arch": "resnet18", "width": 64, "seed": 0,
        "cost": cost(name),
        "manifest": {
            "checks": {"argmax_agreement": 1.0, "max_relative_difference": 2.1e-6},
            "nominal_bits": variant_named(name).bits or 32,
        },
    }  # fmt: skip
    return ModelRecord(**{**values, **changes})


def pattern(source: str, eps: float, target: int | None) -> bytes:
    """A smooth sign pattern at full budget, float32 [3, 32, 32]."""
    seed = int(sha("delta", source, target)[:8], 16)
    rng = np.random.default_rng(seed)
    if source == "random":
        field = rng.normal(size=(3, SIDE, SIDE))
    elif source == "chessboard":
        rows, columns = np.indices((SIDE, SIDE))
        field = np.broadcast_to(((rows // 2 + columns // 2) % 2) - 0.5, (3, SIDE, SIDE))
    else:
        rows, columns = np.indices((SIDE, SIDE)) / SIDE
        field = sum(
            rng.normal(size=(3, 1, 1)) * np.sin(2 * np.pi * (a * rows + b * columns) + c)
            for a, b, c in rng.uniform(1, 7, size=(9, 3))
        )
    return (np.where(field > 0, 1, -1) * eps / 255).astype("<f4").tobytes()


def uap(source: str, eps: float, target: int | None = None, **changes: Any) -> UapRecord:
    control = source in ("random", "chessboard")
    values: dict[str, Any] = {
        "sha256": sha("uap", source, eps, target), "source": source,
        "attack": "control" if control else "sgd", "protocol": "clean", "dataset": "digits",
        "seed": 0, "eps": eps, "target": target, "shape": (3, SIDE, SIDE),
        "delta": pattern(source, eps, target),
        "meta": {} if control else {"saturated_fraction": 0.12},
    }  # fmt: skip
    return UapRecord(**{**values, **changes})


@dataclass
class Planter:
    """Writes runs whose rates are exactly the ones asked for."""

    store: Store
    evaluation: EvaluationSet
    device: str = "local"
    emulated: bool = False
    machine: Machine = MACHINE

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        self.labels = np.asarray(self.evaluation.labels)
        self.hardness = rng.normal(size=self.labels.size)

    def wrong(self, rate: float, *key: object) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Exactly round(rate n) images, the hard ones more often; the same key, the same images."""
        rng = np.random.default_rng(int(sha(*key)[:8], 16))
        order = np.argsort(-(0.8 * self.hardness + 0.6 * rng.normal(size=self.labels.size)))
        mask = np.zeros(self.labels.size, dtype=bool)
        mask[order[: round(rate * self.labels.size)]] = True
        return mask

    def run(
        self,
        name: str,
        perturbation: UapRecord | None,
        predictions: np.ndarray[Any, Any],
        runtime: Runtime = "onnxruntime",
    ) -> PredictionRun:
        machine = self.machine
        if runtime == "torch":
            machine = Machine(machine.arch, machine.cpu, 2, machine.os, "3.11.9", "2.8.0")
        return PredictionRun(
            sha("model", name), self.evaluation.sha256,
            None if perturbation is None else perturbation.sha256,
            "local" if runtime == "torch" else self.device, self.emulated, runtime, machine,
            tuple(int(p) for p in predictions), 0.5,
        )  # fmt: skip

    def erring(self, rate: float, *key: object) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng(int(sha("class", *key)[:8], 16))
        other = (self.labels + rng.integers(1, CLASSES, self.labels.size)) % CLASSES
        return np.where(self.wrong(rate, *key), other, self.labels)

    def steered(self, rate: float, target: int, *key: object) -> np.ndarray[Any, Any]:
        """Exactly round(rate n) images predicted as the target."""
        rng = np.random.default_rng(int(sha("target", *key)[:8], 16))
        hit = np.zeros(self.labels.size, dtype=bool)
        hit[rng.permutation(self.labels.size)[: round(rate * self.labels.size)]] = True
        missed = np.where(self.labels == target, (target + 1) % CLASSES, self.labels)
        return np.where(hit, target, missed)


def add_variant(planter: Planter, name: str, *, torch: bool = True) -> None:
    """Clean, white-box at every eps, transfer and targeted at eps 10, controls; PyTorch beside."""
    victim = variant_named(name)
    planned: list[tuple[UapRecord | None, np.ndarray[Any, Any]]] = [
        (None, planter.erring(1 - CLEAN[name], name, "clean"))
    ]
    for i, eps in enumerate(EPS):
        rate = CLEAN[name]
        planned += [
            (uap(name, eps), planter.erring(WHITE_BOX[name][i], name, "own")),
            (uap("chessboard", eps), planter.erring(CHESSBOARD[name][i], name, "chess")),
            (uap("random", eps), planter.erring(1 - rate + RANDOM_EXTRA[i], name, "random")),
        ]
    for source, rate in zip(PAPER_ORDER, TRANSFER[name], strict=True):
        if source != name:
            planned.append((uap(source, 10.0), planter.erring(rate, name, source)))
    for target, rate in enumerate(TSR[name]):
        planned.append((uap(name, 10.0, target), planter.steered(rate, target, name, target)))
    runs = []
    for perturbation, predictions in planned:
        runs.append(planter.run(name, perturbation, predictions))
        if torch:
            other = predictions.copy()
            if victim.method != "apot" and perturbation is not None:
                other[int(sha(name, perturbation.sha256)[:6], 16) % N] += 1
                other %= CLASSES
            runs.append(planter.run(name, perturbation, other, "torch"))
    planter.store.add_prediction_runs(runs)


def add_latency(
    store: Store,
    name: str,
    *,
    mode: Literal["quick", "full"] = "full",
    spread: float = 0.01,
    device: str = "local",
    factor: float = 1.0,
) -> None:
    rng = np.random.default_rng(int(sha("latency", name)[:8], 16))
    processes = []
    for i in range(5):
        centre = SIZES[name][3] * factor * 1e6 * (1 + spread * (i - 2) / 4)
        samples = centre * (1 + np.abs(rng.normal(0, 0.02, 220)))
        processes.append(
            LatencyProcess(
                int(60e6),
                int(2 * centre),
                tuple(map(int, samples[:10])),
                tuple(map(int, samples)),
                ({"load_1m": 0.4, "frequency_mhz": 2500},),
                int(90e6),
                int(120e6 + SIZES[name][0]),
            )
        )
    store.add_latency_run(
        LatencyRun(
            sha("model", name), device, False, "onnxruntime", MACHINE, mode, 2, tuple(processes)
        )
    )


def register(store: Store, evaluation: EvaluationSet, names: tuple[str, ...]) -> None:
    store.add_evaluation_set(evaluation)
    for name in names:
        store.add_model(model(name))
    for eps in EPS:
        for source in (*PAPER_ORDER, "random", "chessboard"):
            store.add_uap(uap(source, eps))
    for source in PAPER_ORDER:
        for target in range(CLASSES):
            store.add_uap(uap(source, 10.0, target))


def full_store(path: Path) -> Store:
    """All ten variants, every attack, both runtimes, latency with one unstable measurement."""
    store = open_store(path, git_commit="0123abc")
    evaluation = evaluation_set()
    register(store, evaluation, PAPER_ORDER)
    planter = Planter(store, evaluation)
    for name in PAPER_ORDER:
        add_variant(planter, name)
        add_latency(store, name, spread=0.3 if name == "pp3" else 0.01)
    return store


def main(folder: Path) -> None:
    from reports.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "results.db"
    database.unlink(missing_ok=True)
    with full_store(database) as store:
        sys.stdout.write(f"{write_report(store, folder / 'report').html}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

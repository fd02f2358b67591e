"""Stores on CIFAR-10 and SVHN in name, with whatever rates a test wants the paper's claims to meet.

Images err in one order (the hard ones first), so that rates alone decide every paired test. Run as
a script to look at a page: `python -m tests.reports.paper_store FOLDER [cifar10|svhn]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.records import CONTROLS, PAPER_ORDER
from harness.store import Store, open_store
from reports.paper.values import Published, paper
from tests.reports import synthetic
from tests.reports.synthetic import uap

Uer = Callable[[str, str, float], float | None]
"""(victim, source or control, eps) -> UER; None where it was not measured."""
Tsr = Callable[[str, int], float | None]
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CRAFT_META = {"settings": {"epochs": 10}, "images": 10_000, "saturated_fraction": 0.12}


def published_uer(published: Published) -> Uer:
    """The paper's own rates: white-box from Figure 1, transfer from Figure 2."""

    def rate(victim: str, source: str, eps: float) -> float | None:
        if source in CONTROLS:
            return published.controls[source][eps][victim]
        if source == victim:
            return published.white_box_uer[eps][victim]
        return published.transfer_uer[eps][victim][source]

    return rate


def published_tsr(published: Published) -> Tsr:
    return lambda name, target: published.tsr[10.0][name][target]


def plant(
    store: Store,
    uer: Uer,
    tsr: Tsr,
    *,
    clean: Callable[[str], float] = lambda _: 0.1,
    names: Sequence[str] = PAPER_ORDER,
    eps: Sequence[float] = (10.0,),
    images: int = 1_000,
    as_paper: bool = True,
    **evaluation: Any,
) -> None:
    """One store: every variant under every source's perturbation, and steered to every class.

    Args:
        store: an empty one.
        uer: of every victim and source.
        tsr: of every variant and class.
        clean: error rate on clean images, by variant.
        names: the variants there are, as victims and as sources.
        eps: budgets of the matrix.
        images: of the evaluation set.
        as_paper: labelled with the paper's set-up, as far as a store records it.
        evaluation: what differs in the evaluation set.
    """
    svhn = str(evaluation.get("dataset")).startswith("svhn")
    classes = tuple("0123456789") if svhn else CIFAR10_CLASSES
    known = synthetic.evaluation_set(
        **{"dataset": "cifar10", "classes": classes, "note": "", **evaluation},
        labels=tuple(i % 10 for i in range(images)),
    )
    store.add_evaluation_set(known)
    planter = synthetic.Planter(store, known)
    label = {"preset": "paper" if as_paper else "reduced", "width": 64 if as_paper else 16}
    protocol = "paper" if as_paper else "clean"
    for name in names:
        store.add_model(synthetic.model(name, dataset=known.dataset, **label))
    perturbations = {
        (source, e, target): uap(source, e, target, protocol=protocol, dataset=known.dataset,
                                 meta={} if source in CONTROLS else CRAFT_META)
        for source in (*names, *CONTROLS)
        for e in eps
        for target in (None, *(range(10) if e == 10.0 and source not in CONTROLS else ()))
    }  # fmt: skip
    for record in perturbations.values():
        store.add_uap(record)
    runs = []
    for name in names:
        runs.append(planter.run(name, None, planter.erring(clean(name), "same")))
        for (source, e, target), record in perturbations.items():
            if target is None and (rate := uer(name, source, e)) is not None:
                runs.append(planter.run(name, record, planter.erring(rate, "same")))
            elif target is not None and source == name and (hit := tsr(name, target)) is not None:
                runs.append(planter.run(name, record, steered(planter, hit, target)))
    store.add_prediction_runs(runs)


def steered(planter: synthetic.Planter, rate: float, target: int) -> np.ndarray[Any, Any]:
    """Exactly round(rate n) images predicted as the target: a higher rate takes a superset."""
    hit = planter.wrong(rate, "target")
    missed = np.where(planter.labels == target, (target + 1) % 10, planter.labels)
    return np.where(hit, target, missed)


def plant_paper(store: Store, key: str, **changes: Any) -> None:
    """The paper's own rates."""
    published = paper().datasets[key]
    values: dict[str, Any] = {
        "dataset": key,
        "clean": lambda name: 1 - published.clean_accuracy[name],
        **changes,
    }
    plant(store, published_uer(published), published_tsr(published), **values)


def main(folder: Path, key: str) -> None:
    from reports.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "results.db"
    database.unlink(missing_ok=True)
    published = paper().datasets[key]
    rng = np.random.default_rng(1)
    theirs, aims = published_uer(published), published_tsr(published)

    def near(rate: float | None) -> float | None:
        return (
            None if rate is None else float(np.clip(0.05 + 0.85 * rate + rng.normal(0, 0.05), 0, 1))
        )

    with open_store(database) as store:
        plant(
            store,
            lambda victim, source, eps: near(theirs(victim, source, eps)),
            lambda name, target: near(aims(name, target)),
            clean=lambda name: 1.2 - published.clean_accuracy[name],
            eps=(6.0, 10.0),
            images=2_001,
            as_paper=False,
            dataset=key if key == "cifar10" else "svhn_partial",
            note="" if key == "cifar10" else "svhn_partial.npz: 9,082 train / 2,001 test images.",
        )
        sys.stdout.write(f"{write_report(store, folder / 'report').paper}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cifar10")

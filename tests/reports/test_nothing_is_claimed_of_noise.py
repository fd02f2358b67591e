"""Stores in which nothing differs: whatever the report says of them must be a chance in twenty."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from harness.records import PAPER_ORDER
from harness.store import open_store
from reports import advice, fleet, heat, panels
from reports.headline import headline
from reports.selection import build_view
from reports.signals import MIN_AGREEMENT, masking_verdicts
from reports.verdicts import conclusions
from tests.reports import synthetic
from tests.reports.synthetic import uap

STORES, IMAGES = 200, 120
NAMES = ("full", "sfp", "pp2", "q4")
CLAIMS = re.compile(
    r"shown to (err|do|survive|differ|be (less|more|lower|higher))(?! than three times)"
    r"|errs? least|survives? better|lowers that|a difference of|would err on at most",
    re.IGNORECASE,
)
DENIALS = re.compile(r"\b(no|not)\b[^.;,()]*\bshown\b[^.;,]*", re.IGNORECASE)
"""`no compressed variant is shown to survive better`: says that nothing is claimed."""


def claims(text: str) -> list[str]:
    plain = text.replace("\u00a0", " ")
    return [found.group() for found in CLAIMS.finditer(DENIALS.sub("", plain))]


def null_probe(rng: np.random.Generator) -> dict[str, object]:
    """64 images, half of them without a gradient; slopes of 0.2 of what was promised."""
    own, along = rng.normal(1, 0.3, 64), rng.normal(size=(64, 8))
    # Noise of this size makes the cosine of promised and measured slopes 0.2.
    measured = along + rng.normal(0, np.sqrt(1 / MIN_AGREEMENT**2 - 1), (64, 8))
    return {
        "images": 64,
        "zero_gradient": int(rng.binomial(64, 0.5)),
        "saturated": 0,
        "own_promised": own.tolist(),
        "own_measured": (MIN_AGREEMENT * own + rng.normal(0, 0.2, 64)).tolist(),
        "random_promised": along.tolist(),
        "random_measured": measured.tolist(),
        "reach_255": 5.0,
    }


def null_store(path: Path, seed: int, *, names: tuple[str, ...] = NAMES, crafting_seeds: int = 1):
    """Every model errs at random on the same share of the images, whatever it is attacked with.

    Gradients are probed, too, and are on the very limit of being no guide.
    """
    rng = np.random.default_rng(seed)
    store = open_store(path)
    evaluation = synthetic.evaluation_set(labels=tuple(int(i) % 10 for i in range(IMAGES)))
    store.add_evaluation_set(evaluation)
    planter = synthetic.Planter(store, evaluation)
    labels = np.asarray(evaluation.labels)
    hardness = rng.normal(size=IMAGES)
    perturbations = {
        (source, eps, s): uap(
            source,
            eps,
            sha256=synthetic.sha("u", source, eps, s),
            seed=s,
            **({} if source in ("random", "chessboard") else {"meta": {"probe": null_probe(rng)}}),
        )
        for source in (*names, "random", "chessboard")
        for eps in (8.0, 10.0)
        for s in range(crafting_seeds if source in names else 1)
    }
    targeted = {(name, t): uap(name, 10.0, t) for name in names for t in range(2)}
    searched = {
        (name, eps): uap(name, eps, sha256=synthetic.sha("f", name, eps), attack="fourier")
        for name in names
        for eps in (8.0, 10.0)
    }
    for record in (*perturbations.values(), *targeted.values(), *searched.values()):
        store.add_uap(record)
    runs = []
    for name in names:
        store.add_model(synthetic.model(name))

        def errs(threshold: float) -> np.ndarray:
            wrong = hardness + rng.normal(size=IMAGES) > threshold
            return np.where(wrong, (labels + 1) % 10, labels)

        runs.append(planter.run(name, None, errs(1.8)))
        runs += [planter.run(name, searched[name, eps], errs(0.0)) for eps in (8.0, 10.0)]
        for (source, eps, _), record in perturbations.items():
            if eps == 10.0 or source in (name, "random", "chessboard"):
                runs.append(planter.run(name, record, errs(0.0)))
        for (source, target), record in targeted.items():
            if source == name:
                hit = rng.random(IMAGES) < 0.3
                runs.append(planter.run(name, record, np.where(hit, target, (labels + 1) % 10)))
    store.add_prediction_runs(runs)
    return store


FAMILIES = {
    "headline": lambda view: [headline(view)],
    "clean": lambda view: sentences(view, "against-full", "Clean images"),
    "white box": lambda view: sentences(view, "against-full", "White-box perturbations"),
    "worst": lambda view: sentences(view, "against-full", "Worst untargeted perturbation"),
    "masking": lambda view: (
        [v.word for v in masking_verdicts(view) if v.word == "masked"] + sentences(view, "masking")
    ),
    "fleet": fleet.fleet,
    "advice": advice.by_constraint,
    "curves": lambda view: [panels.curves(view).caption],
    "transfer": lambda view: [m.caption for m in heat.heat_maps(view)],
    "targeted": lambda view: [panels.bars(view).caption],
}


def sentences(view, anchor, lead=None):
    said = [s for g in conclusions(view) if g.anchor == anchor for s in g.sentences]
    return [s.text for s in said if lead in (None, s.lead)]


def false_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes) -> dict[str, int]:
    # Drawings are not what is tested; the words beside them are.
    monkeypatch.setattr(panels.figures, "curve_panel", lambda *_a, **_k: "")
    monkeypatch.setattr(panels.figures, "bars_panel", lambda *_a, **_k: "")
    counts = dict.fromkeys(FAMILIES, 0)
    for seed in range(STORES):
        with null_store(tmp_path / f"{seed}.db", seed, **changes) as store:
            view = build_view(store)
        for family, texts in FAMILIES.items():
            counts[family] += any(claims(text) for text in texts(view)) or "masked" in texts(view)
    return counts


LIMIT = int(STORES * (0.05 + 2 * np.sqrt(0.05 * 0.95 / STORES)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("crafting_seeds", [1, 3])
def test_at_most_one_null_store_in_twenty_has_a_claim_of_each_family(
    tmp_path, monkeypatch, crafting_seeds
):
    counts = false_claims(tmp_path, monkeypatch, crafting_seeds=crafting_seeds)
    assert all(count <= LIMIT for count in counts.values()), counts


def test_a_few_null_stores_have_hardly_a_claim(tmp_path, monkeypatch):
    """The quick part of the above: 10 families in 12 stores."""
    monkeypatch.setattr(f"{__name__}.STORES", 12)
    counts = false_claims(tmp_path, monkeypatch)
    assert sum(counts.values()) <= 13, counts  # 120 chances of 5 %: P(more) < 1 %


def test_null_stores_raise_every_kind_of_sign(tmp_path):
    """Else nothing could be called masked there, and that nothing is would say nothing."""
    raised, measured = set(), set()
    for seed in range(12):
        with null_store(tmp_path / f"{seed}.db", seed) as store:
            for verdict in masking_verdicts(build_view(store)):
                raised |= {signal.kind for signal in verdict.raised()}
                measured |= {k for k, s in verdict.signals.items() if s.state != "not measured"}
    assert measured >= {"gradient_free", "transfer", "control", "no_gradient", "slope", "agreement"}
    assert raised & {"no_gradient", "slope", "agreement"}


def test_the_words_of_a_claim_are_recognised(full, monkeypatch):
    """Else a report that claims everything would pass: real differences are said in these words."""
    view = build_view(full.store)
    monkeypatch.setattr(panels.figures, "curve_panel", lambda *_a, **_k: "")
    monkeypatch.setattr(panels.figures, "bars_panel", lambda *_a, **_k: "")
    found = {name: sum(len(claims(t)) for t in texts(view)) for name, texts in FAMILIES.items()}
    assert [name for name, count in found.items() if not count] == ["masking"]
    assert claims("Q4 for 132 kB lowers that to 87.0 % (p < 0.001).") == ["lowers that"]
    assert claims("No compressed variant is shown to survive better than Full: at 8 it errs") == []
    assert claims("Between these no difference is shown.") == []


def test_a_model_the_user_brought_changes_nothing_said_of_the_others(tmp_path):
    with null_store(tmp_path / "r.db", 3, names=PAPER_ORDER) as store:
        view = build_view(store)
        before = {t.variant.name: t.p for t in inference_tests(view)}
        labels = np.asarray(view.evaluation.labels)
        planter = synthetic.Planter(store, view.evaluation)
        for i in range(5):
            mine = f"mine{i}"
            store.add_model(
                synthetic.model("full", sha256=synthetic.sha("model", mine), variant=mine,
                                method="other")
            )  # fmt: skip
            met = [None, *(view.uaps[row.uap_sha256] for row in view.baseline.attacked.values())]
            store.add_prediction_runs([planter.run(mine, record, labels) for record in met])
        after = {t.variant.name: t.p for t in inference_tests(build_view(store))}
    assert {name: after[name] for name in before} == before
    assert max(after[f"mine{i}"] for i in range(5)) < 0.05  # they are tested, among themselves


def inference_tests(view):
    from reports.inference import against_baseline

    return against_baseline(view, "clean") + against_baseline(view, "worst")

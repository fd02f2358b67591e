"""The verdict on networks of which it is known: trained for real, masked deliberately.

Everything between the network and the word is the product's own: crafting with and without
gradients, the probe, the files, the store, the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from harness.crafting.perturbation import load_perturbation, uap_record
from harness.inference import predict
from harness.pipeline import uap_files, uaps
from harness.pipeline.context import Context
from harness.pipeline.uap_names import control_names, gradient_free_names, transfer_name
from harness.pipeline.uaps import craft_tasks
from harness.presets import preset_named
from harness.store import open_store
from harness.workspace import Workspace
from reports.masking import masking_group
from reports.masking_table import masking_json, rows_of
from reports.selection import build_view
from reports.signals import MaskingVerdict, masking_verdicts
from reports.tradeoff import tradeoff_table
from reports.view import View
from tests.reports import synthetic
from tests.reports.planted import Overconfident, Shattered, Staircase, trained

CPU = torch.device("cpu")
PLAIN = ("full", "sfp")
PLANTED = {"sfp_mixup": "overconfident", "sfp_cutout": "staircase", "pp2": "shattered"}


@dataclass(frozen=True)
class Judged:
    view: View
    verdicts: dict[str, MaskingVerdict]
    models: dict[str, nn.Module]
    context: Context


@pytest.fixture(scope="module", params=["momentum", "sgd"])
def judged(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Judged]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("planted")
    base = preset_named("quickstart")
    # Epochs enough for `momentum` to look for a wave of its own.
    craft = replace(base.craft, eps=(5.0, 10.0), targets=(), epochs=10)
    config = replace(base, craft=craft, attack=request.param)
    context = Context(Workspace(root, config), CPU)
    data = context.data
    first, second = (trained(data.train, seed=seed) for seed in (1, 2))
    models: dict[str, nn.Module] = {
        "full": first,
        "sfp": second,
        "sfp_mixup": Overconfident(first),
        "sfp_cutout": Staircase(first),
        "pp2": Shattered(first),
    }
    with pytest.MonkeyPatch.context() as patch:
        # Only what belongs to checkpoints is stood in for: these networks have none.
        patch.setattr(uap_files, "valid_checkpoint", lambda _context, _variant: True)
        patch.setattr(uap_files, "checkpoint_key", lambda _context, variant: variant.name)
        patch.setattr(uaps, "deployed_form", lambda model: model)
        patch.setattr(
            uaps,
            "load_checkpoint",
            lambda path: SimpleNamespace(build=lambda: models[path.stem]),
        )
        context.workspace.cache.mkdir()
        for name in models:
            context.workspace.checkpoint(name).write_bytes(name.encode())
        own = {
            name: [
                *(replace(transfer_name(context, name), eps=eps) for eps in craft.eps),
                *gradient_free_names(context, name),
            ]
            for name in models
        }
        controls = [name for name in control_names(context) if name.eps in craft.eps]
        names = controls + [name for of in own.values() for name in of]
        context.build(craft_tasks(context, names))
    evaluation = context.evaluation_set()
    store = open_store(context.workspace.results)
    store.add_evaluation_set(evaluation)
    planter = synthetic.Planter(store, evaluation)
    records = {}
    for name in names:
        path = context.workspace.uap(name)
        records[name] = uap_record(path, load_perturbation(path))
        store.add_uap(records[name])
    for victim, model in models.items():
        store.add_model(synthetic.model(victim))
        met = [*controls, *own[victim]]
        met += [transfer_name(context, source) for source in models if source != victim]
        images = data.evaluation.images
        runs = [planter.run(victim, None, predict(model, images, None, device=CPU))]
        for name in met:
            delta = load_perturbation(context.workspace.uap(name)).delta_255
            predicted = predict(model, images, delta, device=CPU)
            runs.append(planter.run(victim, records[name], predicted))
        store.add_prediction_runs(runs)
    view = build_view(store)
    verdicts = {v.variant.name: v for v in masking_verdicts(view)}
    yield Judged(view, verdicts, models, context)
    store.close()
    torch.set_num_threads(threads)


def test_a_mask_does_not_change_what_is_predicted(judged: Judged) -> None:
    clean = {v.name: v.clean.clean_accuracy for v in judged.view.variants if v.clean}
    assert min(clean[name] or 0 for name in PLAIN) > 0.8
    for name in PLANTED:
        assert clean[name] == pytest.approx(clean["full"], abs=0.05)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_network_is_not_masked(name: str, judged: Judged) -> None:
    verdict = judged.verdicts[name]
    assert verdict.word == "not masked", (verdict.because, verdict.signals)
    assert verdict.raised() == []
    free = verdict.signals["gradient_free"]
    assert free.value is not None
    assert free.reference is not None
    assert 0.3 < free.value < free.reference
    assert (verdict.signals["agreement"].low or 0) > 0.5


@pytest.mark.parametrize("name", PLANTED)
def test_a_masked_network_is_found_out(name: str, judged: Judged) -> None:
    verdict = judged.verdicts[name]
    assert verdict.word == "masked", (verdict.because, verdict.signals)
    free = verdict.signals["gradient_free"]
    assert free.p is not None
    own, worst = verdict.variant.white_box, verdict.variant.worst
    assert own is not None
    assert worst is not None
    if own.attack == "sgd":
        # Its white-box number would call it robust; its worst case does not.
        assert "gradient_free" in verdict.because
        assert free.p < 0.001
        assert (own.uer or 0) < (worst.uer or 0) - 0.1
    else:  # `momentum` ends with a wave, which took no gradient
        assert verdict.pattern == "wave"
        assert (own.uer or 0) > (worst.uer or 0) - 0.25


def test_each_mask_is_seen_by_the_sign_it_leaves(judged: Judged) -> None:
    signals = {PLANTED[name]: judged.verdicts[name].signals for name in PLANTED}
    assert signals["overconfident"]["no_gradient"].value == pytest.approx(1.0, abs=0.2)
    assert signals["overconfident"]["agreement"].state == "clear"  # of the margin, which has slopes
    assert signals["staircase"]["no_gradient"].value == 1.0
    assert signals["staircase"]["agreement"].state == "raised"
    assert signals["shattered"]["no_gradient"].value == 0.0  # there are gradients, of no use
    assert signals["shattered"]["slope"].state == "raised"
    assert signals["shattered"]["agreement"].state == "raised"


def test_without_the_search_no_plain_network_is_cleared(judged: Judged) -> None:
    """Silence is not a pass: what was not measured leaves the question open."""
    bare = tuple(replace(v, searches=()) for v in judged.view.variants)
    verdicts = {
        v.variant.name: v for v in masking_verdicts(replace(judged.view, variants=bare, memo={}))
    }
    assert all(verdicts[name].word == "undecided" for name in PLAIN)
    assert all("gradient_free" in verdicts[name].because for name in PLAIN)
    # Bad gradients together with a transfer that does more, or with a pattern, still convict.
    assert {verdicts[name].word for name in PLANTED} == {"masked"}


def test_the_report_and_the_rows_say_so(judged: Judged) -> None:
    group = masking_group(judged.view)
    assert group.tone == "warn"
    leads = [sentence.lead for sentence in group.sentences]
    assert leads[:3] == ["SFP+M: masked", "SFP+C: masked", "PP2: masked"]
    assert [" and ".join(leads[3:]).count(name) for name in ("Full", "SFP", "not masked")] in (
        [1, 1, 1],  # both with a search that does less, or both with one that does as much
        [1, 1, 2],
    )
    marks = {row.name: row.flags for row in tradeoff_table(judged.view).rows}
    assert marks == dict.fromkeys(PLAIN, ()) | dict.fromkeys(PLANTED, ("gradients masked",))
    values = {entry["variant"]: entry for entry in masking_json(judged.view)}
    assert values["full"]["signals"]["gradient_free"]["state"] in ("clear", "unclear")
    with open_store(judged.context.workspace.results) as store:
        rows = rows_of(store, judged.view.rows)
    said = {row["variant"]: row["masking"] for row in rows if row["masking"]}
    assert said == {name: v.word for name, v in judged.verdicts.items()}


def test_the_search_never_asks_for_a_gradient_and_stays_within_its_budget(judged: Judged) -> None:
    context = judged.context
    for name in judged.models:
        search = next(s for s in gradient_free_names(context, name) if s.eps == 10)
        found = load_perturbation(context.workspace.uap(search))
        gradient = load_perturbation(context.workspace.uap(transfer_name(context, name)))
        assert np.abs(found.delta_255).max() <= 10
        assert found.attack == "fourier"
        assert "probe" not in found.meta
        assert set(gradient.meta["probe"]) >= {"zero_gradient", "own_promised", "random_measured"}
        # A gradient evaluation counts as two forward passes.
        assert found.meta["forwards"] <= 2 * context.config.craft.epochs * 256

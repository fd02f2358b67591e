"""Verdicts on the paper's claims: known both ways, never from noise, never from what is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.metrics import UNSEEN
from harness.records import PAPER_ORDER, HarnessError
from harness.store import open_store
from reports.paper.checks import (
    Check,
    Contrast,
    Estimated,
    contrast,
    estimate,
    simultaneous,
    state_of,
)
from reports.paper.judging import family_sizes, judge
from reports.paper.study import Cell, study_of
from reports.selection import build_view
from tests.reports import paper_store, synthetic

CIFAR10 = {
    "sfp-victim", "sfp-source", "pp-same", "q-masking", "sfp-targeted", "pp-targeted", "q-targeted",
}  # fmt: skip
SVHN = {
    "sfp-victims-svhn", "sfp-source", "pp-same", "q-same", "sfp-sources-svhn", "sfp-targeted-svhn",
}  # fmt: skip
BOTH = {"datasets-targeted", "datasets-quantised", "datasets-uer"}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    with open_store(tmp_path_factory.mktemp("checks") / "results.db") as store:
        paper_store.plant_paper(store, "cifar10", images=120)
        yield build_view(store)


def verdicts(store):
    study = study_of(build_view(store))
    assert study is not None
    judged = {j.claim.anchor: j for j in judge(study)}
    assert len(judged) == 14
    return judged


def words(store):
    return {
        anchor: j.word.removesuffix(" here")
        for anchor, j in verdicts(store).items()
        if j.word != "cannot be judged here"
    }


def test_the_papers_own_rates_on_cifar10_give_its_own_verdicts(store):
    paper_store.plant_paper(store, "cifar10", images=3_000)
    assert words(store) == dict.fromkeys(CIFAR10, "holds")


def test_the_papers_own_rates_on_svhn_give_what_its_numbers_support(store):
    paper_store.plant_paper(store, "svhn", images=6_000)
    assert words(store) == {
        **dict.fromkeys(SVHN, "holds"),
        "sfp-source": "does not hold",  # 0.83 times as harmful, not about half
        "pp-same": "undecided",  # PP2's perturbation differs by 5.4 points, the margin is 5
    }


def contrary(victim, source, eps):
    """Rates under which every claim fails, whichever data set it is about."""
    if source in ("chessboard", "random"):
        return 0.3
    if victim == source:
        return {"full": 0.5, "pp2": 0.3, "q2": 0.8, "q3": 0.8, "q4": 0.8}.get(victim, 0.5)
    if victim in ("sfp", "sfp_mixup", "sfp_cutout"):
        return 0.7
    if victim == "full" and source == "sfp":
        return 0.49
    if source in ("sfp_mixup", "sfp_cutout"):
        return 0.6
    return 0.4


def contrary_tsr(name, target):
    if name == "full":
        return 0.5
    rates = {"sfp": 0.4, "sfp_mixup": 0.8, "sfp_cutout": 0.4, "pp2": 0.2, "pp3": 0.2, "pp4": 0.2}
    return rates.get(name, 0.7)


@pytest.mark.parametrize(("key", "claims"), [("cifar10", CIFAR10), ("svhn", SVHN)])
def test_contrary_rates_refute_every_claim(store, key, claims):
    paper_store.plant(store, contrary, contrary_tsr, dataset=key)
    assert words(store) == dict.fromkeys(claims, "does not hold")


@pytest.mark.parametrize(("key", "claims"), [("cifar10", CIFAR10), ("svhn", SVHN)])
def test_variants_that_are_all_alike_bear_out_only_that_nothing_changes(store, key, claims):
    paper_store.plant(store, lambda *_: 0.6, lambda *_: 0.4, dataset=key)
    same = {"pp-same", "q-same"}
    assert words(store) == {c: "holds" if c in same else "does not hold" for c in claims}


def test_few_images_leave_claims_undecided(store):
    """The paper's rates, but 40 images: nothing that needs a narrow interval is called shown."""
    paper_store.plant_paper(store, "cifar10", images=40)
    found = words(store)
    assert found["pp-same"] == "undecided"
    assert "does not hold" not in found.values()


def test_noise_is_seldom_called_a_difference(view):
    """Every attack has its way with a random half of the images: a family errs in one of twenty."""
    labels = np.asarray(view.evaluation.labels)
    targets = {sha: u.target for sha, u in view.uaps.items()}
    stores, shown, held = 60, 0, 0
    for seed in range(stores):
        rng = np.random.default_rng(seed)
        predicted = {}
        for key in view.judged:
            target = targets.get(key[1])
            hit = rng.random(labels.size) < 0.5
            miss = labels if target is None else np.where(labels == target, -2, labels)
            predicted[key] = np.where(hit, (labels + 1) % 10 if target is None else target, miss)
        judged = judge(study_of(replace(view, judged=predicted)))
        same_rates = [d for j in judged for d in j.decided if d.check.factor == 1.0]
        assert len(same_rates) == 89
        shown += any(d.found.p < 0.05 for d in same_rates)
        held += sum(j.word == "holds here" for j in judged if j.claim.anchor != "pp-same")
    assert shown <= 8  # 3 are expected; more than 8 are rare
    assert held == 0


@pytest.mark.parametrize(
    ("without", "able"),
    [
        (("q3",), {"sfp-source", "pp-same", "sfp-targeted", "pp-targeted"}),
        (("sfp",), {"pp-same", "q-masking", "pp-targeted", "q-targeted"}),
        (("full",), set()),
        (("pp2", "pp3", "pp4", "sfp_mixup"), {"sfp-source", "q-targeted"}),
    ],
)
def test_a_missing_variant_makes_only_its_claims_unjudgeable(store, without, able):
    names = tuple(n for n in PAPER_ORDER if n not in without)
    paper_store.plant_paper(store, "cifar10", names=names, images=400)
    found = verdicts(store)
    # SFP against every other needs all ten.
    assert {a for a, j in found.items() if j.word != "cannot be judged here"} == able
    for anchor in CIFAR10 - able:
        assert "missing" in found[anchor].why
        assert synthetic.variant_named(without[0]).label in found[anchor].why or len(without) > 1
        assert found[anchor].supported is True  # the paper's own numbers need no run of ours


def test_one_missing_class_is_named(store):
    paper_store.plant_paper(store, "cifar10", tsr=None, images=200) if False else paper_store.plant(
        store, lambda *_: 0.5, lambda name, t: None if (name, t) == ("q4", 7) else 0.3
    )
    found = verdicts(store)
    assert found["q-targeted"].why == "1 measurement is missing: Q4 steered to class 7"
    assert found["sfp-targeted"].word == "does not hold here"


def test_clean_images_only_is_no_crash(store):
    paper_store.plant(store, lambda *_: None, lambda *_: None, names=("full", "q4"))
    found = verdicts(store)
    assert {j.word for j in found.values()} == {"cannot be judged here"}


def test_no_image_in_common_cannot_be_judged(store):
    paper_store.plant_paper(store, "cifar10", images=200)
    view = build_view(store)
    crafted = synthetic.sha("uap", "sfp", 10.0, None)
    full = synthetic.sha("model", "full")
    key = next(k for k in view.judged if k[:2] == (full, crafted))
    predicted = {**view.judged, key: np.full(200, UNSEEN)}
    judged = {j.claim.anchor: j for j in judge(study_of(replace(view, judged=predicted)))}
    assert judged["sfp-source"].word == "cannot be judged here"
    assert "no image in common" in judged["sfp-source"].why
    assert judged["q-masking"].word == "holds here"


def test_claims_of_the_other_data_set_say_so_and_keep_the_papers_numbers(store):
    paper_store.plant_paper(store, "svhn", images=300)
    found = verdicts(store)
    for anchor in CIFAR10 - SVHN:
        assert found[anchor].why == "the paper says it of CIFAR-10; this report is about SVHN"
        assert found[anchor].supported is True
        assert found[anchor].met
    for anchor in BOTH:
        why = "it needs a run on CIFAR-10 too (harness report --beside WORKSPACE)"
        assert found[anchor].why == why


def test_p_values_are_one_holm_family_over_the_page(store):
    paper_store.plant_paper(store, "cifar10", images=300)
    study = study_of(build_view(store))
    judged = judge(study)
    raw = [estimate(study.view, d.check, level=0.95).p for j in judged for d in j.decided]
    adjusted = [d.found.p for j in judged for d in j.decided]
    assert family_sizes(judged) == (len(raw), 0) == (9 + 2 + 9 + 6 + 32 + 3 + 30, 0)
    smallest = int(np.argmin(raw))
    assert adjusted[smallest] == pytest.approx(min(1.0, len(raw) * raw[smallest]))
    assert all(a >= r for a, r in zip(adjusted, raw, strict=True))


# --- both data sets ------------------------------------------------------------------------------


def planted(folder, key, *args, images=2_000, **changes):
    with open_store(folder / f"{key}.db") as store:
        if args:
            paper_store.plant(store, *args, dataset=key, images=images, **changes)
        else:
            paper_store.plant_paper(store, key, images=images, **changes)
        return build_view(store)


def both(first, second):
    return {j.claim.anchor: j for j in judge(study_of(first, second)) if j.claim.anchor in BOTH}


def test_the_papers_own_rates_on_both_data_sets_give_what_its_numbers_support(tmp_path):
    cifar10, svhn = planted(tmp_path, "cifar10"), planted(tmp_path, "svhn", images=3_000)
    found, turned = both(cifar10, svhn), both(svhn, cifar10)
    assert {a: j.word for a, j in found.items()} == {
        "datasets-targeted": "holds here",
        "datasets-quantised": "holds here",
        "datasets-uer": "does not hold here",  # Q3 and Q4 err no more on CIFAR-10
    }
    assert {a: j.supported for a, j in found.items()} == {a: a != "datasets-uer" for a in BOTH}
    for anchor in BOTH:  # the page of the other data set says the same
        assert turned[anchor] == found[anchor]
    assert family_sizes(list(found.values())) == (0, 2 + 3 + 10)


def test_contrary_rates_on_both_data_sets_refute_every_claim(tmp_path):
    def alike(*_):
        return 0.5

    def turned_tsr(name, _):
        return 0.6 if name in ("sfp", "sfp_cutout") else 0.4

    first = planted(tmp_path, "cifar10", alike, turned_tsr)
    second = planted(tmp_path, "svhn", alike, alike)
    found = both(first, second)
    assert {j.word for j in found.values()} == {"does not hold here"}
    states = {a: {d.state for d in j.decided} for a, j in found.items()}
    assert states == {anchor: {"no"} for anchor in BOTH}


def test_few_images_on_one_side_leave_both_sides_undecided(tmp_path):
    found = both(planted(tmp_path, "cifar10"), planted(tmp_path, "svhn", images=20))
    assert found["datasets-quantised"].word == "undecided here"


def test_runs_of_two_scales_are_not_compared(tmp_path):
    cifar10 = planted(tmp_path, "cifar10", images=100)
    small = planted(tmp_path, "svhn", images=100, as_paper=False)
    for judged in both(cifar10, small).values():
        assert judged.word == "cannot be judged here"
        assert judged.why == (
            "the run on SVHN is of another scale: width 64 and 16; preset paper and reduced;"
            " protocol paper and clean"
        )


def test_what_is_missing_on_the_other_data_set_is_named(tmp_path):
    cifar10 = planted(tmp_path, "cifar10", images=100)
    svhn = planted(tmp_path, "svhn", images=100, names=[n for n in PAPER_ORDER if n != "q2"])
    found = both(cifar10, svhn)
    assert found["datasets-targeted"].word != "cannot be judged here"
    assert found["datasets-quantised"].why == (
        "1 measurement is missing: Q2 under the perturbation of Q2 on SVHN"
    )


@pytest.mark.parametrize("key", ["cifar10", "digits"])
def test_a_run_beside_it_must_be_of_the_other_data_set(view, tmp_path, key):
    with open_store(tmp_path / "other.db") as store:
        paper_store.plant_paper(store, "cifar10", images=20, dataset=key)
        with pytest.raises(HarnessError, match=f"this is cifar10 beside {key}"):
            study_of(view, build_view(store))


def test_the_interval_between_data_sets_holds_and_noise_is_seldom_a_difference(tmp_path):
    """400 pairs of data sets drawn with known rates: 0.5 and 0.35."""
    views = [planted(tmp_path, key, images=200) for key in ("cifar10", "svhn")]
    rates, draws, covered, shown = (0.5, 0.35), 400, 0, 0
    rng = np.random.default_rng(0)
    for _ in range(draws):
        sides = []
        for view, rate in zip(views, rates, strict=True):
            drawn, cells = with_predictions(view, [rng.random(200) < rate] * 2)
            sides.append((Check("", (cells[0],), (), "higher"), drawn))
        (one, first), (other, second) = sides
        found = contrast(Contrast("", one, first, "", other, second, "", "higher"), level=0.95)
        covered += found.low <= rates[0] - rates[1] <= found.high
        same = contrast(Contrast("", one, first, "", one, second, "", "higher"), level=0.95)
        assert same.low <= same.value <= same.high
        noise, _ = with_predictions(views[1], [rng.random(200) < rates[0]] * 2)
        apart = contrast(Contrast("", one, first, "", other, noise, "", "higher"), level=0.95)
        assert (apart.p < 0.05) == (not apart.low <= 0 <= apart.high)
        shown += apart.p < 0.05
    assert covered >= 0.93 * draws
    assert shown <= 0.075 * draws


# --- checks by themselves ------------------------------------------------------------------------


def with_predictions(view, hits):
    """The view with these images misclassified under Full's and Q4's own perturbations."""
    labels = np.asarray(view.evaluation.labels)
    predicted = dict(view.judged)
    cells = []
    for name, wrong in zip(("full", "q4"), hits, strict=True):
        row = study_of(view).attacked(name, name).row
        key = (row.model_sha256, row.uap_sha256, row.device, row.emulated, row.runtime)
        predicted[key] = np.where(wrong, (labels + 1) % 10, labels)
        cells.append(Cell(name, 0.5, row))
    return replace(view, judged=predicted), cells


ERRORS = st.tuples(*(st.lists(st.booleans(), min_size=120, max_size=120) for _ in range(2)))


@given(hits=ERRORS, factor=st.sampled_from([1.0, 0.5, 0.65]))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_estimate_is_the_difference_of_its_means_within_its_interval(view, hits, factor):
    changed, (full, q4) = with_predictions(view, hits)
    check = Check("", (full,), (q4,), "lower", factor)
    found = estimate(changed, check, level=0.95)
    assert found.first == pytest.approx(np.mean(hits[0]))
    assert found.second == pytest.approx(np.mean(hits[1]))
    assert found.value == pytest.approx(found.first - factor * found.second)
    assert found.low <= found.value + 1e-9
    assert found.value <= found.high + 1e-9
    assert 0 <= found.p <= 1
    assert found.n == 120
    wider = estimate(changed, check, level=0.999)
    assert wider.low <= found.low + 1e-9
    assert found.high <= wider.high + 1e-9
    if factor == 1.0:
        turned = estimate(changed, Check("", (q4,), (full,), "lower"), level=0.95)
        assert turned.p == pytest.approx(found.p)
        assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


FRACTIONS = st.floats(-1, 1).map(lambda v: round(v, 3))


@given(ends=st.tuples(FRACTIONS, FRACTIONS).map(sorted), place=st.floats(0, 1), p=st.floats(0, 1))
def test_states_mirror_and_keep_to_their_rule(ends, place, p):
    low, high = ends
    value = low + place * (high - low)
    found = Estimated(0.0, 0.0, value, low, high, p, 100)
    turned = Estimated(0.0, 0.0, -value, -high, -low, p, 100)
    lower, higher, same = (Check("", (), (), way) for way in ("lower", "higher", "same"))
    assert state_of(lower, found) == state_of(higher, turned)
    assert state_of(same, found) == state_of(same, turned)
    if state_of(lower, found) == "yes":
        assert p < 0.05
        assert value < 0
    if state_of(same, found) == "yes":
        assert max(abs(low), abs(high)) < 0.05
    if state_of(same, found) == "no":
        assert min(abs(low), abs(high)) > 0.05
        assert low * high > 0
    if p >= 0.05 and low < -0.05:
        assert state_of(lower, found) == "open"  # room for what is claimed, and no test


def test_states_by_hand():
    def found(value, low, high, p):
        return Estimated(0.5, 0.5, value, low, high, p, 1000)

    lower = Check("", (), (), "lower")
    assert state_of(lower, found(-0.10, -0.12, -0.08, 0.001)) == "yes"
    assert state_of(lower, found(0.10, 0.08, 0.12, 0.001)) == "no"
    assert state_of(lower, found(-0.01, -0.03, 0.01, 0.4)) == "no"  # at most 3 points of it
    assert state_of(lower, found(-0.04, -0.09, 0.01, 0.1)) == "open"
    ratio = Check("", (), (), "lower", 0.5, 0.0)
    assert state_of(ratio, found(-0.01, -0.03, 0.01, 0.4)) == "open"  # near the bound, not refuted
    same = Check("", (), (), "same")
    assert state_of(same, found(0.03, 0.02, 0.04, 0.001)) == "yes"  # shown to differ, by little
    assert state_of(same, found(0.05, 0.04, 0.06, 0.001)) == "open"
    assert state_of(same, found(-0.08, -0.10, -0.06, 0.001)) == "no"


def test_intervals_of_several_checks_hold_together():
    assert simultaneous(1) == pytest.approx(0.95)
    assert simultaneous(10) == pytest.approx(0.995)


def test_a_claim_about_a_ratio_by_hand(store):
    """30 of 100 images against 60 of 100, the same images first: exactly half."""
    rates = {("full", "full"): 0.6, ("full", "sfp"): 0.3}
    paper_store.plant(
        store, lambda v, s, _: rates.get((v, s)), lambda *_: None, names=("full", "sfp"), images=100
    )
    study = study_of(build_view(store))
    check = Check(
        "", (study.attacked("full", "sfp"),), (study.attacked("full", "full"),), "lower", 0.5
    )
    found = estimate(study.view, check, level=0.95)
    assert (found.first, found.second) == pytest.approx((0.3, 0.6))
    assert found.value == pytest.approx(0.0)
    assert found.p > 0.9


def test_crafting_seeds_are_averaged_and_widen_the_interval(store):
    """Full's own perturbation with three seeds, at 50, 60 and 70 %; Q4's with one, at 40 %."""
    rates = {("full", "full"): 0.5, ("q4", "q4"): 0.4}
    paper_store.plant(
        store, lambda v, s, _: rates.get((v, s)), lambda *_: None, names=("full", "q4"), images=500
    )
    planter = synthetic.Planter(store, build_view(store).evaluation)
    one_seed = build_view(store)
    for seed, rate in ((1, 0.6), (2, 0.7)):
        record = synthetic.uap(
            "full", 10.0, sha256=synthetic.sha("seed", seed), seed=seed, protocol="paper",
            dataset="cifar10", meta=paper_store.CRAFT_META,
        )  # fmt: skip
        store.add_uap(record)
        store.add_prediction_runs([planter.run("full", record, planter.erring(rate, "same"))])
    found = {}
    for seeds, view in ((1, one_seed), (3, build_view(store))):
        study = study_of(view)
        check = Check("", (study.attacked("q4", "q4"),), (study.attacked("full", "full"),), "lower")
        found[seeds] = estimate(view, check, level=0.95)
    assert found[1].second == pytest.approx(0.5)
    assert found[3].second == pytest.approx(0.6)
    assert found[3].value == pytest.approx(-0.2)
    assert found[3].high - found[3].low > 3 * (found[1].high - found[1].low)
    assert found[1].p < 1e-6
    assert found[3].p > 0.01  # three seeds that differ so much show little

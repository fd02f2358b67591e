"""Words follow from numbers: tests by hand, flags planted one at a time."""

from __future__ import annotations

import re

import numpy as np
import pytest

from harness.records import HarnessError
from reports import inference, words
from reports.choosing import fleet_mix, pareto_front
from reports.headline import headline
from reports.inference import holm
from reports.masking import signal_text
from reports.panels import bars
from reports.pictures import attacked_image
from reports.report import write_report
from reports.selection import build_view
from reports.signals import masking_verdicts
from reports.verdicts import conclusions
from tests.reports import synthetic
from tests.reports.synthetic import add_latency, uap


def plant(p, name, rates, *, meta=None):
    """Runs of one variant: {(source, eps): UER}; source None is clean."""
    runs = []
    for (source, eps), rate in rates.items():
        perturbation = None if source is None else uap(source, eps)
        if meta is not None and source == name:
            perturbation = uap(source, eps, meta=meta)
            p.store.add_uap(perturbation)
        # One key for all: a higher rate errs on a superset, so every discordant pair agrees.
        runs.append(p.run(name, perturbation, p.erring(rate, "same")))
    p.store.add_prediction_runs(runs)


SOUND = {(None, None): 0.05, ("random", 10.0): 0.08, ("chessboard", 10.0): 0.20}


def flagged(store):
    verdicts = masking_verdicts(build_view(store))
    return {v.variant.name: [signal.kind for signal in v.raised()] for v in verdicts}


def test_each_flag_fires_for_its_own_reason_only(planter, store):
    p = planter(*synthetic.PAPER_ORDER)
    plant(p, "full", {**SOUND, ("full", 10.0): 0.80, ("pp2", 10.0): 0.60, ("full", 8.0): 0.7})
    plant(p, "sfp", {**SOUND, ("sfp", 10.0): 0.50, ("full", 10.0): 0.70})
    plant(p, "pp2", {**SOUND, ("pp2", 10.0): 0.50, ("chessboard", 10.0): 0.50})
    plant(p, "pp3", {**SOUND, ("pp3", 10.0): 0.25, ("random", 10.0): 0.20})
    plant(p, "pp4", {**SOUND, ("pp4", 10.0): 0.50, ("pp4", 6.0): 0.60})
    plant(p, "q2", {**SOUND, ("q2", 10.0): 0.80}, meta={"saturated_fraction": 0.93})
    plant(p, "q3", {**SOUND, ("q3", 10.0): 0.80}, meta={"saturated_fraction": "<b>"})
    plant(p, "q4", {**SOUND, ("q4", 10.0): 0.50, ("full", 10.0): 0.505})
    assert flagged(store) == {
        "full": [], "sfp": ["transfer"], "pp2": [], "pp3": ["random"],
        "pp4": ["monotone"], "q2": ["saturated"], "q3": [], "q4": [],
    }  # fmt: skip
    view = build_view(store)
    [flag] = next(v for v in masking_verdicts(view) if v.variant.name == "sfp").raised()
    assert (flag.value, flag.reference, flag.other) == (0.70, 0.50, "full")
    said = signal_text(flag).replace(words.NBSP, " ")
    assert "crafted on Full makes it err on 70.0 %, its own on 50.0 % (p < 0.001" in said
    # Nothing was measured of gradients, and no search without them was made.
    assert {v.word for v in masking_verdicts(view)} == {"undecided"}
    [group] = [g for g in conclusions(view) if g.anchor == "masking"]
    assert "SFP: undecided" in [s.lead for s in group.sentences]


def test_a_model_that_knows_nothing_is_named(planter, store):
    p = planter("full", "sfp")
    plant(p, "full", {**SOUND, ("full", 10.0): 0.60})
    plant(p, "sfp", {**SOUND, (None, None): 0.91, ("sfp", 10.0): 0.92, ("full", 10.0): 0.91})
    [group] = [g for g in conclusions(build_view(store)) if g.anchor == "reach"]
    said = group.sentences[0].text.replace(words.NBSP, " ")
    assert said.startswith(
        "SFP (9.0 %): not shown to classify clean images better than a guess, or always the most"
        " frequent class (10.0 %)"
    )
    assert "Full" not in said


def test_a_fall_that_no_test_shows_is_no_flag(planter, store):
    p = planter("full")
    plant(p, "full", {**SOUND, ("full", 10.0): 0.60, ("full", 8.0): 0.605})  # 3 images: p = 0.25
    assert flagged(store) == {"full": []}


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_mcnemar_against_baseline_by_hand(planter, store):
    p = planter("full", "pp2", "q2")
    clean = {(None, None): 0.05}
    plant(p, "full", {**clean, ("full", 10.0): 0.50})
    plant(p, "pp2", {**clean, ("pp2", 10.0): 0.51})  # 6 more images, none fewer
    plant(p, "q2", {**clean, ("q2", 10.0): 0.40})  # 60 fewer
    tests = {c.variant.name: c for c in inference.against_baseline(build_view(store), "white_box")}
    assert tests["pp2"].p == pytest.approx(2 * 0.5**6)  # the larger of two: factor 1
    assert tests["q2"].p == pytest.approx(2 * 2 * 0.5**60)
    assert tests["pp2"].shown is True
    assert tests["q2"].difference == pytest.approx(-0.1)


def test_a_difference_without_a_test_is_not_claimed(planter, store):
    p = planter("full", "pp2")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.500})
    plant(p, "pp2", {(None, None): 0.05, ("pp2", 10.0): 0.495})  # 3 images: p = 0.25
    view = build_view(store)
    assert "No compressed variant is shown to survive better" in headline(view)
    said = " ".join(s.text for g in conclusions(view) for s in g.sentences)
    assert "No difference shown for PP2" in said
    assert "Shown to err" not in said


def test_headline_follows_the_numbers(planter, store):
    p = planter("full", "q2")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.80})
    plant(p, "q2", {(None, None): 0.06, ("q2", 10.0): 0.30})
    said = headline(build_view(store)).replace(words.NBSP, " ")
    assert said.startswith("Q2 survives better than the uncompressed Full model:")
    assert "errs on 30.0 % of the images, Full on 80.0 %" in said
    plant(p, "full", {("q2", 10.0): 0.20})
    plant(p, "q2", {("full", 10.0): 0.95})  # a transferred perturbation breaks it
    said = headline(build_view(store)).replace(words.NBSP, " ")
    assert "No compressed variant is shown to survive better" in said
    assert "Q2 is shown to be more fragile than Full" in said
    assert "95.0 %" in said


def test_who_survives_better_says_what_it_costs_on_clean_images(planter, store):
    p = planter("full", "q2", "q4")
    for name, clean, rate in (("full", 0.02, 0.80), ("q2", 0.12, 0.40), ("q4", 0.02, 0.45)):
        attacked = {(source, 10.0): rate for source in ("full", "q2", "q4")}
        plant(p, name, {(None, None): clean, **attacked})
    said = headline(build_view(store)).replace(words.NBSP, " ")
    assert said.startswith("Q2 and Q4 survive better")
    assert "The price: on clean images Q2 errs on 12.0 %, Full on 2.0 %." in said


def test_a_difference_too_small_to_choose_by_makes_no_survivor(planter, store):
    p = planter("full", "pp2", "q2")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.50})
    plant(p, "pp2", {(None, None): 0.05, ("pp2", 10.0): 0.46})  # shown, by 4 points
    plant(p, "q2", {(None, None): 0.05, ("q2", 10.0): 0.54})
    view = build_view(store)
    assert all(
        test.shown and not test.matters for test in inference.against_baseline(view, "worst")
    )
    said = headline(view).replace(words.NBSP, " ")
    assert said == (
        "No compressed variant is shown to survive better than the uncompressed Full model by 5"
        " points or more: under the worst untargeted perturbation measured at \u03b5 = 10/255 Full"
        " errs on 50.0 % of the images, the others err on 46.0 % to 54.0 %."
    )


def test_where_all_are_as_good_as_a_guess_a_smaller_budget_is_asked(planter, store):
    p = planter("full", "pp2", "q2")
    clean = {(None, None): 0.10}
    sweep = {2.0: 0.20, 4.0: 0.50, 8.0: 0.87}
    plant(p, "full", {**clean, ("full", 10.0): 0.88, **{("full", e): r for e, r in sweep.items()}})
    plant(p, "pp2", {**clean, ("pp2", 10.0): 0.87, ("pp2", 2.0): 0.30, ("pp2", 4.0): 0.60})
    plant(p, "q2", {**clean, ("q2", 10.0): 0.89, ("q2", 2.0): 0.20, ("q2", 4.0): 0.40})
    said = headline(build_view(store)).replace(words.NBSP, " ")
    assert "A guess errs on 90.0 %: this budget leaves no room to differ." in said
    # Half way between 10 and 90 % lies the sweep's 50 %, not its 20 or 87.
    assert said.endswith(
        "At \u03b5 = 4/255, each under its own perturbation, Full errs on 50.0 % (clean 10.0 %)."
        " Shown to err less, and by 5 points or more as measured: Q2 (40.0 %, clean 10.0 %);"
        " more: PP2 (60.0 %, clean 10.0 %)."
    )


def test_where_only_the_baseline_is_as_good_as_a_guess_a_smaller_budget_is_asked_too(
    planter, store
):
    p = planter("full", "q2")
    plant(p, "full", {(None, None): 0.10, ("full", 10.0): 0.86, ("full", 4.0): 0.50})
    plant(p, "q2", {(None, None): 0.10, ("q2", 10.0): 0.83, ("q2", 4.0): 0.40})
    said = headline(build_view(store)).replace(words.NBSP, " ")
    assert "this budget leaves Full no room to err more. At \u03b5 = 4/255" in said
    assert (
        "Shown to err less, and by 5 points or more as measured: Q2 (40.0 %, clean 10.0 %);" in said
    )


def test_who_survives_is_not_denied_the_room_it_has(planter, store):
    p = planter("full", "q2")
    plant(p, "full", {(None, None): 0.10, ("full", 10.0): 0.97, ("full", 4.0): 0.50})
    plant(p, "q2", {(None, None): 0.10, ("q2", 10.0): 0.87, ("q2", 4.0): 0.40})
    said = headline(build_view(store))
    assert said.startswith("Q2 survives better")
    assert "guess" not in said


@pytest.mark.parametrize(("rate", "better"), [(0.45, True), (0.46, False)])
def test_five_points_are_enough_and_less_are_not(planter, store, rate, better):
    p = planter("full", "q2")
    plant(p, "full", {(None, None): 0.10, ("full", 10.0): 0.50})
    plant(p, "q2", {(None, None): 0.10, ("q2", 10.0): rate})
    assert headline(build_view(store)).startswith("Q2 survives better") == better


def test_without_full_pairs_need_as_much(planter, store):
    p = planter("pp2", "q2")
    plant(p, "pp2", {(None, None): 0.10, ("pp2", 10.0): 0.52})
    plant(p, "q2", {(None, None): 0.10, ("q2", 10.0): 0.50})
    assert "no difference of 5 points or more is shown" in headline(build_view(store))
    plant(p, "pp2", {("pp2", 10.0): 0.60})
    said = headline(build_view(store))
    assert "Shown to err less, and by 5 points or more as measured: Q2 less than PP2" in said


def test_one_model_with_room_left_is_compared_at_the_budget_asked_for(planter, store):
    p = planter("full", "q2")
    plant(p, "full", {(None, None): 0.10, ("full", 10.0): 0.88, ("full", 4.0): 0.50})
    plant(p, "q2", {(None, None): 0.10, ("q2", 10.0): 0.60, ("q2", 4.0): 0.40})
    said = headline(build_view(store))
    assert said.startswith("Q2 survives better")
    assert "guess" not in said


def test_a_variant_spared_the_attacks_is_not_called_robust(planter, store):
    p = planter("full", "q2", "q4")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.80, ("q2", 10.0): 0.30})
    plant(p, "q2", {(None, None): 0.05, ("full", 10.0): 0.70, ("q2", 10.0): 0.60})
    plant(p, "q4", {(None, None): 0.05, ("q4", 10.0): 0.20})  # one attack, not two
    view = build_view(store)
    assert [v.name for v in view.set_apart] == ["q4"]
    assert "Q4" not in headline(view)
    assert "take Q4" not in advice_text(store)
    plant(p, "q4", {("full", 10.0): 0.20, ("q2", 10.0): 0.20})  # three: no longer fewer
    plant(p, "full", {("q4", 10.0): 0.10})
    plant(p, "q2", {("q4", 10.0): 0.10})
    assert "Q4" in headline(build_view(store))


def test_no_perturbation_of_its_own_is_said_in_the_headline(planter, store):
    p = planter("full", "q2")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.80})
    plant(p, "q2", {(None, None): 0.05, ("full", 10.0): 0.30})
    assert "Mind that Q2 faced no perturbation crafted on itself" in headline(build_view(store))


def test_pareto_front_by_hand():
    #            cheap/bad   dominated    middle      dear/good   tied, dearer
    points = [(1.0, 0.9), (3.0, 0.95), (2.0, 0.5), (9.0, 0.1), (9.5, 0.1)]
    assert pareto_front(points) == [0, 2, 3]


def test_fleet_mix_of_two_opposite_victims_is_half_and_half(planter, store):
    p = planter("full", "sfp")
    plant(p, "full", {(None, None): 0.0, ("full", 10.0): 0.8, ("sfp", 10.0): 0.2})
    plant(p, "sfp", {(None, None): 0.0, ("full", 10.0): 0.2, ("sfp", 10.0): 0.8})
    mix = fleet_mix(build_view(store))
    assert mix is not None
    assert dict(mix.shares) == pytest.approx({"full": 0.5, "sfp": 0.5})
    assert mix.worst == pytest.approx(0.5)
    assert mix.best_single_worst == pytest.approx(0.8)


def test_deployment_gap_is_paired_and_counts_disagreements(planter, store):
    p = planter("full")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.50})
    torch = p.erring(0.40, "same")
    store.add_prediction_runs([p.run("full", uap("full", 10.0), torch, "torch")])
    [row] = inference.deployment_gaps(build_view(store))
    assert row.gap == pytest.approx(0.10)
    assert row.disagreements == 60
    assert row.p == pytest.approx(2 * 0.5**60)


def test_latency_advice_needs_full_valid_runs(planter, store):
    p = planter("full", "q2", "pp2")
    for name, rate in (("full", 0.8), ("q2", 0.4), ("pp2", 0.9)):
        plant(p, name, {(None, None): 0.05, (name, 10.0): rate})
    for name in ("full", "q2"):
        add_latency(store, name, mode="quick")
    said = advice_text(store)
    assert "No advice on latency: quick: not comparable." in said
    for name in ("full", "q2"):
        add_latency(store, name)
    add_latency(store, "pp2", spread=0.3)
    said = advice_text(store)
    assert "If latency is the limit, take Q2" in said
    assert "Left out, measurement not valid: PP2." in said


def test_compression_that_does_not_speed_up_is_said(planter, store):
    p = planter("full", "q2", "pp2", "pp3")
    for name in ("full", "q2", "pp2", "pp3"):
        plant(p, name, {(None, None): 0.05, (name, 10.0): 0.5})
    add_latency(store, "full")
    assert "shown to be slower" not in advice_text(store)
    slower = 1.5 * synthetic.SIZES["full"][3] / synthetic.SIZES["q2"][3]
    add_latency(store, "q2", factor=slower)
    add_latency(store, "pp2", factor=0.5)
    said = advice_text(store)
    assert re.search(r"against Full \(\S+\sms\): shown to be slower.*: Q2 \(1\.[45]\d times", said)
    assert "PP2 (" not in said.partition("shown to be slower")[2]  # shown to be faster
    as_fast = synthetic.SIZES["full"][3] / synthetic.SIZES["pp3"][3]
    add_latency(store, "pp3", factor=1.02 * as_fast)
    said = advice_text(store)
    assert re.search(r"PP3 \(1\.0\d times", said)
    add_latency(store, "pp3", spread=0.3, factor=1.02 * as_fast)
    said = advice_text(store)
    assert re.search(r"A hint only, not validly measured: PP3 1\.0\d times\.", said)
    assert "shown to be slower" in said  # Q2 still is
    add_latency(store, "full", mode="quick")
    said = advice_text(store)
    assert "times. A hint only: quick: not comparable." in said
    assert "shown to be slower" not in said


def advice_text(store):
    [group] = [g for g in conclusions(build_view(store)) if g.anchor == "advice"]
    return " ".join(s.text for s in group.sentences)


def test_attacked_image_is_clipped_after_rounding():
    image = np.array([[[250, 5, 100]]], dtype=np.uint8)
    delta = np.array([[[10, -10, 2.4]]], dtype=np.float32) / 255
    assert attacked_image(image, delta).tolist() == [[[255, 0, 102]]]


# --- less than everything -------------------------------------------------------------------------


def test_nothing_measured_names_the_command(store, tmp_path):
    with pytest.raises(HarnessError, match=r"run `harness attack-device"):
        write_report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_device_lists_those_there_are(full, tmp_path):
    with pytest.raises(HarnessError, match="choose from local"):
        write_report(full.store, tmp_path, device="rpi4")


CASES = {
    "clean only": ([{(None, None): 0.05}], "Nothing was attacked yet"),
    "one variant": ([{(None, None): 0.05, ("full", 10.0): 0.5}], "Only Full was attacked"),
    "attack without clean": ([{("full", 10.0): 0.5}, {("sfp", 10.0): 0.5}], "No targeted"),
    "no controls": (
        [{(None, None): 0.05, ("full", 10.0): 0.5}, {(None, None): 0.1, ("sfp", 10.0): 0.7}],
        "No controls were measured",
    ),
    "other budget only": (
        [{(None, None): 0.05, ("full", 4.0): 0.5}, {(None, None): 0.1, ("sfp", 4.0): 0.7}],
        "ε\u00a0=\u00a04/255",
    ),
    "controls only": ([{(None, None): 0.05, ("random", 10.0): 0.1}], "No crafted perturbation"),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_parts_are_said_in_a_sentence(case, planter, store, tmp_path):
    plans, sentence = CASES[case]
    p = planter("full", "sfp", examples=b"")
    for name, plan in zip(("full", "sfp"), plans, strict=False):
        plant(p, name, plan)
    html = write_report(store, tmp_path / "out").html.read_text(encoding="utf-8")
    assert sentence in html
    assert "No latency was measured" in html
    assert "PyTorch was not run on the same images" in html


def test_a_model_of_the_users_own_and_a_second_device_are_shown(planter, store, tmp_path):
    p = planter("full", "q2")
    for name, rate in (("full", 0.8), ("q2", 0.4)):
        plant(p, name, {(None, None): 0.05, (name, 10.0): rate})
    mine = synthetic.model("full", sha256=synthetic.sha("model", "mine"), variant="mine",
                           method="other")  # fmt: skip
    store.add_model(mine)
    plant(p, "mine", {(None, None): 0.04, ("full", 10.0): 0.6})
    board = synthetic.Planter(store, p.evaluation, device="rpi4")
    plant(board, "q2", {(None, None): 0.05, ("q2", 10.0): 0.45})
    view = build_view(store)
    assert view.device.name == "local"
    assert [v.name for v in view.variants] == ["full", "q2", "mine"]
    html = write_report(store, tmp_path / "out").html.read_text(encoding="utf-8")
    assert "</span>mine" in html
    assert "Device by device" in html
    assert "45.0\u00a0%" in html
    on_board = build_view(store, device="rpi4")
    assert [v.name for v in on_board.variants] == ["q2"]


def test_targeted_perturbations_are_no_worst_case_but_who_errs_more_under_one_is_named(
    planter, store
):
    p = planter("full", "q2")
    for name, rate, steered in (("full", 0.50, 0.45), ("q2", 0.40, 0.70)):
        plant(p, name, {(None, None): 0.10, (name, 10.0): rate})
        aimed = uap(name, 10.0, target=3)
        p.store.add_uap(aimed)
        p.store.add_prediction_runs([p.run(name, aimed, p.erring(steered, name, "aimed"))])
    view = build_view(store)
    assert [v.worst.uer for v in view.variants] == [pytest.approx(0.50), pytest.approx(0.40)]
    said = bars(view).caption.replace(words.NBSP, " ")
    assert said.endswith("whatever is predicted: Q2 (70.0 %, three).")


def test_who_gives_up_clean_accuracy_is_not_advised_but_named_with_its_price(planter, store):
    p = planter("full", "q2", "q4")  # by file size: Q2, Q4, Full
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.80})
    plant(p, "q2", {(None, None): 0.60, ("q2", 10.0): 0.70})
    plant(p, "q4", {(None, None): 0.05, ("q4", 10.0): 0.75})
    said = advice_text(store).replace(words.NBSP, " ")
    assert "If file size is the limit, take Q4" in said
    assert "right on clean images less often than Full by 5 points or more: Q2 (" in said
    assert "40.0 % right on clean images, 70.0 % wrong at worst)" in said


def test_where_only_the_inaccurate_were_attacked_that_is_said(planter, store):
    p = planter("full", "q2", "q4")
    plant(p, "full", {(None, None): 0.05})
    for name in ("q2", "q4"):
        plant(p, name, {(None, None): 0.60, ("q2", 10.0): 0.70, ("q4", 10.0): 0.70})
    said = advice_text(store)
    assert "No advice on file size. Not considered," in said


def test_always_saying_the_most_frequent_class_is_no_better_than_a_guess(store):
    labels = tuple(0 if i % 10 else 1 for i in range(600))
    evaluation = synthetic.evaluation_set(labels=labels)
    store.add_evaluation_set(evaluation)
    planter = synthetic.Planter(store, evaluation)
    for name in ("full", "q4"):
        store.add_model(synthetic.model(name))
    always, good = np.zeros(600, dtype=np.int64), np.asarray(labels)
    store.add_prediction_runs([planter.run("full", None, good), planter.run("q4", None, always)])
    (reach,) = [g for g in conclusions(build_view(store)) if g.anchor == "reach"]
    said = reach.sentences[0].text.replace(words.NBSP, " ")
    assert said.startswith("Q4 (90.0 %): not shown to classify clean images better")


def test_where_the_others_met_other_perturbations_what_to_do_is_said(planter, store):
    p = planter("full", "q2", "q4")
    plant(p, "full", {(None, None): 0.05, ("full", 10.0): 0.80, ("q2", 10.0): 0.30})
    plant(p, "q2", {(None, None): 0.05, ("q2", 10.0): 0.60})
    plant(p, "q4", {(None, None): 0.05, ("q4", 10.0): 0.20})
    said = headline(build_view(store)).replace(words.NBSP, " ")
    assert said.startswith("Only Full was attacked in full")
    assert "since Q2 and Q4 met other perturbations: `harness run` has all meet the same." in said

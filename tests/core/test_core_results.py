"""Result rows from planted predictions: every value counted by hand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from core_cases import (
    digest,
    evaluation_set,
    latency_process,
    latency_run,
    machine,
    model_record,
    prediction_run,
    uap_record,
)

from harness.metrics import paired_difference, wilson
from harness.records import PAPER_ORDER, ResultRow
from harness.results import as_json, replaced_uaps, result_rows
from harness.store import Store, open_store

LABELS = (0, 1, 2, 3, 0, 1, 2, 3)
CLEAN = (0, 1, 2, 3, 0, 1, 2, 0)  # 7 of 8 right
TORCH_CLEAN = (0, 1, 2, 3, 0, 1, 3, 0)  # 6 of 8 right; agrees with CLEAN on 7
ATTACKED = (3, 1, 3, 3, 0, 2, 2, 0)  # wrong: 0 2 5 7
TORCH_ATTACKED = (3, 1, 3, 3, 3, 2, 2, 3)  # wrong: 0 2 4 5; agrees with ATTACKED on all but 4, 7

DESIGN_FIELDS = """
variant method dataset preset width protocol device emulated runtime machine uap_source
uap_sha256 attack seed eps target n n_of clean_accuracy uer uer_low uer_high uer_corrected
uer_corrected_low uer_corrected_high evasion_on_correct fooling_rate tsr tsr_excl_target
latency_p50_ms latency_p90_ms latency_verdict file_bytes params macs flops bops
peak_rss_bytes torch_agreement uer_gap created_at git_commit
"""


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with open_store(tmp_path / "results.db", git_commit="abc123") as opened:
        opened.add_evaluation_set(evaluation_set(LABELS))
        opened.add_model(model_record())
        opened.add_uap(uap_record("u"))
        opened.add_uap(uap_record("t", target=3, eps=4.0))
        yield opened


def plant(store: Store, *runs: Any) -> list[ResultRow]:
    store.add_prediction_runs(list(runs))
    return result_rows(store)


def test_a_row_has_every_field_that_the_design_names() -> None:
    assert {field.name for field in fields(ResultRow)} >= set(DESIGN_FIELDS.split())


def test_the_row_of_a_clean_run(store: Store) -> None:
    store.add_latency_run(latency_run(latency_process((2_000_000,) * 64)))
    (row,) = plant(store, prediction_run(CLEAN))
    low, high = wilson(7, 8)
    expected = {
        "variant": "full",
        "method": "full",
        "dataset": "digits",
        "preset": "quickstart",
        "width": 8,
        "protocol": None,
        "device": "local",
        "emulated": False,
        "runtime": "onnxruntime",
        "machine": "x86_64",
        "uap_source": None,
        "uap_sha256": None,
        "attack": None,
        "seed": 3,
        "eps": None,
        "target": None,
        "evaluation_sha256": digest("evaluation"),
        "n": 8,
        "n_of": 8,
        "clean_accuracy": 7 / 8,
        "clean_accuracy_low": low,
        "clean_accuracy_high": high,
        "uer": None,
        "uer_low": None,
        "uer_high": None,
        "uer_corrected": None,
        "uer_corrected_low": None,
        "uer_corrected_high": None,
        "evasion_on_correct": None,
        "fooling_rate": None,
        "tsr": None,
        "tsr_low": None,
        "tsr_high": None,
        "tsr_excl_target": None,
        "latency_p50_ms": 2.0,
        "latency_p90_ms": 2.0,
        "latency_verdict": "VALID",
        "latency_mode": "quick",
        "energy_mj": None,
        "instructions": None,
        "file_bytes": 1000,
        "params": 70,
        "macs": 12345,
        "flops": 24690,
        "bops": 7,
        "peak_rss_bytes": 200,
        "torch_agreement": None,
        "uer_gap": None,
        "model_sha256": digest("m"),
        "created_at": store.predictions()[0].created_at,
        "git_commit": "abc123",
    }
    assert as_json(row) == expected
    assert json.loads(json.dumps(as_json(row))) == expected


def test_the_rows_of_an_attack_on_two_runtimes(store: Store) -> None:
    rows = plant(
        store,
        prediction_run(CLEAN),
        prediction_run(ATTACKED, uap="u"),
        prediction_run(TORCH_CLEAN, runtime="torch"),
        prediction_run(TORCH_ATTACKED, uap="u", runtime="torch"),
    )
    clean, attacked, torch_clean, torch_attacked = rows
    assert [(r.runtime, r.uap_source) for r in rows] == [
        ("onnxruntime", None),
        ("onnxruntime", "full"),
        ("torch", None),
        ("torch", "full"),
    ]
    assert (clean.torch_agreement, clean.uer_gap) == (7 / 8, None)
    assert (attacked.uer, attacked.n, attacked.clean_accuracy) == (4 / 8, 8, 7 / 8)
    assert (attacked.uer_low, attacked.uer_high) == wilson(4, 8)
    assert attacked.evasion_on_correct == 3 / 7  # 0 2 5 of the seven that were right
    assert attacked.fooling_rate == 3 / 8  # 7 was wrong before, and the same way
    assert (attacked.torch_agreement, attacked.uer_gap) == (6 / 8, 0.0)
    assert (attacked.eps, attacked.seed, attacked.attack) == (10.0, 11, "sgd")
    assert (attacked.protocol, attacked.uap_sha256) == ("clean", digest("u"))
    assert (attacked.target, attacked.tsr, attacked.tsr_excl_target) == (None, None, None)
    # Each runtime is judged by its own clean predictions.
    assert (torch_clean.clean_accuracy, torch_attacked.clean_accuracy) == (6 / 8, 6 / 8)
    assert torch_attacked.evasion_on_correct == 4 / 6
    assert (torch_attacked.torch_agreement, torch_attacked.uer_gap) == (None, None)
    # The card counts the ONNX file, not the PyTorch model.
    assert (torch_attacked.macs, torch_attacked.flops, torch_attacked.file_bytes) == (None,) * 3


def test_the_deployment_gap_is_signed(store: Store) -> None:
    rows = plant(
        store,
        prediction_run((3,) * 8, uap="u", device="rpi4"),  # 6 wrong of 8
        prediction_run(TORCH_ATTACKED, uap="u", runtime="torch"),  # 4 wrong of 8
    )
    on_device = next(r for r in rows if r.device == "rpi4")
    assert on_device.uer_gap == 2 / 8
    assert on_device.torch_agreement == 5 / 8
    # Without a clean run on that device nothing is borrowed from another.
    assert on_device.clean_accuracy is None
    assert on_device.evasion_on_correct is None
    assert on_device.fooling_rate is None


def test_pytorch_elsewhere_is_no_reference(store: Store) -> None:
    rows = plant(
        store,
        prediction_run(CLEAN),
        prediction_run(TORCH_CLEAN, runtime="torch", device="gpu-box"),
        prediction_run(TORCH_CLEAN, runtime="torch", emulated=True),
    )
    assert [r.torch_agreement for r in rows] == [None, None, None]


def test_a_targeted_row(store: Store) -> None:
    (row,) = plant(store, prediction_run(ATTACKED, uap="t"))
    assert (row.target, row.eps) == (3, 4.0)
    assert row.tsr == 3 / 8  # 0, 2 and 3
    assert (row.tsr_low, row.tsr_high) == wilson(3, 8)
    assert row.tsr_excl_target == 2 / 6  # image 3 is of class 3, as is 7
    assert row.uer == 4 / 8


def test_target_zero_is_a_target(store: Store) -> None:
    store.add_uap(uap_record("t0", target=0))
    (row,) = plant(store, prediction_run(ATTACKED, uap="t0"))
    assert (row.target, row.tsr, row.tsr_excl_target) == (0, 2 / 8, 1 / 6)


def test_an_emulated_row_has_no_latency_even_beside_the_real_board(store: Store) -> None:
    samples = (2_000_000,) * 64
    store.add_latency_run(latency_run(latency_process(samples), device="rpi4", emulated=True))
    (emulated,) = plant(store, prediction_run(CLEAN, device="rpi4", emulated=True))
    unmeasured = ("latency_p50_ms", "latency_p90_ms", "latency_verdict", "latency_mode")
    assert [getattr(emulated, name) for name in (*unmeasured, "peak_rss_bytes")] == [None] * 5
    store.add_latency_run(latency_run(latency_process(samples), device="rpi4"))
    rows = plant(store, prediction_run(CLEAN, device="rpi4"))
    assert {r.emulated: r.latency_p50_ms for r in rows} == {True: None, False: 2.0}


def test_the_last_run_and_the_last_latency_win(store: Store) -> None:
    for ms, threads in ((9, 1), (2, 3)):
        run = latency_run(latency_process((ms * 1_000_000,) * 64))
        store.add_latency_run(replace(run, threads=threads))
    plant(store, prediction_run((0,) * 8))
    (row,) = plant(store, prediction_run(CLEAN))
    assert (row.clean_accuracy, row.latency_p50_ms) == (7 / 8, 2.0)


def test_processes_of_one_latency_measurement_are_summarised_together(store: Store) -> None:
    for ms in (9, 2, 2):
        store.add_latency_run(latency_run(latency_process((ms * 1_000_000,) * 40)))
    (row,) = plant(store, prediction_run(CLEAN))
    assert (row.latency_p50_ms, row.latency_p90_ms) == (2.0, 9.0)
    assert row.latency_verdict == "UNSTABLE"


def test_uaps_that_differ_only_in_their_bytes_are_rows_of_their_own(store: Store) -> None:
    store.add_uap(uap_record("u2", meta={}, own=False))
    rows = plant(store, prediction_run(ATTACKED, uap="u"), prediction_run(CLEAN, uap="u2"))
    assert {r.uap_sha256 for r in rows} == {digest("u"), digest("u2")}


def test_of_those_that_the_workspace_made_under_one_name_the_last_is_its_own(store: Store) -> None:
    store.add_uap(uap_record("u2", meta={}))
    rows = plant(store, prediction_run(ATTACKED, uap="u"), prediction_run(CLEAN, uap="u2"))
    assert {r.uap_sha256 for r in rows} == {digest("u2")}
    assert list(replaced_uaps(store)) == [digest("u")]
    store.add_uap(uap_record("u"))  # made again as it was
    assert list(replaced_uaps(store)) == [digest("u2")]
    assert {r.uap_sha256 for r in result_rows(store)} == {digest("u")}


@pytest.mark.parametrize(
    ("now", "hidden"), [({}, False), ({"checkpoint_sha256": "a"}, False), ({"identity": "b"}, True)]
)
def test_what_was_crafted_on_another_model_than_its_source_is_now_is_not_shown(
    store: Store, now: dict[str, str], hidden: bool
) -> None:
    store.add_uap(uap_record("u", source="q4", meta={"checkpoint_sha256": "a"}))
    store.add_model(model_record("source", "q4", manifest={"metadata": now}))
    rows = plant(store, prediction_run(ATTACKED, uap="u"))
    assert (rows == []) == hidden


def test_a_superseded_model_is_not_reported(store: Store) -> None:
    plant(store, prediction_run(CLEAN))
    store.add_model(model_record("m2"))
    assert result_rows(store) == []
    (row,) = plant(store, prediction_run(CLEAN, model="m2"))
    assert row.model_sha256 == digest("m2")


def test_evaluation_sets_are_kept_apart(store: Store) -> None:
    store.add_evaluation_set(evaluation_set((1, 1), "few"))
    rows = plant(
        store,
        prediction_run(CLEAN),
        prediction_run((1, 0), evaluation_sha256=digest("few")),
    )
    assert {r.evaluation_sha256: (r.n, r.clean_accuracy) for r in rows} == {
        digest("evaluation"): (8, 7 / 8),
        digest("few"): (2, 1 / 2),
    }


def test_rows_follow_the_papers_order(store: Store) -> None:
    names = ("my_model", "q4", "full", "q2", "pp2", "sfp")
    for name in names:
        store.add_model(model_record(name, name))
    rows = plant(store, *(prediction_run(CLEAN, model=name) for name in names))
    assert [r.variant for r in rows] == ["full", "sfp", "pp2", "q2", "q4", "my_model"]


# --- samples ------------------------------------------------------------------------------------


def of(values: tuple[int, ...], indices: tuple[int, ...]) -> dict[str, Any]:
    """The predictions of some images of a complete run."""
    return {"predictions": tuple(values[i] for i in indices), "indices": indices}


def sampled(values: tuple[int, ...], indices: tuple[int, ...], **changes: Any) -> Any:
    return prediction_run(**of(values, indices), **changes)


def test_a_sample_is_compared_on_its_own_images_only(store: Store) -> None:
    seen = (7, 0, 4, 2)
    rows = plant(
        store,
        sampled(CLEAN, seen, device="rpi4"),
        sampled(ATTACKED, seen, device="rpi4", uap="u"),
        prediction_run(TORCH_CLEAN, runtime="torch"),
        prediction_run(TORCH_ATTACKED, uap="u", runtime="torch"),
    )
    clean, attacked = (r for r in rows if r.device == "rpi4")
    assert (clean.n, clean.n_of, clean.clean_accuracy) == (4, 8, 3 / 4)  # wrong: 7
    assert clean.torch_agreement == 1.0  # they differ on 6, which is not seen
    assert (attacked.n, attacked.n_of) == (4, 8)
    assert (attacked.uer, attacked.clean_accuracy) == (3 / 4, 3 / 4)  # wrong: 0 2 7
    assert (attacked.uer_low, attacked.uer_high) == wilson(3, 4)
    assert attacked.evasion_on_correct == 2 / 3
    assert attacked.fooling_rate == 2 / 4
    assert attacked.torch_agreement == 2 / 4  # not on 4, 7
    assert attacked.uer_gap == 0.0  # 4 gained by PyTorch, 7 by the device
    assert attacked.uer_corrected == 4 / 8  # PyTorch on all eight, and no difference
    low, high = paired_difference(1, 1, 4, population=8)
    assert (attacked.uer_corrected_low, attacked.uer_corrected_high) == (
        max(0.0, 0.5 + low),
        min(1.0, 0.5 + high),
    )


def test_parts_of_a_sample_add_up_to_a_complete_row(store: Store) -> None:
    plant(store, prediction_run(TORCH_ATTACKED, uap="u", runtime="torch"))
    for n, part in ((3, (5, 0, 3)), (6, (1, 7, 2)), (8, (4, 6))):
        row = next(
            r for r in plant(store, sampled(ATTACKED, part, uap="u")) if r.runtime != "torch"
        )
        assert (row.n, row.uer_corrected is None) == (n, n == 8)
    whole = plant(store, prediction_run(ATTACKED, uap="u", device="gpu"))
    complete = next(r for r in whole if r.device == "gpu")
    same = {"device": "local", "created_at": row.created_at}
    assert as_json(row) == as_json(complete) | same


def test_what_another_processor_or_runtime_predicted_does_not_mix(store: Store) -> None:
    plant(store, sampled(CLEAN, (0, 1, 2)))
    for change in ({"runtime_version": "1.33.0"}, {"cpu": "another CPU"}, {"arch": "aarch64"}):
        (row,) = plant(store, sampled(CLEAN, (7, 3), machine=machine(**change)))
        assert (row.n, row.clean_accuracy) == (2, 1 / 2)
    (row,) = plant(store, prediction_run(CLEAN))
    assert row.n == row.n_of == 8


def test_pytorch_on_a_part_corrects_nothing(store: Store) -> None:
    rows = plant(
        store,
        sampled(ATTACKED, (0, 1), uap="u", device="rpi4"),
        sampled(TORCH_ATTACKED, (0, 1, 2), uap="u", runtime="torch"),
    )
    on_device = next(r for r in rows if r.device == "rpi4")
    assert (on_device.torch_agreement, on_device.uer_corrected) == (1.0, None)


def test_a_perturbation_of_the_fleet_is_of_the_models_that_the_fleet_is_now(store: Store) -> None:
    store.add_model(model_record("victim", "my_model", manifest={}))
    of = {name: digest(f"checkpoint of {name}") for name in PAPER_ORDER}
    for name, checkpoint in of.items():
        metadata = {"checkpoint_sha256": checkpoint}
        store.add_model(model_record(name, name, manifest={"metadata": metadata}))
    together = hashlib.sha256(" ".join(of.values()).encode()).hexdigest()
    store.add_uap(uap_record("u", source="fleet", meta={"checkpoint_sha256": together}))
    assert replaced_uaps(store) == {}
    sfp = model_record("sfp again", "sfp", manifest={"metadata": {"checkpoint_sha256": "another"}})
    store.add_model(sfp)
    assert replaced_uaps(store) == {digest("u"): "fleet"}

"""x86 beside ARM: planted shifts are counted, tested and flagged on the images both runs saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.records import PredictionRun
from reports.report import write_report
from reports.runtimes import runtime_steps, runtime_table, runtime_text
from reports.selection import build_view
from reports.tables import latex_text, markdown_text
from tests.reports import synthetic
from tests.reports.synthetic import CLASSES, uap

SEEN = tuple(int(i) for i in np.random.default_rng(1).permutation(synthetic.N)[:200])


def board_of(p, store):
    arm = replace(synthetic.MACHINE, arch="aarch64", cpu="Cortex-A72")
    return synthetic.Planter(store, p.evaluation, device="rpi4", emulated=True, machine=arm)


def sample(run: PredictionRun) -> PredictionRun:
    return replace(run, predictions=tuple(run.predictions[i] for i in SEEN), indices=SEEN)


@pytest.fixture
def two_devices(planter, store):
    """Full is the same everywhere; Q2 is wrong on 20 images more of the 200 the board saw."""
    p = planter("full", "q2")
    board = board_of(p, store)
    labels = np.asarray(p.evaluation.labels)
    for name in ("full", "q2"):
        perturbation = uap(name, 10.0)
        clean, attacked = p.erring(0.05, name), p.erring(0.5, name)
        there = attacked.copy()
        if name == "q2":
            right = [i for i in SEEN if attacked[i] == labels[i]][:20]
            there[right] = (there[right] + 1) % CLASSES
        store.add_prediction_runs(
            [
                p.run(name, None, clean),
                p.run(name, perturbation, attacked),
                p.run(name, None, clean, "torch"),
                p.run(name, perturbation, attacked, "torch"),
                sample(board.run(name, None, clean)),
                sample(board.run(name, perturbation, there)),
            ]
        )
    return build_view(store)


def test_a_change_is_counted_on_the_common_images(two_devices):
    steps = {(s.variant, s.to_device): s for s in runtime_steps(two_devices)}
    assert len(steps) == 4
    for (name, to_device), step in steps.items():
        changed = name == "q2" and to_device
        n = len(SEEN) if to_device else synthetic.N
        assert (step.clean.differing, step.clean.n) == (0, n)
        assert (step.attacked.differing, step.attacked.n) == (20 if changed else 0, n)
        # Twenty all one way, one test of four: Holm times four.
        assert step.p == pytest.approx(4 * 2 * 0.5**20 if changed else 1.0)
        gap = step.attacked.wrong_after - step.attacked.wrong_before
        assert gap == pytest.approx(0.1 if changed else 0)


def test_it_is_said_and_shown(two_devices, store, tmp_path):
    table, text = runtime_table(two_devices), runtime_text(two_devices)
    assert [row[0] for row in table.rows] == ["Full", "Full", "Q2", "Q2"]
    assert table.rows[1][1:3] == ("local (x86_64)", "rpi4 (emulated, aarch64)")
    assert [row[-1].startswith("CHANGE") for row in table.rows] == [False, False, False, True]
    assert "Predictions change on another device for Q2." in text
    assert "Full predicts the same" in text
    assert "shown to differ for Q2" in text
    html = write_report(store, tmp_path / "out").html.read_text(encoding="utf-8")
    assert "From PyTorch to this machine" in html
    assert "200 of 600" in html


def test_without_another_device_there_is_no_such_section(full):
    assert "From PyTorch to this machine" not in full.html


def test_a_report_about_the_board_says_that_it_is_a_sample(two_devices, store, tmp_path):
    html = write_report(store, tmp_path / "out", device="rpi4").html.read_text(encoding="utf-8")
    assert "a sample: 200 of 600" in html
    assert "From PyTorch to this machine" in html


def test_markdown_and_latex_have_the_table_too(two_devices):
    markdown, latex = markdown_text(two_devices), latex_text(two_devices)
    table = runtime_table(two_devices)
    assert table is not None
    section = markdown.partition("## PyTorch, here, on other devices")[2]
    assert section.count("\n| ") == 1 + 1 + len(table.rows)
    assert r"\label{tab:runtimes}" in latex
    assert latex.count(r"\toprule") == 3  # the trade-off, a transfer matrix, this

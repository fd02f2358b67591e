"""The page against the paper: where it is written, what it says, and that it stands alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.presets import preset_named
from harness.records import PAPER_ORDER
from harness.results import result_rows
from reports.paper import figures, wording
from reports.paper.checks import Check, Decided, Estimated, state_of
from reports.paper.judging import judge
from reports.paper.page import SECTIONS
from reports.paper.study import AS_PAPER, facts, scale_text, study_of
from reports.paper.values import paper
from reports.portable import portable
from reports.report import write_report
from reports.selection import build_view
from reports.words import NBSP
from tests.reports import paper_store, synthetic
from tests.reports.conftest import Written
from tests.reports.test_report_files import parse


@pytest.fixture(scope="module")
def svhn(tmp_path_factory):
    """A part of SVHN at a small scale, with two budgets."""
    folder = tmp_path_factory.mktemp("svhn")
    from harness.store import open_store

    with open_store(folder / "results.db") as store:
        paper_store.plant_paper(
            store, "svhn", dataset="svhn_partial", eps=(6.0, 10.0), images=500, as_paper=False,
            note="svhn_partial.npz: 9,082 train / 2,001 test images.",
        )  # fmt: skip
        paths = write_report(store, folder / "report")
        yield Written(store, paths, paths.paper.read_text(encoding="utf-8"))


def plain(html):
    return " ".join("".join(parse(html).text).replace(NBSP, " ").split())


def test_the_page_is_well_formed_and_loads_nothing(svhn):
    page = parse(svhn.html)
    assert len(page.ids) == len(set(page.ids))
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert {anchor for anchor, _ in SECTIONS} <= anchors <= set(page.ids)
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert all(r.startswith("#") for r in page.resources)
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert not re.search(r"https?://|@import|url\((?!#)", svhn.html)
    assert "default-src 'none'" in svhn.html
    assert svhn.html.startswith("<!doctype html>")
    assert svhn.html.count("<svg") == svhn.html.count('role="img" aria-label="') == 20
    assert {link for link in page.links if not link.startswith("#")} == {"index.html", "paper.json"}


def test_both_pages_link_to_each_other_and_share_their_style(svhn):
    index = svhn.paths.html.read_text(encoding="utf-8")
    assert "paper.html" in parse(index).links
    sentence = "SVHN (partial: 9,082 train / 2,001 test images): "
    assert sentence in plain(index)
    style = re.compile(r"<style>.*?</style>", re.DOTALL)
    assert style.search(index).group() == style.search(svhn.html).group()


def test_the_scale_is_said_before_any_verdict(svhn):
    text = plain(svhn.html)
    scale = (
        "This run is not at the paper\u2019s scale: data set SVHN (partial: 9,082 train / 2,001"
        " test images) (the paper: SVHN); width 16 (the paper: 64); preset reduced (the paper:"
        " paper); protocol clean (the paper: paper); images evaluated 500 (the paper: 26,032)."
        " Values are not comparable, only directions are"
    )
    assert scale in text
    assert svhn.html.index("This run is not") < svhn.html.index('class="glance"')
    assert "10 epochs over 10,000 images" in text
    for caveat in paper().datasets["svhn"].caveats:
        assert caveat in text
    assert paper().source in text


def test_a_run_like_the_papers_may_be_compared(store):
    paper_store.plant_paper(store, "svhn", images=26_032, names=("full",))
    study = study_of(build_view(store))
    assert [f.name for f in facts(study) if f.differs] == []
    assert "values may be compared" in scale_text(study)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"training": "160 epochs, step"}, "160 epochs, step"),
        ({"training": "5 epochs, step"}, "5 epochs, step"),
        ({"training": "50 epochs, one_cycle"}, "50 epochs, one_cycle"),
        ({"training": ["damaged"]}, "not recorded in the results store"),
        ({}, "not recorded in the results store"),
    ],
)
def test_the_epochs_of_training_are_those_of_fulls_export(store, manifest, said):
    paper_store.plant(store, lambda *_: None, lambda *_: None, names=("full", "q4"), images=20)
    view = build_view(store)
    variants = tuple(
        replace(v, model=replace(v.model, manifest=manifest)) if v.name == "full" else v
        for v in view.variants
    )
    found = facts(study_of(replace(view, variants=variants)))
    (training,) = [f for f in found if f.name == "training of Full"]
    assert training.here == said
    assert training.differs == said.startswith("5")


@pytest.mark.parametrize("key", ["cifar10", "svhn"])
def test_the_papers_schedule_is_that_of_its_preset(key):
    train = preset_named("paper", dataset=key).train
    assert AS_PAPER[key] == f"{train.epochs} epochs, {train.schedule}"


@pytest.mark.parametrize(
    ("epochs", "differs"), [((10, 10), False), ((5, 5), True), ((10, 5), True)]
)
def test_other_passes_of_crafting_are_another_scale(store, epochs, differs):
    paper_store.plant(store, lambda *_: 0.5, lambda *_: None, names=("full", "q4"), images=20)
    view = build_view(store)
    passes = dict(zip(("full", "q4"), epochs, strict=True))
    uaps = {
        sha256: replace(uap, meta={"settings": {"epochs": passes.get(uap.source)}, "images": 20})
        for sha256, uap in view.uaps.items()
    }
    found = facts(study_of(replace(view, uaps=uaps)))
    assert [f.differs for f in found if f.name == "crafting"] == [differs]


def test_a_sample_that_agrees_is_judged_by_pytorch_and_the_page_says_so(store):
    paper_store.plant_paper(store, "cifar10", images=600, names=("full", "q4"))
    current = store.predictions()
    by_torch = [replace(s.run, runtime="torch") for s in current]
    part = tuple(range(0, 600, 3))
    store.add_prediction_runs(by_torch)
    sampled = [
        replace(run, runtime="onnxruntime", indices=part, device="rpi4",
                predictions=tuple(run.predictions[i] for i in part))
        for run in by_torch
    ]  # fmt: skip
    store.add_prediction_runs(sampled)
    study = study_of(build_view(store, device="rpi4"))
    (images,) = [f.here for f in facts(study) if f.name == "images evaluated"]
    assert images == "600 by PyTorch, 200 of them by exported models"
    said = wording.tests_text(study, judge(study))
    assert "given 200 of the images and predicted what PyTorch does, every time" in said
    assert "Exported models" not in wording.tests_text(
        study_of(build_view(store, device="local")), []
    )


def test_every_number_of_the_json_is_the_rows_or_the_papers(svhn):
    data = json.loads(svhn.paths.paper_json.read_text(encoding="utf-8"))
    published = paper().datasets["svhn"]
    rows = {
        (r.variant, r.uap_source, r.eps, r.target): r
        for r in result_rows(svhn.store) if r.runtime == "onnxruntime"
    }  # fmt: skip
    assert len(data["transfer_uer"]) == 600
    measured = 0
    for cell in data["transfer_uer"]:
        row = rows.get((cell["variant"], cell["uap_source"], cell["eps"], None))
        theirs = published.transfer_uer[cell["eps"]][cell["variant"]][cell["uap_source"]]
        assert cell["paper"] == theirs
        rates = (row.uer, row.uer_low, row.uer_high) if row else (None, None, None)
        assert [cell[key] for key in ("here", "here_low", "here_high")] == portable(rates)
        if row:
            measured += 1
            assert cell["difference"] == pytest.approx(row.uer - theirs)
    assert measured == 2 * 100
    for cell in data["tsr"]:
        row = rows[cell["variant"], cell["variant"], 10.0, cell["target"]]
        assert [cell["here"], cell["here_low"]] == portable([row.tsr, row.tsr_low])
    for cell in data["clean_error"]:
        row = rows[cell["variant"], None, None, None]
        assert cell["here"] == pytest.approx(1 - row.clean_accuracy)
        assert cell["here_low"] <= cell["here"] <= cell["here_high"]
    assert len(data["controls_uer"]) == 120
    assert sum(c["here"] is not None for c in data["controls_uer"]) == 40
    assert data["comparable_values"] is False
    assert len(data["claims"]) == 14
    assert data["beside"] is None
    for claim in data["claims"]:
        assert (claim["why_not"] is None) == (claim["verdict"] != "cannot be judged here")
    # Planted with the paper's own rates, but Figure 1's on the diagonal: the order is the same.
    assert [r["eps"] for r in data["rank_correlation"]] == [10.0, 6.0]
    assert all(r["cells"] == 90 and r["spearman"] > 0.99 for r in data["rank_correlation"])


def test_numbers_on_the_page_are_those_of_the_json(svhn):
    data = json.loads(svhn.paths.paper_json.read_text(encoding="utf-8"))
    table = svhn.html[svhn.html.index('<section id="accuracy"') :]
    for name, cell in zip(PAPER_ORDER, data["clean_error"], strict=True):
        label = synthetic.variant_named(name).label
        line = table[table.index(f'class="stick">{label}</th>') :]
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", line[: line.index("</tr>")])
        assert cells[0] == f"{100 * (1 - cell['paper']):.1f}{NBSP}%"
        assert cells[1] == f"{100 * (1 - cell['here']):.1f}{NBSP}%"
    heat = svhn.html[svhn.html.index('<table class="heat">') :]
    heat = heat[: heat.index("</table>")]
    small = re.findall(r"<small>(\d+) / (\d+)</small>", heat)
    at = [c for c in data["transfer_uer"] if c["eps"] == 10.0]
    assert [(int(a), int(b)) for a, b in small] == [
        (round(100 * c["paper"]), round(100 * c["here"])) for c in at
    ]


def test_every_claim_is_quoted_ruled_and_cautioned(svhn):
    data = json.loads(svhn.paths.paper_json.read_text(encoding="utf-8"))
    for claim in data["claims"]:
        article = svhn.html[svhn.html.index(f'<article class="claim" id="{claim["claim"]}"') :]
        said = plain(article[: article.index("</article>") + len("</article>")])
        assert claim["quote"] in said
        assert claim["rule"] in said
        assert "one training seed" in said
        assert said.startswith(claim["verdict"])


def test_the_same_store_gives_the_same_bytes(svhn, tmp_path):
    again = write_report(svhn.store, tmp_path / "again")
    assert again.paper.read_bytes() == svhn.paths.paper.read_bytes()
    assert again.paper_json.read_bytes() == svhn.paths.paper_json.read_bytes()
    assert again.html.read_bytes() == svhn.paths.html.read_bytes()


def test_other_data_sets_have_no_page_and_no_link(full, tmp_path):
    assert full.paths.paper is None
    assert full.paths.paper_json is None
    assert not list(full.paths.html.parent.glob("paper*"))
    assert "paper.html" not in full.html
    for name in ("paper.html", "paper.json"):
        (tmp_path / name).write_text("of another data set")
    write_report(full.store, tmp_path)
    assert not list(tmp_path.glob("paper*"))
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("dataset", "title"),
    [
        ("cifar10", "CIFAR-10"),
        ("CIFAR10", "CIFAR-10"),
        ("cifar10_small", "CIFAR-10"),
        ("svhn", "SVHN"),
        ("svhn_partial", "SVHN (partial)"),
        ("cifar100", None),
        ("my_cifar10", None),
        ("digits", None),
        ("", None),
    ],
)
def test_which_names_are_the_papers_data_sets(store, dataset, title):
    paper_store.plant(store, lambda *_: 0.5, lambda *_: 0.5, names=("full",), dataset=dataset)
    study = study_of(build_view(store))
    assert (study.title if study else None) == title


def test_ten_classes_or_it_is_another_problem(store):
    paper_store.plant(
        store, lambda *_: 0.5, lambda *_: 0.5, names=("full",),
        classes=(*paper_store.CIFAR10_CLASSES, "none of these"),
    )  # fmt: skip
    assert study_of(build_view(store)) is None


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    train=st.integers(1, 99_999),
    test=st.integers(1, 99_999),
)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_names_and_notes_are_never_markup(tmp_path_factory, name, train, test):
    from harness.store import open_store

    evil = f'<script>{name}</script>"&'
    classes = (evil, *paper_store.CIFAR10_CLASSES[1:])
    folder = tmp_path_factory.mktemp("evil")
    with open_store(folder / "results.db") as store:
        paper_store.plant(
            store, lambda *_: 0.5, lambda *_: 0.5, names=("full",), images=20,
            dataset=f"cifar10-{evil}", classes=classes,
            note=f"{evil}: {train:,} train / {test:,} test images.",
        )  # fmt: skip
        paths = write_report(store, folder / "report")
    html = paths.paper.read_text(encoding="utf-8")
    page = parse(html)
    assert "script" not in page.tags
    assert "<script" not in html
    partial = f"(partial: {train:,} train / {test:,} test images)"
    assert (partial in html) == ((train, test) != (50_000, 10_000))


def test_missing_variants_and_attacks_leave_a_page_without_gaps(store, tmp_path):
    paper_store.plant(
        store, lambda v, s, _: 0.4 if v == s == "full" else None, lambda *_: None,
        names=("full", "q4"), images=60,
    )  # fmt: skip
    paths = write_report(store, tmp_path / "report")
    text = plain(paths.paper.read_text(encoding="utf-8"))
    assert "None of the paper\u2019s 14 claims looked at can be judged" in text
    assert "No targeted perturbation was measured at a budget of the paper." in text
    assert "measurements are missing" in text
    data = json.loads(paths.paper_json.read_text(encoding="utf-8"))
    assert data["rank_correlation"] == [{"eps": 10.0, "cells": 0, "spearman": None}]


def test_a_budget_that_the_paper_lacks_is_left_out(store, tmp_path):
    record = synthetic.uap("full", 5.0)
    paper_store.plant(store, lambda *_: None, lambda *_: None, names=("full", "q4"), images=60)
    store.add_uap(record)
    planter = synthetic.Planter(store, build_view(store).evaluation)
    store.add_prediction_runs(
        [planter.run(n, record, planter.erring(0.4, "same")) for n in ("full", "q4")]
    )
    text = plain(write_report(store, tmp_path / "report").paper.read_text(encoding="utf-8"))
    assert "No perturbation was transferred at a budget of the paper." in text


@pytest.mark.parametrize("value", [-1.0, -0.3, 0.0, 0.02, 0.5, 1.0])
def test_colours_of_differences_are_light_enough_for_dark_text(value):
    colour = figures.difference_colour(value)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    assert 0.299 * red + 0.587 * green + 0.114 * blue > 115
    assert (blue > red) == (value < -0.05)


def small(folder, dataset, **changes):
    from click.testing import CliRunner

    from harness.cli.main import cli
    from harness.store import open_store

    assert CliRunner().invoke(cli, ["init", "--workspace", str(folder)]).exit_code == 0
    with open_store(folder / "results.db") as store:
        paper_store.plant_paper(store, dataset, images=200, **changes)
    return folder


def test_a_workspace_on_the_other_data_set_is_judged_beside(tmp_path):
    from click.testing import CliRunner

    from harness.cli.main import cli

    first, other = small(tmp_path / "a", "cifar10"), small(tmp_path / "b", "svhn")
    before = (other / "results.db").read_bytes()
    asked = ["report", "--workspace", str(first), "--beside", str(other)]
    assert CliRunner().invoke(cli, asked).exit_code == 0
    text = plain((first / "report" / "paper.html").read_text(encoding="utf-8"))
    assert "10 can be judged on CIFAR-10 with SVHN beside it" in text
    assert "\u221210.9 vs +6.0 points" in text  # the paper\u2019s two effects of SFP
    assert "these 15 tests are a family of their own" in text
    data = json.loads((first / "report" / "paper.json").read_text(encoding="utf-8"))
    assert data["beside"]["dataset"] == "SVHN"
    assert (other / "results.db").read_bytes() == before
    assert not (other / "report").exists()


def test_a_workspace_that_cannot_be_beside_is_one_line(tmp_path):
    from click.testing import CliRunner

    from harness.cli.main import cli

    first = small(tmp_path / "a", "cifar10")
    same = small(tmp_path / "b", "cifar10")
    (empty := tmp_path / "c").mkdir()
    gone = tmp_path / "gone"
    same_data = "this is cifar10 beside cifar10"
    for other, words in ((same, same_data), (empty, "harness init"), (gone, "harness init")):
        asked = ["report", "--workspace", str(first), "--beside", str(other)]
        outcome = CliRunner().invoke(cli, asked)
        assert outcome.exit_code != 0
        assert words in str(outcome.exception)
        assert not (first / "report").exists()


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_the_command_names_the_files_it_wrote(tmp_path, dataset):
    from click.testing import CliRunner

    from harness.cli.main import cli
    from harness.store import open_store

    invoke = CliRunner().invoke
    assert invoke(cli, ["init", "--workspace", str(tmp_path)]).exit_code == 0
    with open_store(tmp_path / "results.db") as store:
        paper_store.plant(
            store, lambda *_: 0.5, lambda *_: None, names=("full",), images=20, dataset=dataset
        )
    outcome = invoke(cli, ["report", "--json", "--workspace", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads(outcome.stdout)
    paper_files = {"paper", "paper_json"} if dataset == "cifar10" else set()
    assert {name for name in written if name.startswith("paper")} == paper_files
    assert {str(path) for path in (tmp_path / "report").iterdir()} == set(written.values())


@pytest.mark.parametrize(
    ("expects", "low", "high", "p", "said"),
    [
        ("lower", -0.12, -0.08, 0.001, "shown"),
        ("lower", 0.08, 0.12, 0.001, "the other way"),
        ("lower", -0.04, 0.03, 1.0, "less than 5 points"),
        ("lower", -0.08, 0.03, 1.0, "open"),
        ("same", -0.12, -0.08, 0.001, "refuted"),
    ],
)
def test_what_came_of_a_comparison_is_said_in_words(expects, low, high, p, said):
    check = Check("", (), (), expects)
    found = Estimated(0.5, 0.5, (low + high) / 2, low, high, p, 100)
    assert wording._state(Decided(check, found, state_of(check, found))) == said


def test_each_part_of_a_claim_has_its_own_verdict(store):
    paper_store.plant_paper(store, "cifar10", images=1_000)
    study = study_of(build_view(store))
    claims = {claim.anchor: claim for claim in wording.claim_texts(study, judge(study))}
    masking, victim = claims["q-masking"].parts, claims["sfp-victim"].parts
    assert [part.words.rpartition(": ")[2] for part in masking] == ["shown", "shown"]
    assert ": " not in victim[0].words

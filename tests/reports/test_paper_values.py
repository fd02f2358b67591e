"""The carried numbers: complete, possible, and those of the paper's own text."""

from __future__ import annotations

import pytest

from harness.records import CONTROLS, PAPER_ORDER, VARIANTS
from reports.paper.claims import CLAIMS
from reports.paper.study import Study
from reports.paper.values import Published, paper
from reports.selection import build_view

EPS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
DATASETS = pytest.mark.parametrize("key", ["cifar10", "svhn"])


def rates(p: Published) -> dict[str, float]:
    found = {f"clean {n}": v for n, v in p.clean_accuracy.items()}
    found |= {f"own {e} {n}": v for e, row in p.white_box_uer.items() for n, v in row.items()}
    found |= {
        f"{e} {v} {s}": uer
        for e, matrix in p.transfer_uer.items()
        for v, row in matrix.items()
        for s, uer in row.items()
    }
    found |= {
        f"tsr {e} {n} {t}": v
        for e, by_variant in p.tsr.items()
        for n, row in by_variant.items()
        for t, v in enumerate(row)
    }
    return found | {
        f"{c} {e} {n}": v
        for c, by_eps in p.controls.items()
        for e, row in by_eps.items()
        for n, v in row.items()
    }


@DATASETS
def test_every_rate_is_a_whole_number_of_the_test_images(key):
    published = paper().datasets[key]
    found = rates(published)
    assert len(found) == 10 + 60 + 600 + 3 * 100 + 2 * 60
    for name, rate in found.items():
        images = rate * published.test_images
        assert 0 <= rate <= 1, name
        assert abs(images - round(images)) < 0.02, name  # six decimals of 26,032


@DATASETS
def test_everything_is_there_under_our_names(key):
    published = paper().datasets[key]
    assert tuple(published.white_box_uer) == tuple(published.transfer_uer) == EPS
    assert tuple(published.clean_accuracy) == PAPER_ORDER
    assert all(tuple(matrix) == PAPER_ORDER for matrix in published.transfer_uer.values())
    assert set(published.controls) == set(CONTROLS)
    assert 10.0 in published.tsr
    assert {v.name for v in VARIANTS} == set(PAPER_ORDER)


def test_the_papers_printed_table_by_hand():
    printed = {
        "cifar10": (94.02, 79.51, 86.09, 83.54, 91.65, 93.52, 94.09, 90.47, 92.57, 92.20),
        # Full is printed as 97.26; the file behind it says 94.26, a caveat that the page carries.
        "svhn": (94.26, 96.81, 96.82, 97.11, 93.67, 93.61, 94.14, 95.46, 95.31, 94.99),
    }
    for key, expected in printed.items():
        found = [100 * v for v in paper().datasets[key].clean_accuracy.values()]
        assert found == pytest.approx(expected, abs=0.011), key
    assert any("97.26" in text for text in paper().datasets["svhn"].caveats)
    assert not any("97.26" in text for text in paper().datasets["cifar10"].caveats)


def test_the_papers_sentences_are_true_of_its_numbers():
    """What the text says in figures: 54-63 % and 67 % for Q, 55 % mean TSR, 7 of 10 classes."""
    cifar10, svhn = (paper().datasets[key] for key in ("cifar10", "svhn"))
    at = cifar10.transfer_uer[10.0]
    assert [round(100 * at[q][q]) for q in ("q2", "q3", "q4")] == [63, 54, 57]
    assert min(at[q][s] for q in ("q2", "q3", "q4") for s in ("full", "pp2", "pp3")) > 0.66
    tsr = cifar10.tsr[10.0]
    assert sum(tsr["full"]) / 10 == pytest.approx(0.55, abs=0.02)
    assert [t for t in range(10) if tsr["sfp"][t] > tsr["full"][t]] == [3, 5, 8]
    for name in ("sfp_mixup", "sfp_cutout"):
        assert all(a < b for a, b in zip(tsr[name], tsr["full"], strict=True))
    full = svhn.tsr[10.0]["full"]
    assert full[1] == pytest.approx(0.43, abs=0.005)
    assert all(0.55 <= rate < 0.675 for t, rate in enumerate(full) if t != 1)


def test_the_caveats_that_numbers_show():
    cifar10 = paper().datasets["cifar10"]
    beaten = {
        name
        for name in PAPER_ORDER
        if all(
            cifar10.controls["chessboard"][e][name] > cifar10.white_box_uer[e][name] for e in EPS
        )
    }
    assert beaten == {"full", "pp3", "pp4", "q3", "q4"}
    gaps = {
        (e, name): abs(cifar10.white_box_uer[e][name] - cifar10.transfer_uer[e][name][name])
        for e in EPS
        for name in PAPER_ORDER
    }
    assert max(gaps, key=lambda key: gaps[key]) == (6.0, "pp3")
    assert max(gaps.values()) == pytest.approx(0.16, abs=0.005)


def test_which_claims_the_papers_own_numbers_support(planter, store):
    """By the page's rules without intervals.

    Two of them are not borne out on SVHN, and one between the data sets: Q3 and Q4 err no more on
    CIFAR-10 than on SVHN.
    """
    p = planter("full")
    store.add_prediction_runs([p.run("full", None, p.erring(0.1, "clean"))])
    view = build_view(store)
    unsupported = set()
    for key, published in paper().datasets.items():
        study = Study(view, paper(), published, "", 10.0, elsewhere=True)
        for claim in CLAIMS:
            for demand in claim.demands(study) if key in claim.datasets else []:
                yes = sum(check.supported for check in demand.checks)
                met = yes == len(demand.checks) if demand.need == "all" else 2 * yes > 10
                if not met:
                    unsupported.add((key, claim.anchor))
    assert unsupported == {
        ("svhn", "sfp-source"),
        ("svhn", "pp-same"),
        *((key, "datasets-uer") for key in paper().datasets),
    }

"""One full report for the whole session: its figures are what takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.store import Store, open_store
from reports.report import ReportPaths, write_report
from tests.reports import synthetic


@dataclass(frozen=True)
class Written:
    store: Store
    paths: ReportPaths
    html: str


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    folder = tmp_path_factory.mktemp("report")
    with synthetic.full_store(folder / "results.db") as store:
        paths = write_report(store, folder / "report")
        yield Written(store, paths, paths.html.read_text(encoding="utf-8"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "results.db") as opened:
        yield opened


@pytest.fixture
def planter(store: Store) -> Callable[..., synthetic.Planter]:
    """A store with models and perturbations registered, nothing measured yet."""

    def make(*names: str, **changes: object) -> synthetic.Planter:
        evaluation = synthetic.evaluation_set(**changes)
        synthetic.register(store, evaluation, names)
        return synthetic.Planter(store, evaluation)

    return make

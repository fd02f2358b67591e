"""The results store: what goes in comes out, all of it or nothing."""

from __future__ import annotations

import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_cases import (
    digest,
    evaluation_set,
    latency_process,
    latency_run,
    model_record,
    prediction_run,
    uap_record,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.records import HarnessError
from harness.store import Store, open_store
from harness.store_schema import SCHEMA_VERSION

LABELS = (0, 1, 2, 3)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with open_store(tmp_path / "results.db", git_commit="abc123") as opened:
        opened.add_evaluation_set(evaluation_set(LABELS))
        opened.add_model(model_record())
        opened.add_uap(uap_record())
        yield opened


def test_every_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    evaluation, model = evaluation_set(LABELS), model_record()
    uaps = [uap_record("u"), uap_record("t", target=2, eps=2.5), uap_record("s", seed=12)]
    runs = [
        prediction_run(LABELS),
        prediction_run((3, 2, 1, 0), uap="u", device="rpi4", emulated=True, runtime="torch"),
    ]
    latency = latency_run(
        latency_process((1, 2, 3)),
        latency_process((4,), rss_load_bytes=None, rss_peak_bytes=None, telemetry=()),
    )
    with open_store(path, git_commit="abc123") as store:
        store.add_evaluation_set(evaluation)
        store.add_model(model)
        for uap in uaps:
            store.add_uap(uap)
        store.add_prediction_runs(runs)
        store.add_latency_run(latency)
    with open_store(path, create=False) as store:
        assert store.evaluation_sets() == {evaluation.sha256: evaluation}
        assert store.models() == {model.sha256: model}
        assert store.uaps() == {uap.sha256: uap for uap in uaps}
        predictions, latencies = store.predictions(), store.latencies()
    assert [stored.run for stored in predictions] == runs
    assert [stored.run for stored in latencies] == [latency]
    assert {stored.git_commit for stored in (*predictions, *latencies)} == {"abc123"}
    assert all(stored.created_at.endswith("+00:00") for stored in (*predictions, *latencies))


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 2**16 - 1), max_size=50), st.floats(0, 1e9))
def test_predictions_round_trip(store: Store, classes: list[int], seconds: float) -> None:
    run = prediction_run(tuple(classes), seconds=seconds)
    store.add_prediction_runs([run])
    assert store.predictions()[-1].run == run


@pytest.mark.parametrize("impossible", [-1, 2**16])
def test_a_class_that_cannot_be_stored_is_refused(store: Store, impossible: int) -> None:
    with pytest.raises(OverflowError):
        store.add_prediction_runs([prediction_run((0, impossible))])
    assert store.predictions() == []


def test_a_failing_run_leaves_nothing_of_its_batch(store: Store) -> None:
    good, unknown_model = prediction_run(LABELS), prediction_run(LABELS, model="nobody")
    with pytest.raises(sqlite3.IntegrityError):
        store.add_prediction_runs([good, good, unknown_model])
    assert store.predictions() == []
    store.add_prediction_runs([good])
    assert [stored.run for stored in store.predictions()] == [good]


@pytest.mark.parametrize(
    "orphan",
    [
        prediction_run(LABELS, model="nobody"),
        prediction_run(LABELS, uap="nobody"),
        prediction_run(LABELS, evaluation_sha256=digest("nowhere")),
    ],
    ids=["model", "uap", "evaluation set"],
)
def test_a_run_of_something_unregistered_is_refused(store: Store, orphan: Any) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.add_prediction_runs([orphan])


def test_only_the_last_registered_model_of_a_variant_is_current(store: Store) -> None:
    first, other, second = model_record(), model_record("q", "q4"), model_record("m2", seed=4)
    store.add_model(other)
    store.add_model(second)
    assert store.models() == {r.sha256: r for r in (other, second)}
    assert store.models(current_only=False) == {r.sha256: r for r in (first, other, second)}


def test_registering_an_old_model_again_makes_it_current_and_keeps_its_runs(store: Store) -> None:
    store.add_prediction_runs([prediction_run(LABELS)])
    store.add_model(model_record("m2"))
    assert list(store.models()) == [digest("m2")]
    store.add_model(model_record())
    assert list(store.models()) == [digest("m")]
    assert len(store.predictions()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "q4"},
        {"attack": "sga"},
        {"protocol": "paper"},
        {"dataset": "svhn"},
        {"seed": 12},
        {"eps": 10.5},
        {"target": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_uap_of_another_name_replaces_nothing(store: Store, changes: dict[str, Any]) -> None:
    store.add_uap(uap_record("other", **changes))
    assert set(store.uaps()) == {digest("u"), digest("other")}


def test_uaps_come_newest_last_and_brought_ones_first(store: Store) -> None:
    store.add_uap(uap_record("u2", meta={"epochs": 4}))
    assert list(store.uaps()) == [digest("u"), digest("u2")]
    store.add_uap(uap_record())
    assert list(store.uaps()) == [digest("u2"), digest("u")]
    store.add_uap(replace(uap_record("brought"), own=False))
    assert list(store.uaps()) == [digest("brought"), digest("u2"), digest("u")]


def test_an_evaluation_set_registered_again_becomes_the_current_one(store: Store) -> None:
    first = next(iter(store.evaluation_sets()))
    store.add_evaluation_set(evaluation_set((0, 1), "other"))
    assert list(store.evaluation_sets()) == [first, digest("other")]
    store.add_evaluation_set(evaluation_set(LABELS))
    assert list(store.evaluation_sets()) == [digest("other"), first]


def test_the_runs_of_one_model_on_one_evaluation_set(store: Store) -> None:
    store.add_model(model_record("q", "q4"))
    store.add_evaluation_set(evaluation_set((0, 1), "other"))
    mine = [prediction_run(LABELS), prediction_run(LABELS, uap="u", device="rpi4")]
    others = [
        prediction_run(LABELS, model="q"),
        prediction_run((0, 1), evaluation_sha256=digest("other")),
    ]
    store.add_prediction_runs([mine[0], *others, mine[1]])
    found = store.predictions_of(model_sha256=digest("m"), evaluation_sha256=digest("evaluation"))
    assert [stored.run for stored in found] == mine


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 9), max_size=30))
def test_the_positions_of_a_sample_round_trip(store: Store, sample: dict[int, int]) -> None:
    run = prediction_run(tuple(sample.values()), indices=tuple(sample))
    store.add_prediction_runs([run])
    assert store.predictions()[-1].run == run


def test_a_sample_without_a_prediction_for_each_position_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="one prediction for each"):
        store.add_prediction_runs([prediction_run((0, 1), indices=(4,))])
    assert store.predictions() == []


# --- older stores ---------------------------------------------------------------------------------


def as_schema_1(path: Path) -> None:
    """Turn a store without samples into what the first schema had written."""
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE prediction_run DROP COLUMN indices")
    connection.execute("DROP TABLE instruction_count")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()


def test_a_store_of_the_first_schema_is_brought_along_whole(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "results.db"
    runs = [prediction_run(LABELS), prediction_run((3, 2, 1, 0), uap="u", runtime="torch")]
    store.add_prediction_runs(runs)
    store.add_latency_run(latency_run(latency_process((1, 2, 3))))
    before = (store.predictions(), store.latencies(), store.models(), store.uaps())
    store.close()
    as_schema_1(path)
    for _ in range(2):  # once by the migration, once as it is now
        with open_store(path, create=False) as migrated:
            assert before == (
                migrated.predictions(),
                migrated.latencies(),
                migrated.models(),
                migrated.uaps(),
            )
            migrated_version = migrated._db.execute("PRAGMA user_version").fetchone()[0]
        assert migrated_version == SCHEMA_VERSION
    with open_store(path) as migrated:
        sample = prediction_run((1,), indices=(2,))
        migrated.add_prediction_runs([sample])
        assert [stored.run for stored in migrated.predictions()] == [*runs, sample]


def test_two_that_open_an_old_store_at_once_migrate_it_once(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    open_store(path).close()
    as_schema_1(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_store(path).close(), range(8)))
    with open_store(path) as store:
        assert store.predictions() == []


def test_many_that_open_a_new_store_at_once_make_it_once(tmp_path: Path) -> None:
    """As the models of a first `attack-device` do, which are evaluated side by side."""
    together = threading.Barrier(8)

    def open_and_close(path: Path) -> None:
        together.wait()
        open_store(path).close()

    with ThreadPoolExecutor(8) as pool:
        for n in range(20):
            list(pool.map(open_and_close, [tmp_path / f"{n}.db"] * 8))
    assert len(list(tmp_path.glob("*.db"))) == 20


def test_a_reader_sees_whole_runs_while_a_writer_writes(tmp_path: Path, store: Store) -> None:
    with open_store(tmp_path / "results.db", create=False) as reader:
        with store._transaction() as db:
            db.execute("DELETE FROM uap")
            assert list(reader.uaps()) == [digest("u")]  # neither blocked nor half-written
        assert reader.uaps() == {}
        store.add_prediction_runs([prediction_run(LABELS), prediction_run(LABELS)])
        assert len(reader.predictions()) == 2


# --- files that are not ours --------------------------------------------------------------------


def refused(path: Path, **arguments: Any) -> str:
    with pytest.raises(HarnessError) as caught:
        open_store(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_missing_store_says_how_to_get_one(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    assert "harness run" in refused(path, create=False)
    assert not path.exists()


def test_a_newer_store_is_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    open_store(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    assert f"newer harness (schema {SCHEMA_VERSION + 1})" in refused(path)


@pytest.mark.parametrize(
    "content", [b"not a database\n" * 100, b"SQLite format 3\x00" + b"\xff" * 500]
)
def test_another_kind_of_file_is_refused_unchanged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.db"
    path.write_bytes(content)
    assert "move it away" in refused(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text TEXT)")
    connection.close()
    before = path.read_bytes()
    assert "another program's database" in refused(path)
    assert path.read_bytes() == before


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "unable to open" in refused(tmp_path)


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    path.touch()
    with open_store(path) as store:
        assert store.models() == {}


def test_the_newest_instruction_count_of_a_model_on_a_device(store: Store) -> None:
    assert store.instruction_counts() == {}
    for version, instructions in (("1.31", 7), ("1.32", 8), ("1.32", 9)):
        store.add_instruction_count(
            digest("m"), device="rpi4", runtime_version=version, instructions=instructions
        )
    assert store.instruction_counts() == {
        (digest("m"), "rpi4", "1.31"): 7,
        (digest("m"), "rpi4", "1.32"): 9,
    }


def test_a_full_disk_is_told_as_one_and_the_store_stays_as_it_was(
    tmp_path: Path, store: Store
) -> None:
    before = store.predictions()
    store._db.execute("PRAGMA max_page_count = 1")  # no more than there are: SQLite's own error
    with pytest.raises(HarnessError, match=r"no space left where .*results\.db is: free some"):
        store.add_prediction_runs([prediction_run(LABELS)] * 5000)
    with open_store(tmp_path / "results.db") as again:
        assert again.predictions() == before


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (sqlite3.SQLITE_FULL, "no space left where"),
        (sqlite3.SQLITE_IOERR | 4 << 8, "free some and run again"),  # SQLITE_IOERR_FSYNC
        (sqlite3.SQLITE_BUSY, "wait for it"),
        (sqlite3.SQLITE_READONLY, "permissions"),
    ],
)
def test_a_store_that_cannot_be_opened_now_is_not_to_be_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    error = sqlite3.OperationalError("as SQLite calls it")
    error.sqlite_errorcode = code

    def connect(*_arguments: object, **_options: object) -> sqlite3.Connection:
        raise error

    monkeypatch.setattr(sqlite3, "connect", connect)
    said = refused(tmp_path / "results.db")
    assert told in said
    assert "away" not in said


def test_a_store_in_a_folder_that_may_not_be_written_is_read_as_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.db"
    with open_store(path) as store:
        store.add_evaluation_set(evaluation_set(LABELS))
        kept = store.evaluation_sets()
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with open_store(path) as store:
        assert store.evaluation_sets() == kept
        with pytest.raises(HarnessError, match="cannot write"):
            store.add_model(model_record())
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "results.db-wal").write_bytes(b"rows that were not moved yet")
    with pytest.raises(HarnessError, match="left while it was written"):
        open_store(path)


def test_a_store_that_is_damaged_within_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with open_store(path) as store:
        for i in range(200):
            store.add_uap(replace(uap_record(f"{i}"), meta={"note": "x" * 4000}))
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(255 for _ in range(third))
    path.write_bytes(content)
    said = r"results\.db is damaged .*put a copy of it back"
    with pytest.raises(HarnessError, match=said), open_store(path, create=False) as store:
        store.uaps()

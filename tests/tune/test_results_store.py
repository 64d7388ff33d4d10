"""The results store: what was written is read, what is damaged is set aside and named."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerzero_runtime.errors import ResultsError
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import SCHEMA, SCHEMA_KEY, encode, to_table
from layerzero_tune.results.store import ResultsStore
from tests.tune.measurements import make_contest, rows_of


class TestAppendAndRead:
    def test_reads_what_was_written(self, store: ResultsStore) -> None:
        results = store.read()
        assert results.rows == rows_of(*range(5))
        assert results.quarantined == ()

    def test_keeps_rows_without_times_and_odd_values(self, tmp_path: Path) -> None:
        rows = make_contest(
            1,
            rounds=0,
            status="wrong",
            message="relative error is inf\nüber",
            relative_error=float("inf"),
            tolerance=None,
            screen_ns=None,
            configuration={"stages": 3, "name": "é", "nested": {"a": [1, 2.5, None, True]}},
        )
        store = ResultsStore(tmp_path)
        store.append(rows)
        assert store.read().rows == tuple(rows)

    def test_files_are_named_by_contest_and_written_aside(self, store: ResultsStore) -> None:
        assert {path.name for path in store.directory.iterdir()} == {
            f"contest-{make_contest(number)[0].contest_id}.parquet" for number in range(5)
        }

    def test_appending_a_contest_again_changes_nothing(self, store: ResultsStore) -> None:
        path = store.append(make_contest(0))
        before = path.stat().st_mtime_ns, path.read_bytes()
        assert store.append(make_contest(0, message="another time")) == path
        assert (path.stat().st_mtime_ns, path.read_bytes()) == before
        assert store.read().rows == rows_of(*range(5))

    def test_order_of_the_rows_given_does_not_matter(self, store: ResultsStore, tmp_path: Path) -> None:
        other = ResultsStore(tmp_path / "other")
        assert other.append(make_contest(0)[::-1]).read_bytes() == store.append(make_contest(0)).read_bytes()

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            ([], "rows of 0"),
            ([*make_contest(0), *make_contest(1)], "rows of 2"),
            (make_contest(0) * 2, "occurs twice"),
            (make_contest(0, contest_id="../evil"), "must consist of"),
        ],
    )
    def test_refuses_rows_that_are_no_contest(self, tmp_path: Path, rows: list[Measurement], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            ResultsStore(tmp_path).append(rows)

    def test_two_measurements_of_one_contest_are_never_mixed(self, tmp_path: Path) -> None:
        early = make_contest(1, measured_at="2026-01-01T00:00:00+00:00")
        late = make_contest(1, measured_at="2026-01-02T00:00:00+00:00", screen_ns=1.0)
        for name, rows in (("contest-a", late), ("contest-b", early), ("contest-c", late)):
            (tmp_path / f"{name}.parquet").write_bytes(encode(rows))
        assert ResultsStore(tmp_path).read().rows == tuple(early)

    def test_contest_ids(self, store: ResultsStore, tmp_path: Path) -> None:
        expected = {make_contest(number)[0].contest_id for number in range(5)}
        assert store.contest_ids() == expected
        store.compact()
        store.append(make_contest(5))
        assert store.contest_ids() == expected | {make_contest(5)[0].contest_id}
        assert ResultsStore(tmp_path / "nothing yet").contest_ids() == frozenset()

    def test_empty_directory_has_no_rows(self, tmp_path: Path) -> None:
        assert ResultsStore(tmp_path).read().rows == ()

    def test_missing_directory_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ResultsError, match=r"no results at .*/missing.*layerzero-tune run"):
            ResultsStore(tmp_path / "missing").read()

    def test_file_in_place_of_the_directory(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        with pytest.raises(ResultsError, match="is a file"):
            ResultsStore(path).read()
        with pytest.raises(ResultsError, match=r"cannot write results to .*/file.*--out"):
            ResultsStore(path).append(make_contest(0))
        with pytest.raises(ResultsError, match="cannot write results"):
            ResultsStore(path / "below").append(make_contest(0))

    def test_directory_that_cannot_be_written(self) -> None:
        with pytest.raises(ResultsError, match="cannot write results to /proc/layerzero"):
            ResultsStore("/proc/layerzero").append(make_contest(0))

    def test_failed_write_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # The name that the rename aims at is taken by a directory, so the rename fails after the write.
        store = ResultsStore(tmp_path)
        (tmp_path / f"contest-{make_contest(0)[0].contest_id}.parquet").mkdir()
        monkeypatch.setattr(Path, "exists", lambda path: path == tmp_path)
        with pytest.raises(ResultsError, match="cannot write"):
            store.append(make_contest(0))
        assert [path for path in tmp_path.iterdir() if path.is_file()] == []


class TestDamage:
    @pytest.fixture
    def damaged(self, store: ResultsStore) -> Path:
        return store.directory / f"contest-{make_contest(2)[0].contest_id}.parquet"

    @pytest.mark.parametrize("kept", [0, 3, 100, -1, -5])
    @pytest.mark.scenario("FS-019")
    def test_truncated_file_is_set_aside_and_named(
        self, store: ResultsStore, damaged: Path, kept: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        content = damaged.read_bytes()[:kept]
        damaged.write_bytes(content)
        results = store.read()
        target = store.directory / "quarantine" / damaged.name
        assert results.rows == rows_of(0, 1, 3, 4)
        assert results.quarantined == (target,)
        assert target.read_bytes() == content
        assert not damaged.exists()
        assert str(damaged) in caplog.text
        assert str(target) in caplog.text
        assert store.read() == replace(results, quarantined=())

    def test_contest_can_be_measured_again_and_fail_again(self, store: ResultsStore, damaged: Path) -> None:
        for _ in range(3):
            damaged.write_bytes(b"PAR1 nonsense PAR1")
            assert store.read().rows == rows_of(0, 1, 3, 4)
            store.append(make_contest(2))
        assert store.read().rows == rows_of(*range(5))
        assert len(list((store.directory / "quarantine").iterdir())) == 3

    def test_damage_is_skipped_where_it_cannot_be_moved(
        self, store: ResultsStore, damaged: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        damaged.write_bytes(b"")
        (store.directory / "quarantine").touch()
        results = store.read()
        assert results.rows == rows_of(0, 1, 3, 4)
        assert results.quarantined == (damaged,)
        assert "could not be moved" in caplog.text

    @pytest.mark.parametrize(
        "change",
        [
            lambda table: table.drop_columns(["job_id"]),
            lambda table: table.replace_schema_metadata({}),
            lambda table: table.replace_schema_metadata({SCHEMA_KEY: b"0"}),
            lambda table: table.replace_schema_metadata({SCHEMA_KEY: b"one"}),
            lambda table: table.cast(SCHEMA.set(1, pa.field("job_id", pa.large_string(), nullable=False))),
        ],
    )
    def test_other_schema_is_damage(self, store: ResultsStore, damaged: Path, change: object) -> None:
        assert callable(change)
        pq.write_table(change(to_table(make_contest(2))), damaged)
        assert store.read().quarantined == (store.directory / "quarantine" / damaged.name,)

    @pytest.mark.parametrize(
        ("column", "text"),
        [
            ("context", "{}"),
            ("context", '{"operation":"norm.rms","dtype":"bfloat16","rows":0}'),
            ("context", '{"operation":"norm.rms","dtype":"bfloat16","unheard_of":1}'),
            ("context", "[]"),
            ("device", "{"),
            ("policy", "7"),
            ("status", "splendid"),
        ],
    )
    def test_value_that_is_not_allowed_is_damage(
        self, store: ResultsStore, damaged: Path, column: str, text: str
    ) -> None:
        table = to_table(make_contest(2))
        words = pa.array([text] * len(table)).dictionary_encode()
        index = table.schema.get_field_index(column)
        pq.write_table(table.set_column(index, table.schema.field(index), words), damaged)
        assert store.read().rows == rows_of(0, 1, 3, 4)

    @pytest.mark.parametrize("version", [b"1", b"2"])
    def test_results_of_the_schemas_before_are_read(self, store: ResultsStore, damaged: Path, version: bytes) -> None:
        before = to_table(make_contest(2)).drop_columns(["gpu"]).replace_schema_metadata({SCHEMA_KEY: version})
        pq.write_table(before, damaged)
        assert store.read().rows == rows_of(0, 1, 2, 3, 4)

    def test_newer_schema_is_named_and_left_alone(self, store: ResultsStore, damaged: Path) -> None:
        newer = to_table(make_contest(2)).replace_schema_metadata({SCHEMA_KEY: b"4"})
        pq.write_table(newer.append_column("humidity", pa.array([0.5] * len(newer))), damaged)
        before = damaged.read_bytes()
        for use in (store.read, store.compact):
            with pytest.raises(ResultsError, match=f"{damaged.name}.*schema version 4"):
                use()
        assert damaged.read_bytes() == before
        assert len(list(store.directory.glob("*.parquet"))) == 5

    def test_compaction_keeps_clear_of_damage(self, store: ResultsStore, damaged: Path) -> None:
        damaged.write_bytes(b"")
        store.compact()
        assert store.read().rows == rows_of(0, 1, 3, 4)
        assert (store.directory / "quarantine" / damaged.name).exists()

    def test_compaction_deletes_no_damage_that_could_not_be_moved(self, store: ResultsStore, damaged: Path) -> None:
        damaged.write_bytes(b"")
        (store.directory / "quarantine").touch()
        store.compact()
        assert damaged.exists()

    def test_damaged_part_does_not_hide_other_contests(self, store: ResultsStore) -> None:
        (part,) = store.compact()
        part.write_bytes(part.read_bytes()[:-1])
        store.append(make_contest(7))
        assert store.contest_ids() == {make_contest(7)[0].contest_id}
        assert part.exists()


class TestFileHandles:
    @pytest.mark.scenario("FS-025")
    def test_no_file_stays_open(self, store: ResultsStore) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            store.read()
            store.contest_ids()
            store.append(make_contest(0))
        store.compact()
        assert len(os.listdir("/proc/self/fd")) == before

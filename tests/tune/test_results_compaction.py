"""Compaction and concurrency: nothing lost and nothing torn, whoever writes, merges or is killed."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerzero_tune.results import store as store_module
from layerzero_tune.results.folder import ResultsFolder
from layerzero_tune.results.schema import Decoder, encode
from layerzero_tune.results.store import ResultsStore, results_hash
from tests.tune.measurements import make_contest, rows_of

REPOSITORY = Path(__file__).parents[2]
WRITER = """
import sys
from layerzero_tune.results.store import ResultsStore
from tests.tune.measurements import make_contest
store = ResultsStore(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    store.append(make_contest(number))
    print(number, flush=True)
"""
COMPACTOR = """
import sys
from layerzero_tune.results.store import ResultsStore
store = ResultsStore(sys.argv[1])
print("ready", flush=True)
while True:
    store.compact()
"""


def run_python(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


def files(store: ResultsStore, pattern: str = "*.parquet") -> list[Path]:
    return sorted(store.directory.glob(pattern))


class TestCompaction:
    def test_one_part_with_the_same_rows(self, store: ResultsStore) -> None:
        (part,) = store.compact()
        assert files(store) == [part]
        assert part.name == f"part-{results_hash(rows_of(*range(5)))}.parquet"
        assert store.read().rows == rows_of(*range(5))
        assert store.compact() == ()

    def test_bytes_do_not_depend_on_the_way(self, store: ResultsStore, tmp_path: Path) -> None:
        other = ResultsStore(tmp_path / "other")
        for number in (3, 1):
            other.append(make_contest(number))
        other.compact()
        for number in (4, 0, 2):
            other.append(make_contest(number))
        (first,), (second,) = store.compact(), other.compact()
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()
        assert files(other) == [second]

    def test_killed_before_deleting_leaves_duplicates_that_do_not_count(
        self, store: ResultsStore, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(store.directory, copy)
        store.compact()
        for path in copy.iterdir():
            shutil.copy(path, store.directory)
        assert len(files(store)) == 6
        assert store.read().rows == rows_of(*range(5))
        store.compact()
        assert len(files(store)) == 1
        assert store.read().rows == rows_of(*range(5))

    def test_parts_stay_small_and_large_ones_are_left_alone(
        self, store: ResultsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5, 40):
            store.append(make_contest(number))
        limit = len(encode(rows_of(*range(12))))
        monkeypatch.setattr(store_module, "PART_BYTES", limit)
        parts = store.compact()
        assert len(parts) == 4
        assert all(limit // 2 < part.stat().st_size <= limit for part in parts)
        assert store.read().rows == rows_of(*range(40))
        assert sum(len(Decoder().decode(part.read_bytes())) for part in parts) == 120
        store.append(make_contest(40))
        store.append(make_contest(41))
        (small,) = store.compact()
        assert set(files(store)) == {*parts, small}

    def test_nothing_to_do(self, tmp_path: Path) -> None:
        store = ResultsStore(tmp_path / "results")
        assert store.compact() == ()
        path = store.append(make_contest(0))
        assert store.compact() == ()
        assert files(store) == [path]

    def test_leftovers_of_killed_writers_go_after_an_hour(self, store: ResultsStore) -> None:
        old, new = (store.directory / f".contest-{name}.parquet.1-a.tmp" for name in ("old", "new"))
        for path in (old, new):
            path.write_bytes(b"half a file")
        os.utime(old, (time.time() - 3700,) * 2)
        assert store.read().rows == rows_of(*range(5))
        assert len(store.contest_ids()) == 5
        store.compact()
        assert not old.exists()
        assert new.exists()


class TestConcurrency:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        directory = tmp_path / "results"
        directory.mkdir()
        return directory

    @pytest.fixture
    def processes(self) -> Iterator[list[subprocess.Popen[str]]]:
        started: list[subprocess.Popen[str]] = []
        yield started
        for process in started:
            process.kill()
            process.communicate()

    @pytest.mark.scenario("CS-014")
    def test_whole_snapshots_while_one_writes_and_two_compact(
        self, directory: Path, processes: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        count = 120
        expected = {make_contest(number)[0].contest_id: tuple(make_contest(number)) for number in range(count)}
        processes.extend(run_python(COMPACTOR, directory) for _ in range(2))
        for compactor in processes:
            assert compactor.stdout is not None
            assert compactor.stdout.readline() == "ready\n"
        writer = run_python(WRITER, directory, 0, count)
        processes.append(writer)
        store = ResultsStore(directory)
        assert writer.stdout is not None
        seen: set[str] = set()
        for line in writer.stdout:
            finished = {make_contest(number)[0].contest_id for number in range(int(line) + 1)}
            if int(line) % 2:
                ids = set(store.contest_ids())
            else:
                results = store.read()
                assert results.quarantined == ()
                ids = {row.contest_id for row in results.rows}
                assert results.rows == tuple(row for contest in sorted(ids) for row in expected[contest])
            assert ids >= finished | seen
            seen = ids
        assert writer.wait() == 0
        assert all(compactor.poll() is None for compactor in processes[:2])
        assert seen == expected.keys()
        assert caplog.text == ""

    def test_listing_that_a_compaction_overtakes(self, store: ResultsStore) -> None:
        """A listing may have passed the new part's place before it is written, and reach the contests' after."""

        class Overtaken(ResultsFolder):
            def names(self) -> frozenset[str]:
                return super().names() if store.compact() == () else frozenset()

        reader = ResultsStore(store.directory)
        reader._folder = Overtaken(store.directory)
        assert reader.read().rows == rows_of(*range(5))

    def test_killed_writers_lose_nothing_that_was_finished(
        self, directory: Path, processes: list[subprocess.Popen[str]]
    ) -> None:
        store = ResultsStore(directory)
        generator = random.Random(0)
        finished: set[str] = set()
        for attempt in range(5):
            start = attempt * 100_000
            writer = run_python(WRITER, directory, start, start + 100_000)
            processes.append(writer)
            assert writer.stdout is not None
            assert writer.stdout.readline() == f"{start}\n"
            time.sleep(generator.uniform(0.0, 0.05))
            writer.kill()
            numbers = [start, *(int(line) for line in writer.stdout if line.endswith("\n"))]
            finished |= {make_contest(number)[0].contest_id for number in numbers}
            results = store.read()
            ids = {row.contest_id for row in results.rows}
            # At most the contest in flight had been renamed and not been printed.
            assert ids >= finished
            assert len(ids - finished) <= attempt + 1
            assert results.quarantined == ()
            assert len(results.rows) == 3 * len(ids)

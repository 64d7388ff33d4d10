"""`layerzero-tune merge`: shards of one device become one folder, whatever their order, and compile as one."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.errors import ResultsError
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.measure.contention import MAX_SHARE
from layerzero_tune.results import store as store_module
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.merge import merge_shards
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import CommandsHere
from tests.tune.measurements import DEVICE, make_contest, rows_of
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import ALL_KERNELS

USAGE = 2
EARLY, LATE = "2026-01-01T00:00:00+00:00", "2026-07-01T00:00:00+00:00"
HELD_OUT = [*make_contest(90), *make_contest(90, candidates=1, kernel_id=PUBLIC_CALL, job_id="public")]


def again(number: int, **changes: Any) -> list[Measurement]:
    """The contest's jobs, measured a second time with other results."""
    return make_contest(number, screen_ns=5.0, **changes)


def write(folder: Path, rows: Iterable[Measurement]) -> Path:
    """A results folder of these rows, in one part."""
    store = ResultsStore(folder)
    contests: dict[str, list[Measurement]] = {}
    for row in rows:
        contests.setdefault(row.contest_id, []).append(row)
    store.absorb(list(contests.values()))
    return folder


def rows_in(contests: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    return tuple(row for contest in contests for row in contest)


def content(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestMergeShards:
    def test_contests_of_all_shards_each_once(self) -> None:
        merged = merge_shards({"a": rows_of(0, 1), "b": rows_of(1, 2), "c": rows_of(1)})
        assert rows_in(merged.contests) == rows_of(0, 1, 2)
        assert merged.measurements == len(rows_of(0, 1, 2))
        assert (merged.shared, merged.conflicts) == (1, ())
        assert merged.device.to_dict() == DEVICE

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_shards_in_any_order_give_the_same_union(self, data: st.DataObject) -> None:
        contests = [version(number) for number in range(4) for version in (make_contest, again)]
        held = st.lists(st.sampled_from(contests), min_size=1, max_size=5)
        shards = data.draw(st.lists(held, min_size=1, max_size=4))
        named = {f"shard {number}": rows_in(shard) for number, shard in enumerate(shards)}
        merged = merge_shards(named)
        others = data.draw(st.permutations(list(named.values())))
        assert merge_shards(dict(zip("abcd", others, strict=False))).contests == merged.contests
        assert [contest[0].contest_id for contest in merged.contests] == sorted(
            {row.contest_id for shard in shards for row in rows_in(shard)}
        )
        assert all(contest in contests for contest in merged.contests), "times of two versions were mixed"
        # Merged in two steps, as more shards come in.
        first, *rest = named.values()
        step = merge_shards({"first": first})
        for shard in rest:
            step = merge_shards({"so far": rows_in(step.contests), "next": shard})
        assert step.contests == merged.contests

    @pytest.mark.parametrize(
        ("kept", "dropped"),
        [
            (again(3, measured_at=EARLY), make_contest(3, measured_at=LATE)),
            (again(3, measured_at=LATE, contention=MAX_SHARE), make_contest(3, measured_at=EARLY, contention=0.06)),
            (again(3, measured_at=LATE, contention=0.06), make_contest(3, measured_at=EARLY, contention=0.9)),
            (again(3, measured_at=EARLY, contention=MAX_SHARE), make_contest(3, measured_at=LATE, contention=0.01)),
            (make_contest(3, measured_at=EARLY, screen_ns=4.0), make_contest(3, measured_at=EARLY, screen_ns=5.0)),
        ],
        ids=[
            "the earlier",
            "the undisturbed",
            "the less disturbed",
            "both undisturbed",
            "equally old: the lesser text",
        ],
    )
    def test_of_two_versions_of_a_contest_one_is_kept_whole(
        self, kept: list[Measurement], dropped: list[Measurement]
    ) -> None:
        for order in itertools.permutations((("good", kept), ("bad", dropped), ("like it", dropped))):
            merged = merge_shards(dict(order) | {"other": rows_of(5)})
            assert merged.contests == tuple(sorted((kept, make_contest(5)), key=lambda rows: rows[0].contest_id))
            [conflict] = merged.conflicts
            assert (conflict.kept, conflict.dropped) == ("good", ("bad", "like it"))
            assert merged.shared == 0

    def test_errors_that_are_no_number_are_no_conflict(self) -> None:
        rows = [make_contest(1, relative_error=float("nan")) for _ in range(2)]
        merged = merge_shards({"a": rows[0], "b": rows[1]})
        assert (merged.shared, merged.conflicts) == (1, ())

    def test_other_devices_are_refused_and_both_are_named(self) -> None:
        shards = {
            "here": rows_of(1),
            "there": make_contest(2, device={**DEVICE, "physical_cores": 4}),
        }
        with pytest.raises(
            ResultsError,
            match="here is of Some CPU, physical_cores 2, there of Some CPU, physical_cores 4; merge each device",
        ):
            merge_shards(shards)
        with pytest.raises(ResultsError, match=r"mixed is of Other CPU, mixed of Some CPU;"):
            merge_shards({"mixed": [*make_contest(1), *make_contest(2, device={**DEVICE, "name": "Other CPU"})]})

    def test_held_out_contests_stay_out(self) -> None:
        merged = merge_shards({"a": [*make_contest(1), *HELD_OUT], "b": make_contest(2)})
        assert rows_in(merged.contests) == rows_of(1, 2)
        assert merged.held_out == {"a": 1, "b": 0}
        with pytest.raises(ResultsError, match="a: held-out measurements of evaluate only; merge what run measured"):
            merge_shards({"a": HELD_OUT})

    def test_an_empty_shard_is_named(self) -> None:
        with pytest.raises(ResultsError, match="b holds no measurement"):
            merge_shards({"a": rows_of(1), "b": ()})


def test_a_merge_compiles_to_the_bytes_of_the_same_rows_in_one_folder(tmp_path: Path) -> None:
    rows = recorded_rows()
    contests = sorted({row.contest_id for row in rows})
    chance = random.Random(1)
    parts = [{contest for contest in contests if chance.random() < 0.6} for _ in range(2)]
    parts.append({*contests} - parts[0] - parts[1])
    shards = [
        write(tmp_path / f"shard_{number}", [row for row in rows if row.contest_id in part])
        for number, part in enumerate(parts)
    ]
    merged = merge_shards({shard.name: ResultsStore(shard).read().rows for shard in shards})
    assert merged.shared > 10
    assert emit(compile_table(rows_in(merged.contests), ALL_KERNELS)) == emit(compile_table(rows, ALL_KERNELS))


def test_conflicts_compile_as_they_do_where_the_files_lie_in_one_folder(command: CommandsHere, tmp_path: Path) -> None:
    """The rule of merge is the rule of reading a folder."""
    rows = recorded_rows()
    some = sorted({row.contest_id for row in rows})[:40]
    chance = random.Random(2)
    other = [
        replace(
            row,
            samples_ns=tuple(chance.uniform(0.5, 2.0) * time for time in row.samples_ns),
            measured_at=EARLY if chance.random() < 0.5 else LATE,
        )
        for row in rows
        if row.contest_id in some
    ]
    shards = [write(tmp_path / "a", rows), write(tmp_path / "b", other)]
    together = tmp_path / "together"
    for shard in shards:
        shutil.copytree(shard, together, dirs_exist_ok=True)
    report = command("merge", *reversed(shards), "--out", tmp_path / "merged", "--json").json
    assert len(report["conflicts"]) == len(some)
    assert {conflict["kept"] for conflict in report["conflicts"]} == {str(shard) for shard in shards}
    tables = [
        emit(compile_table(ResultsStore(folder).read().rows, ALL_KERNELS)) for folder in (together, tmp_path / "merged")
    ]
    assert tables[0] == tables[1]
    assert tables[0] != emit(compile_table(rows, ALL_KERNELS))


class TestCommand:
    def test_a_new_folder_is_written_and_the_same_again_changes_no_byte(
        self, command: CommandsHere, tmp_path: Path
    ) -> None:
        a, b = write(tmp_path / "a", rows_of(0, 1)), write(tmp_path / "b", [*make_contest(1), *again(2), *HELD_OUT])
        c = write(tmp_path / "c", make_contest(2, measured_at=EARLY))
        before = [content(shard) for shard in (a, b, c)]
        out = tmp_path / "new" / "merged"
        report = command("merge", a, b, c, a, "--out", out, "--json").json
        written = content(out)
        expected = [*rows_of(0, 1), *make_contest(2, measured_at=EARLY)]
        assert ResultsStore(out).read().rows == tuple(sorted(expected, key=lambda row: (row.contest_id, row.job_id)))
        assert report == {
            "out": str(out),
            "device": DEVICE,
            "shards": {
                str(a): {"measurements": 6, "held_out_contests": 0},
                str(b): {"measurements": 10, "held_out_contests": 1},
                str(c): {"measurements": 3, "held_out_contests": 0},
            },
            "contests": 3,
            "measurements": 9,
            "shared_contests": 1,
            "conflicts": [
                {
                    "contest_id": make_contest(2)[0].contest_id,
                    "context": make_contest(2)[0].context.to_dict(),
                    "kept": str(c),
                    "dropped": [str(b)],
                }
            ],
            "quarantined": [],
        }
        for _ in range(2):
            assert command("merge", c, b, a, "--out", out).status == 0
            assert content(out) == written
        other = tmp_path / "other"
        assert command("merge", c, a, b, "--out", other).status == 0
        assert content(other) == written
        assert [content(shard) for shard in (a, b, c)] == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "new", "other"]

    def test_what_it_did_is_said(self, command: CommandsHere, tmp_path: Path) -> None:
        a, b = write(tmp_path / "a", [*rows_of(0, 1), *HELD_OUT]), write(tmp_path / "b", [*make_contest(0), *again(1)])
        ended = command("merge", a, b, "--out", tmp_path / "out")
        said = " ".join(ended.errors.split())
        assert "6 measurements in 2 contests of Some CPU from 2 shards; next: layerzero-tune compile" in said
        assert "1 contests are held by several shards alike" in said
        assert "1 held-out contests of evaluate were left out" in said
        assert "1 contests with different times" in ended.output
        assert "2x4096" in ended.output

    def test_a_folder_that_holds_results_grows(self, command: CommandsHere, tmp_path: Path) -> None:
        a, b = write(tmp_path / "a", rows_of(0, 1)), write(tmp_path / "b", again(1, measured_at=LATE))
        out = tmp_path / "out"
        store = ResultsStore(out)
        store.append(make_contest(7))
        store.append(make_contest(0))
        report = command("merge", a, "--out", out, "--json").json
        assert report["shards"][str(out)] == {"measurements": 6, "held_out_contests": 0}
        assert store.read().rows == rows_of(0, 1, 7)
        assert len(content(out)) == 1
        # And it may itself be among the shards.
        assert command("merge", out, b, "--out", out).status == 0
        assert store.read().rows == rows_of(0, 1, 7)
        mixed = write(tmp_path / "evaluated", HELD_OUT)
        ended = command("merge", a, "--out", mixed)
        assert ended.status == 1
        assert "evaluated holds held-out measurements" in ended.errors.replace("\n", "")
        assert ResultsStore(mixed).read().rows == tuple(sorted(HELD_OUT, key=lambda row: row.job_id))

    def test_a_new_folder_appears_whole_or_not_at_all(
        self, command: CommandsHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, out = write(tmp_path / "a", rows_of(0, 1, 2)), tmp_path / "out"
        monkeypatch.setattr(store_module, "PART_BYTES", 1)
        written: list[Path] = []

        def fails_at_the_second(path: Path, data: bytes) -> None:
            if written:
                raise OSError(28, "No space left on device")
            written.append(path)
            path.write_bytes(data)

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "write_atomically", fails_at_the_second)
            ended = command("merge", a, "--out", out)
        assert ended.status == 1
        assert "No space left on device" in ended.errors.replace("\n", " ")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        out.mkdir()
        assert command("merge", a, "--out", out).status == 0
        assert len(content(out)) == 3
        assert ResultsStore(out).read().rows == rows_of(0, 1, 2)

    def test_a_damaged_file_is_set_aside_and_reported(self, command: CommandsHere, tmp_path: Path) -> None:
        shard = ResultsStore(tmp_path / "a")
        paths = [shard.append(make_contest(number)) for number in range(2)]
        paths[0].write_bytes(paths[0].read_bytes()[:-9])
        report = command("merge", tmp_path / "a", "--out", tmp_path / "out", "--json").json
        assert report["quarantined"] == [str(tmp_path / "a" / "quarantine" / paths[0].name)]
        assert ResultsStore(tmp_path / "out").read().rows == rows_of(1)

    def test_what_cannot_be_merged_is_named_and_nothing_is_written(self, command: CommandsHere, tmp_path: Path) -> None:
        a = write(tmp_path / "a", rows_of(0))
        b = write(tmp_path / "b", make_contest(1, device={**DEVICE, "name": "Other CPU"}))
        (tmp_path / "empty").mkdir()
        out = tmp_path / "out"
        for shards, message in (
            ((a, b), f"{a} is of Some CPU, {b} of Other CPU"),
            ((a, tmp_path / "nowhere"), "nowhere: no such directory"),
            ((a, tmp_path / "empty"), "empty holds no measurement"),
        ):
            ended = command("merge", *shards, "--out", out, "--json")
            assert (ended.status, ended.output) == (1, "")
            assert message in ended.errors.replace("\n", "")
            assert not out.exists()
        out.write_text("a file")
        assert command("merge", a, "--out", out).status == 1
        assert command("merge", "--out", out).status == USAGE

"""Rows as Parquet: exact, small, hashed by content, and damage found."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ResultsError
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.measurement import TIME_BITS, Measurement, rounded_time
from layerzero_tune.results.schema import COLUMNS, DamagedFileError, Decoder, encode
from layerzero_tune.results.store import ResultsStore, results_hash
from tests.tune.measurements import make_contest, rows_of


class TestTimes:
    @given(st.floats(min_value=1e-3, max_value=1e15))
    def test_rounding_is_close_and_idempotent(self, ns: float) -> None:
        rounded = rounded_time(ns)
        assert abs(rounded - ns) <= ns * 2.0**-TIME_BITS
        assert rounded_time(rounded) == rounded

    def test_measurement_holds_what_the_store_will_keep(self) -> None:
        row = make_contest(0)[0]
        assert row.samples_ns == tuple(map(rounded_time, row.samples_ns))
        assert replace(row, screen_ns=1e6 / 3).screen_ns == rounded_time(1e6 / 3) != 1e6 / 3


class TestHash:
    def test_depends_on_content_alone(self, store: ResultsStore) -> None:
        rows = rows_of(*range(5))
        before = results_hash(store.read().rows)
        store.compact()
        assert results_hash(store.read().rows) == before == results_hash(rows) == results_hash(reversed(rows))

    @pytest.mark.parametrize("gpu", [None, {"clock_mhz": 1965.0, "slowed": []}])
    def test_is_that_of_all_columns_as_json_in_ascending_order(self, gpu: dict[str, Any] | None) -> None:
        """Tables name the results that they were compiled from by it, so it must not change. Times are their bits."""
        numbers: dict[str, Any] = {
            "relative_error": None,
            "tolerance": 1,
            "screen_ns": float("inf"),
            "contention": 1 / 3,
        }
        rows = [
            *rows_of(*range(4)),
            *make_contest(4, gpu=gpu),
            *make_contest(7, **numbers),
            *make_contest(8, contest_id='a"\u00e9'),
        ]
        texts = []
        for row in rows:
            # Rows from before the last column keep their hash, and so do all without a GPU.
            values: list[Any] = [getattr(row, name) for name in COLUMNS if name != "gpu" or row.gpu is not None]
            for place, value in enumerate(values):
                if isinstance(value, SelectionContext | dict):
                    values[place] = canonical_json(value if isinstance(value, dict) else value.to_dict())
                elif isinstance(value, tuple):
                    values[place] = struct.pack(f"<{len(value)}d", *value).hex()
                elif COLUMNS[place] in ("relative_error", "tolerance") and value is not None:
                    values[place] = float(value)
            texts.append(json.dumps(values) + "\n")
        assert results_hash(rows) == hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()[:32]

    @pytest.mark.parametrize(
        "change",
        [
            {"samples_ns": (1.0, 2.0)},
            {"screen_ns": None},
            {"relative_error": 0.5},
            {"message": "x"},
            {"configuration": {"block": 99}},
            {"device": {"name": "Other"}},
            {"measured_at": "2027"},
            {"gpu": {"clock_mhz": 1965.0}},
        ],
    )
    def test_every_value_counts(self, change: dict[str, object]) -> None:
        first, *others = rows_of(0)
        assert results_hash([replace(first, **change), *others]) != results_hash([first, *others])  # type: ignore[arg-type]

    def test_whole_numbers_hash_as_they_are_read_back(self) -> None:
        rows = make_contest(0, relative_error=0, tolerance=1, screen_ns=5)
        assert results_hash(Decoder().decode(encode(rows))) == results_hash(rows)


class TestSize:
    @pytest.mark.scenario("PS-013")
    def test_a_million_rows_stay_below_100_megabytes(self) -> None:
        count = 50_000
        rows = [row for number in range(count // 5) for row in make_contest(number, candidates=5)]
        rows.sort(key=lambda row: (row.contest_id, row.job_id))
        assert len(rows) == count
        assert all(len(row.samples_ns) == 16 for row in rows)
        data = encode(rows)
        assert len(data) / count * 1_000_000 < 100e6
        read = Decoder().decode(data)
        assert read == rows
        # Rows share what is equal, or a million of them would not fit in memory.
        assert read[0].device is read[-1].device
        assert len({id(row.context) for row in read}) == count // 5


class TestDamage:
    def test_flipped_bits_are_found_or_harmless(self) -> None:
        rows = make_contest(0)
        data = encode(rows)
        generator = random.Random(0)
        found = 0
        for _ in range(400):
            flipped = bytearray(data)
            flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            try:
                assert Decoder().decode(bytes(flipped)) == rows
            except (DamagedFileError, ResultsError):
                found += 1
        assert found > 100


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            make_contest,
            st.integers(0, 20),
            candidates=st.integers(1, 4),
            rounds=st.integers(0, 16),
            message=st.text(st.characters(exclude_categories=["Cs"])),
            relative_error=st.none() | st.floats(min_value=0.0),
            screen_ns=st.none() | st.floats(min_value=0.1, max_value=1e12),
            versions=st.dictionaries(st.text("abc"), st.text()),
            gpu=st.none() | st.dictionaries(st.text("abc"), st.none() | st.integers() | st.lists(st.text("xy"))),
        ),
        max_size=6,
    )
)
def test_round_trip(contests: list[list[Measurement]]) -> None:
    rows = [row for contest in contests for row in contest]
    read = Decoder().decode(encode(rows))
    assert read == rows
    assert results_hash(read) == results_hash(rows)
    assert encode(read) == encode(rows)

"""What is held: cached answers, specs, results; what a hit allocates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import synthetic_tuning
from benchmarking.in_force import in_force
from benchmarking.timing import held_bytes

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.selection.live_selector import Ranking
from layerzero_tune.results.store import ResultsStore
from selection_bench.measuring import Hit, Row, attention, kernel

CACHED, RECORDS = 25_600, 1_000_000


def rows(hit: Hit, full: bool) -> Iterator[Row]:
    yield _cache()
    described = attention()

    def hits() -> None:
        for _ in range(5000):
            lz.select(described)
            hit.call()

    kept = held_bytes(hits)
    yield Row("PS-012", "minimal", f"{kept} bytes kept after 10,000 hits", met=kept < 4096)
    yield _store(full)
    declared = [each.spec for each in builtin_kernels()]

    def specs() -> list[object]:
        made = [replace(declared[number % len(declared)], kernel_id=f"my.k{number}") for number in range(100)]
        return [(spec, spec.limits) for spec in made]

    size = held_bytes(specs) / 2**20
    yield Row("PS-014", "< 10 MB", f"{size:.2f} MiB for 100 specs and their limits", met=size < 10)


def _cache() -> Row:
    def filled(entries: int) -> LiveCache[Ranking]:
        snapshot = dispatch.current_snapshot()
        snapshot.live_cache = LiveCache(entries)
        for number in range(entries):
            snapshot.select(attention(scale=1.0 + number))
        return snapshot.live_cache

    usual = held_bytes(lambda: filled(CACHED // 8)) * 8
    with in_force(*(kernel(f"my.k{number}") for number in range(1000))):
        many = held_bytes(lambda: filled(50)) / 50
    text = (
        f"{usual / 1e6:.0f} MB for {CACHED:,} answers (an eighth of them measured); "
        f"with 1,000 candidates {many / 1e3:.0f} kB each"
    )
    return Row("PS-011", "< 100 MB", text, met=usual < 100e6)


def _store(full: bool) -> Row:
    rows = RECORDS if full else RECORDS // 50
    with tempfile.TemporaryDirectory() as folder:
        store = ResultsStore(Path(folder, "results"))
        synthetic_tuning.write(store, rows)
        size = sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    scaled = size * RECORDS / rows
    how = "measured" if full else f"from {rows:,}; --full writes them all"
    return Row(
        "PS-013", "< 500 MB", f"{scaled / 1e6:.0f} MB for 1,000,000 rows of 16 samples ({how})", met=scaled < 500e6
    )

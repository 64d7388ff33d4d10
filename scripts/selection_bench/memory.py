"""What is held: cached answers, specs, results; what a hit allocates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarking.in_force import in_force
from benchmarking.timing import held_bytes

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.selection.live_selector import Ranking
from layerzero_tune.identity import content_hash
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from selection_bench.measuring import H100, Hit, Row, attention, kernel

CACHED, RECORDS = 25_600, 1_000_000
CANDIDATES = 50  # of a contest


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
    contests = (RECORDS if full else RECORDS // 50) // CANDIDATES
    with tempfile.TemporaryDirectory() as folder:
        store = ResultsStore(Path(folder, "results"))
        for number in range(contests):
            store.append(_contest(number))
            if number % 5000 == 4999:
                store.compact()
        store.compact()
        size = sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    scaled = size * RECORDS / (contests * CANDIDATES)
    how = "measured" if full else f"from {contests * CANDIDATES:,}; --full writes them all"
    return Row(
        "PS-013", "< 500 MB", f"{scaled / 1e6:.0f} MB for 1,000,000 rows of 16 samples ({how})", met=scaled < 500e6
    )


def _contest(number: int) -> list[Measurement]:
    """Candidates with 16 samples each; times from a generator that repeats after no less than 2^31 numbers."""
    state = number + 1
    context = replace(attention(batch_size=1 + number % 4096, seq_len_q=1 + number // 4096), device=None)
    found = []
    for candidate in range(CANDIDATES):
        samples = []
        for _ in range(16):
            state = (state * 48271) % 2147483647
            samples.append(1e4 * (1.0 + candidate) * (1.0 + state / 2147483647 / 50))
        found.append(
            Measurement(
                contest_id=content_hash(["contest", number]),
                job_id=content_hash(["job", number, candidate]),
                context=context,
                kernel_id=f"my.kernel_{candidate}",
                configuration={"block": 1 + candidate},
                is_default=candidate == 0,
                status="ok",
                message="",
                relative_error=samples[0] * 1e-8,
                tolerance=1e-2,
                screen_ns=samples[1],
                samples_ns=tuple(samples),
                device=H100.to_dict(),
                versions={"torch": "2.13.0"},
                source_hash=content_hash(candidate),
                policy={"rounds": 16},
                measured_at=f"2026-03-01T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}+00:00",
            )
        )
    return found

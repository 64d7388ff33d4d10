"""Performance, PS-006 to PS-014: what the live selector's cache keeps, when it lets go, and how much memory is held."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.selection.live_cache import MAX_ENTRIES, LiveCache
from layerzero_runtime.selection.live_selector import LiveSelector, Ranking
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.prior import Prior
from layerzero_tune.results.store import ResultsStore
from tests.runtime.test_snapshot import in_threads
from tests.scenarios.conftest import H100, attention, kernel, only
from tests.scenarios.watching import all_locks_held, measured_tables, promptly
from tests.tune.measurements import make_contest

LAYERS, STEPS = 32, 2000
MEGABYTE = 1 << 20


def decode(length: int, layer: int = 0) -> SelectionContext:
    """A decode step of one of a model's layers; every second one has more heads."""
    return attention(
        operation="attention.cross",
        seq_len_q=1,
        seq_len_k=length,
        num_heads=16 << layer % 2,
        batch_size=4,
    )


@pytest.mark.scenario("PS-006")
def test_a_decode_loop_hits_the_live_cache() -> None:
    """Growing lengths over all layers, with kernels that begin, end or care for multiples within them."""
    kernels = (
        kernel("a.long", min_seq_len=1, max_seq_len=1500, priority=90),
        kernel("b.aligned", extra_limits=(Limit("seq_len_k", "multiple_of", 64),), priority=80),
        kernel("c.any", extra_limits=(Limit("score_elements", "at_most", 1 << 17),)),
        kernel("d.rest"),
    )
    with only(*kernels) as snapshot:
        for length in range(100, 100 + STEPS):
            steps = [decode(length, layer) for layer in range(2)]
            plans = [lz.select(steps[layer % 2]) for layer in range(LAYERS)]
            if length % 37 == 0:
                # What the class says is what a judgement of this very call says.
                for plan, step in zip(plans, steps, strict=False):
                    ranking = snapshot.live.rank(step, Prior())
                    assert plan.kernel_id == ranking.choices[0].kernel.kernel_id
        hits, computed = snapshot.live_cache.hits.value, snapshot.live_cache.computed.value
    assert hits + computed == LAYERS * STEPS
    assert hits / (hits + computed) > 0.999
    assert computed == len(snapshot.live_cache)


@pytest.mark.scenario("PS-007")
def test_threads_hit_without_any_lock() -> None:
    """There is nothing to shard: sixteen threads hit while every lock there is, the cache's among them, is taken."""
    with only(kernel("a.one"), kernel("b.two", max_head_dim=32)) as snapshot:
        contexts = [attention(head_dim=16 * (1 + number)) for number in range(16)]
        expected = [replace(lz.select(context), cached=True) for context in contexts]
        computed, hits = snapshot.live_cache.computed.value, snapshot.live_cache.hits.value
        with all_locks_held() as held:
            assert held >= 5

            def work(number: int) -> None:
                for turn in range(200):
                    place = (number + turn) % 16
                    assert lz.select(contexts[place]) == expected[place]

            promptly(lambda: in_threads(work, 16))
        assert snapshot.live_cache.computed.value == computed
        assert snapshot.live_cache.hits.value == hits + 16 * 200


class Key:
    """A key that counts how often it is hashed and compared."""

    touched = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        Key.touched += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Key.touched += 1
        return isinstance(other, Key) and self.number == other.number


@pytest.mark.scenario("PS-008")
def test_a_full_cache_lets_the_oldest_go_at_a_cost_that_does_not_depend_on_its_size() -> None:
    costs = []
    for size in (10, 2000):
        cache: LiveCache[int] = LiveCache(size)
        for number in range(size):
            cache.get(Key(number), lambda number=number: number + 1)  # type: ignore[misc]
        Key.touched = 0
        for number in range(size, size + 500):
            assert cache.get(Key(number), lambda number=number: number + 1) == (number + 1, False)  # type: ignore[misc]
            assert len(cache) == size
        costs.append(Key.touched)
        kept = range(500, 500 + size)
        assert all(cache.get(Key(number), lambda: -1) == (number + 1, True) for number in kept)
        assert cache.get(Key(499), lambda: -1) == (-1, False)
    assert costs[0] == costs[1]


@pytest.mark.scenario("PS-009")
def test_a_new_policy_begins_with_an_empty_cache_into_which_nothing_old_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with only(kernel("a.first", priority=90), kernel("b.second")) as before:
        for number in range(200):
            lz.select(attention(scale=1.0 + number))
        assert len(before.live_cache) == 200
        begun, go_on = threading.Event(), threading.Event()
        rank = LiveSelector.rank

        def slow_under_the_old(selector: LiveSelector, context: SelectionContext, prior: Prior) -> Ranking:
            if selector is before.live:
                begun.set()
                assert go_on.wait(30)
            return rank(selector, context, prior)

        monkeypatch.setattr(LiveSelector, "rank", slow_under_the_old)
        found: list[str] = []
        late = threading.Thread(target=lambda: found.append(lz.select(attention(head_dim=96)).kernel_id))
        late.start()
        assert begun.wait(30)
        lz.set_policy(Policy(denies=(Rule(kernel="a.*"),)))
        after = current_snapshot()
        # Nothing was deleted one by one: the old cache went out of use as it is.
        assert (len(before.live_cache), len(after.live_cache)) == (200, 0)
        go_on.set()
        late.join(30)
        assert found == ["a.first"]
        assert (len(before.live_cache), len(after.live_cache)) == (201, 0)
        for context in (attention(head_dim=96), attention(scale=7.0)):
            plan = lz.select(context)
            assert (plan.kernel_id, plan.cached) == ("b.second", False)


@pytest.mark.scenario("PS-010")
def test_of_a_thousand_threads_that_miss_one_key_one_computes() -> None:
    threads = 1000
    missed = threading.Semaphore(0)
    cache: LiveCache[str] = LiveCache()
    computing: list[int] = []

    class Missed(str):
        def __hash__(self) -> int:
            missed.release()
            return hash("one key")

    def compute() -> str:
        computing.append(threading.get_ident())
        for _ in range(threads):  # until every thread has looked for the key, and found nothing
            assert missed.acquire(timeout=20)
        return "answer"

    found: list[tuple[str, bool]] = []
    before = threading.stack_size(256 * 1024)
    try:
        in_threads(lambda number: found.append(cache.get(Missed("one key"), compute)), threads)
    finally:
        threading.stack_size(before)
    assert len(computing) == 1
    assert sorted(found) == [("answer", False)] + [("answer", True)] * (threads - 1)
    assert (cache.computed.value, cache.hits.value) == (1, threads - 1)


@pytest.mark.scenario("PS-010")
def test_a_thousand_selections_of_one_context_are_judged_once() -> None:
    def select(number: int) -> None:
        assert lz.select(attention()).kernel_id == "a.one"

    with only(kernel("a.one"), kernel("b.two")) as snapshot:
        before = threading.stack_size(256 * 1024)
        try:
            in_threads(select, 1000)
        finally:
            threading.stack_size(before)
        assert (snapshot.live_cache.computed.value, snapshot.live_cache.hits.value) == (1, 999)


def memory_of(make: Callable[[], object]) -> int:
    """Bytes that what `make` returns holds beyond what was there before."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        del made
        return held
    finally:
        tracemalloc.stop()


@pytest.mark.scenario("PS-011")
def test_cached_answers_take_little_memory() -> None:
    """An eighth of the 25,600 entries asked about, of the operation with the most kernels; the rest is proportion."""
    entries = 3200
    snapshot = current_snapshot()

    def fill() -> LiveCache[Ranking]:
        snapshot.live_cache = LiveCache(entries)
        for number in range(entries):
            snapshot.select(attention(device=H100, scale=1.0 + number, requires_grad=bool(number % 2)))
        return snapshot.live_cache

    fill()
    assert memory_of(fill) * (25_600 / entries) < 100e6
    assert len(snapshot.live_cache) == entries
    snapshot.select(attention(device=H100, scale=0.01))
    assert len(snapshot.live_cache) == entries
    assert MAX_ENTRIES < 25_600


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Snapshot]:
    with measured_tables(tmp_path) as snapshot:
        yield snapshot


@pytest.mark.scenario("PS-012")
def test_hits_leave_nothing_behind(table: Snapshot) -> None:
    gate = torch.randn(1, 32)
    described = attention(device=H100)

    def hits() -> None:
        for _ in range(3000):
            lz.swiglu(gate, gate)
            lz.select(described)

    hits()
    assert memory_of(hits) < 1024
    # With the sizes in hand a selection allocates nothing at all, not even for the moment.
    [route] = table._routes.values()
    decide, functions = route.decide, route.functions
    gc.collect()
    tracemalloc.start()
    try:
        functions[decide(1, 32)]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()
        functions[decide(1, 32)]
        after = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after[1] - before[0] < 512  # the pair that tracemalloc itself gives


@pytest.mark.scenario("PS-013")
def test_a_million_rows_of_results_fit_the_disk(tmp_path: Path) -> None:
    """As written contest by contest, and compacted; small contests are the worst case for files of their own."""
    contests, rows_each = 400, 25
    store = ResultsStore(tmp_path / "results")
    for number in range(contests):
        store.append(make_contest(number, candidates=rows_each))
    store.compact()
    written = [path for path in store.directory.rglob("*") if path.is_file()]
    assert len(written) == 1
    count = contests * rows_each
    assert len(store.read().rows) == count
    assert written[0].stat().st_size * (1_000_000 / count) < 500e6


@pytest.mark.scenario("PS-014")
def test_the_declarations_of_a_hundred_kernels_take_little_memory() -> None:
    declared = [each.spec for each in builtin_kernels()]

    def specs() -> list[Any]:
        made: list[KernelSpec] = [
            replace(declared[number % len(declared)], kernel_id=f"my.kernel_{number}") for number in range(100)
        ]
        return [(spec, spec.limits) for spec in made]

    specs()
    assert len(specs()) == 100
    assert memory_of(specs) < 10 * MEGABYTE / 10

"""CS-001 to CS-016: many threads select while policies, kernels, tables and health change."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.device import detect_device
from layerzero_runtime.dispatch import current_snapshot, publish_snapshot
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection import live_selector
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.selection.live_selector import LiveSelector
from layerzero_runtime.tables.table import Table
from layerzero_tune.results.store import ResultsStore
from tests.runtime.conftest import tables_in_force
from tests.runtime.synthetic_table import write_table
from tests.scenarios.conftest import (
    A100,
    GRAVITON,
    H100,
    XEON,
    attention,
    beside_builtin,
    kernel,
    norm,
    only,
    spec,
    unreachable,
)
from tests.scenarios.failing_kernels import (
    TIMEOUT_S,
    Background,
    Body,
    Stop,
    in_threads,
    refusal,
    serve_rightly,
    swiglu_context,
    swiglu_kernel,
)
from tests.tune.measurements import make_contest, rows_of

BEST, NEXT = kernel("best.attention", priority=90), kernel("next.attention")
DENY_BEST = Policy(denies=(Rule(kernel="best.attention"),))


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@pytest.fixture
def ranking_stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Holds the first selection that has to be computed, after it was computed and before it is kept."""
    stop = Stop()
    rank = LiveSelector.rank

    def rank_and_stop(*arguments: Any) -> Any:
        ranking = rank(*arguments)
        stop.come_by()
        return ranking

    monkeypatch.setattr(LiveSelector, "rank", rank_and_stop)
    return stop


@pytest.mark.scenario("CS-001")
def test_a_hundred_threads_with_one_context_compute_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that computes is not done before all have asked."""
    all_have_asked = threading.Barrier(101)
    rank = LiveSelector.rank

    def rank_when_all_have_asked(*arguments: Any) -> Any:
        all_have_asked.wait(TIMEOUT_S)
        return rank(*arguments)

    class Announced(LiveCache[Any]):
        def get(self, *arguments: Any) -> Any:
            threading.Thread(target=all_have_asked.wait, args=(TIMEOUT_S,), daemon=True).start()
            return super().get(*arguments)

    monkeypatch.setattr(LiveSelector, "rank", rank_when_all_have_asked)
    with only(BEST, NEXT) as snapshot:
        snapshot.live_cache = Announced()
        plans = in_threads(lambda number: lz.select(attention()), 100)
        assert {plan.kernel_id for plan in plans} == {"best.attention"}
        assert snapshot.live_cache.computed.value == 1
        assert sum(not plan.cached for plan in plans) == 1


@pytest.mark.scenario("CS-002")
def test_contexts_that_no_check_tells_apart_are_computed_once() -> None:
    """Batch sizes 1 to 100 on both sides of a limit: as many computations as octaves and sides, not a hundred."""
    small = kernel("small.attention", max_batch_size=50, priority=90)
    with only(small, kernel("any.attention")) as snapshot:
        plans = in_threads(lambda number: lz.select(attention(batch_size=1 + number)), 100)
        for number, plan in enumerate(plans):
            assert plan.kernel_id == ("small.attention" if number < 50 else "any.attention")
        classes = {((1 + number) * 16).bit_length() * 2 + (number < 50) for number in range(100)}
        assert snapshot.live_cache.computed.value == len(snapshot.live_cache) == len(classes) == 8


@pytest.mark.scenario("CS-003")
def test_threads_that_run_one_kernel_at_once_get_their_own_results() -> None:
    """Each built-in kernel of the operation in turn: none keeps what one call left for another."""
    inputs = [torch.randn(3, 2, 2, 24, 16) for _ in range(16)]
    expected = [torch.nn.functional.scaled_dot_product_attention(*qkv) for qkv in inputs]
    for own in (k for k in builtin_kernels() if "attention.full" in k.spec.operations and "cpu" in k.spec.platforms):
        if own.kernel_id == "torch.sdpa.flash_cpu_folded":  # not for this call
            continue
        lz.set_policy(Policy(locks=(Rule(kernel=own.kernel_id),)))
        assert lz.select(attention(dtype="float32", device=detect_device("cpu"))).kernel_id == own.kernel_id
        for result, exact in zip(in_threads(lambda number: lz.attention(*inputs[number]), 16), expected, strict=True):
            torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.scenario("CS-004")
def test_ten_thousand_selections_of_one_operation_compute_a_few() -> None:
    with only(kernel("best.attention", priority=90, min_seq_len=1, max_seq_len=8192), NEXT) as snapshot:

        def decode(number: int) -> None:
            for length in range(1250):
                context = attention(operation="attention.cross", batch_size=1, seq_len_q=1, seq_len_k=2 + length)
                assert lz.select(context).kernel_id == "best.attention"

        in_threads(decode, 8)
        cache = snapshot.live_cache
        assert cache.computed.value < 100
        assert cache.hits.value + cache.computed.value == 10_000


@pytest.mark.scenario("CS-005")
def test_a_selection_that_takes_long_keeps_no_other_operation_waiting(ranking_stop: Stop) -> None:
    slow = Background(lambda: lz.select(attention()))
    ranking_stop.wait_until_reached()
    plans = in_threads(lambda number: lz.select(norm() if number % 2 else swiglu_context(device=H100)).kernel_id, 8)
    assert plans == ["torch.swiglu", "torch.rms_norm"] * 4
    assert slow.is_running
    ranking_stop.let_go()
    assert slow.result().kernel_id == "torch.sdpa"


@pytest.mark.scenario("CS-006")
def test_readers_need_none_of_the_writers_locks() -> None:
    """All locks of publishing, and those of the caches, are held while a hundred threads read, select and call."""
    with beside_builtin(BEST) as snapshot:
        lz.select(attention())
        serve_rightly()
        locks = (dispatch._build_lock, dispatch._sources_lock, snapshot.live_cache._lock, snapshot._prepared._lock)
        for lock in locks:
            assert lock.acquire(timeout=TIMEOUT_S)
        try:

            def read(number: int) -> str:
                assert current_snapshot().registry.get("best.attention") is BEST
                serve_rightly()
                return lz.select(attention()).kernel_id

            assert set(in_threads(read, 100)) == {"torch.sdpa"}
        finally:
            for lock in locks:
                lock.release()


@pytest.mark.scenario("CS-007")
def test_devices_never_share_an_answer() -> None:
    hopper, ampere = kernel("fa.v3", min_sm=(9, 0), priority=90), kernel("fa.v2", max_sm=(8, 9), priority=90)
    processor = kernel("cpu.attention", platforms=("cpu",))
    right_ones = {H100: "fa.v3", A100: "fa.v2", XEON: "cpu.attention"}
    with only(hopper, ampere, processor) as snapshot:
        devices = list(right_ones) * 10
        plans = in_threads(lambda number: lz.select(attention(device=devices[number])), len(devices))
        assert [plan.kernel_id for plan in plans] == [right_ones[device] for device in devices]
        assert len(snapshot.live_cache) == snapshot.live_cache.computed.value == 3


@pytest.mark.scenario("CS-007")
def test_what_was_measured_on_one_device_says_nothing_of_another(tmp_path: Path) -> None:
    """Of two processors whose limits are the same, the one with a table goes by its nearest bucket."""
    write_table(tmp_path, detect_device("cpu"))
    with tables_in_force(tmp_path):
        devices = [GRAVITON, detect_device("cpu")] * 4
        plans = in_threads(lambda number: lz.select(swiglu_context(1, 16, device=devices[number])), 8)
    assert [plan.kernel_id for plan in plans] == ["torch.swiglu", "torch.swiglu.in_place"] * 4
    assert {plan.source for plan in plans} == {"live"}


@pytest.mark.scenario("CS-008")
def test_a_writer_beside_99_readers_is_seen_in_its_own_order() -> None:
    """Whoever sees a kernel sees all that were registered before it, and never fewer than a moment ago."""
    ids = [f"added.number_{number}" for number in range(40)]

    def work(number: int) -> int:
        if number == 0:
            for kernel_id in ids:
                lz.register_kernel(spec(kernel_id), unreachable)
                assert current_snapshot().registry.get(kernel_id) is not None
            return len(ids)
        seen = 0
        for _ in range(60):
            registry = current_snapshot().registry
            found = [kernel_id for kernel_id in ids if registry.get(kernel_id)]
            assert found == ids[: len(found)]
            assert len(found) >= seen
            seen = len(found)
        return seen

    in_threads(work, 100)
    assert len(current_snapshot().registry) == len(builtin_kernels()) + len(ids)


@pytest.mark.scenario("CS-009")
def test_a_selection_ends_with_the_policy_it_began_with(ranking_stop: Stop) -> None:
    with only(BEST, NEXT):
        running = Background(lambda: lz.select(attention()))
        ranking_stop.wait_until_reached()
        lz.set_policy(DENY_BEST)
        assert lz.select(attention()).kernel_id == "next.attention"
        ranking_stop.let_go()
        assert running.result().kernel_id == "best.attention"
        # What the old one computed is not in the new one's cache.
        assert lz.select(attention()).kernel_id == "next.attention"


@pytest.mark.scenario("CS-010")
def test_a_selection_goes_through_the_kernels_that_there_were_when_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, checked = Stop(), []

    def rejections_and_stop(*arguments: Any) -> Any:
        stop.come_by()
        checked.append(threading.get_ident())
        return rejections(*arguments)

    monkeypatch.setattr(live_selector, "rejections", rejections_and_stop)
    with only(BEST, NEXT):
        running = Background(lambda: (lz.select(attention()).kernel_id, threading.get_ident()))
        stop.wait_until_reached()
        lz.register_kernel(spec("better.attention", priority=95), unreachable)
        lz.unregister_kernel("best.attention")
        assert lz.select(attention()).kernel_id == "better.attention"
        stop.let_go()
        kernel_id, thread = running.result()
        assert (kernel_id, checked.count(thread)) == ("best.attention", 2)


@pytest.mark.scenario("CS-011")
def test_what_an_old_snapshot_computes_never_reaches_a_new_one(ranking_stop: Stop) -> None:
    with only(BEST, NEXT) as old:
        running = Background(lambda: lz.select(attention()))
        ranking_stop.wait_until_reached()
        new = publish_snapshot()
        assert len(new.live_cache) == 0
        ranking_stop.let_go()
        running.result()
        assert (len(old.live_cache), len(new.live_cache)) == (1, 0)
        assert not lz.select(attention()).cached
        assert lz.select(attention()).cached
        assert new.live_cache.computed.value == 1


@pytest.mark.scenario("CS-012")
def test_health_that_changes_during_a_selection_is_seen_by_the_next_and_costs_a_call_one_retry(
    ranking_stop: Stop,
) -> None:
    def fail(*arguments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the backend is down")

    body = Body(fail)
    with beside_builtin(swiglu_kernel("test.failing", body)):
        running = Background(serve_rightly)  # by the kernel that breaks meanwhile: its caller gets right values
        ranking_stop.wait_until_reached()
        dispatch.health().failed("test.failing", "found out elsewhere")
        assert lz.select(swiglu_context()).kernel_id == "torch.swiglu"
        ranking_stop.let_go()
        running.result()
        assert body.calls == 1
        serve_rightly()
        assert body.calls == 1
        assert refusal("test.failing") == "BROKEN: failed 1 times, last: found out elsewhere"


@pytest.mark.scenario("CS-013")
def test_a_lookup_ends_with_the_table_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path, detect_device("cpu"))
    stop, find = Stop(), Table.find

    def find_and_stop(*arguments: Any) -> Any:
        stop.come_by()
        return find(*arguments)

    context = swiglu_context(1, 32)
    with tables_in_force(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "find", find_and_stop)
        running = Background(lambda: lz.select(context))
        stop.wait_until_reached()
        with tables_in_force(None):
            assert (lz.select(context).source, lz.select(context).table) == ("live", None)
            stop.let_go()
            old = running.result()
        assert (old.source, old.kernel_id) == ("table", "torch.swiglu.in_place")
        assert lz.select(context) == old


@pytest.mark.scenario("CS-014")
def test_a_reader_sees_whole_contests_while_others_append_and_compact(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.append(make_contest(0))
    written = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            for contest in range(1, 60):
                store.append(make_contest(contest))
                if contest % 20 == 0:
                    store.compact()
            written.set()
            return 60
        seen, ended = 0, False
        while not ended:
            ended = written.is_set()
            rows = ResultsStore(tmp_path).read().rows
            contests = len(rows) // 3
            assert rows == rows_of(*range(contests))
            assert contests >= seen
            seen = contests
        return seen

    assert in_threads(work, 4) == [60] * 4


@pytest.mark.scenario("CS-015")
def test_answers_live_as_long_as_their_snapshot_and_no_time_changes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(LiveCache).parameters) == ["max_entries"]
    with only(BEST, NEXT):
        assert not lz.select(attention()).cached
        now = time.monotonic()
        for clock in ("monotonic", "time", "perf_counter"):
            monkeypatch.setattr(time, clock, lambda: now + 1e9)
        assert lz.select(attention()).cached
        monkeypatch.undo()
        publish_snapshot()
        assert not lz.select(attention()).cached


@pytest.mark.scenario("CS-016")
def test_a_log_level_that_changes_during_a_call_holds_at_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("layerzero")

    def fail_with(level: int) -> Any:
        def fail(*arguments: torch.Tensor) -> torch.Tensor:
            logger.setLevel(level)
            raise RuntimeError("on purpose")

        return fail

    caplog.set_level(logging.WARNING, "layerzero")
    with beside_builtin(swiglu_kernel("test.first", fail_with(logging.CRITICAL))):
        in_threads(lambda number: serve_rightly(), 4)
    assert "test.first failed" not in caplog.text
    with beside_builtin(swiglu_kernel("test.second", fail_with(logging.WARNING))):
        assert not logger.isEnabledFor(logging.WARNING)
        serve_rightly()
    assert "test.second failed" in caplog.text

"""CS-027 to CS-032: counters, single flight, a thousand threads, and state that changes a hundred times a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.counters import Counter, CounterGroup
from layerzero_runtime.dispatch import current_snapshot, publish_snapshot
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.live_cache import LiveCache
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import attention, kernel, only, spec, unreachable
from tests.scenarios.failing_kernels import TIMEOUT_S, Background, Stop, count_of, in_threads, serve_rightly

A, B, C = (kernel(f"{name}.attention", priority=priority) for name, priority in (("a", 90), ("b", 80), ("c", 70)))
# Half of the one with half of the other would give c.
ONLY_A, ONLY_B = (
    Policy(denies=(Rule(kernel=f"{denied}.*"),), boosts=(Rule(kernel=f"{boosted}.*", boost=1.0),))
    for denied, boosted in (("b", "a"), ("a", "b"))
)


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """The interpreter changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.scenario("CS-027")
@pytest.mark.usefixtures("hasty_threads")
def test_no_count_is_lost() -> None:
    counter, group = Counter(), CounterGroup()

    def count(number: int) -> None:
        for _ in range(5000):
            counter.raise_by_one()
            group.raise_by_one("one")

    in_threads(count, 16)
    assert (counter.value, dict(group)) == (16 * 5000, {"one": 16 * 5000})


@pytest.mark.scenario("CS-027")
@pytest.mark.usefixtures("hasty_threads")
def test_every_call_is_counted_while_snapshots_change() -> None:
    before = {name: count_of(name) for name in ("calls", "hits", "misses")}

    def work(number: int) -> None:
        for turn in range(40):
            serve_rightly(1 + number, 8)
            if number == 0 and turn % 4 == 0:
                publish_snapshot()

    in_threads(work, 8)
    after = {name: count_of(name) - before[name] for name in before}
    assert after == {"calls": 320, "hits": 0, "misses": 320}


class AskedFor:
    """A key that notes which threads have looked it up."""

    def __init__(self) -> None:
        self._threads: set[int] = set()

    def __hash__(self) -> int:
        self._threads.add(threading.get_ident())
        return 1

    def compute_when_asked_by(self, count: int) -> object:
        deadline = time.monotonic() + TIMEOUT_S
        while len(self._threads) < count:
            assert time.monotonic() < deadline
            time.sleep(0.0001)
        return object()


@pytest.mark.scenario("CS-028")
@pytest.mark.usefixtures("hasty_threads")
def test_of_threads_that_all_come_first_one_computes() -> None:
    def ask_at_once() -> None:
        cache: LiveCache[object] = LiveCache()
        key = AskedFor()
        answers = in_threads(lambda number: cache.get(key, lambda: key.compute_when_asked_by(24)), 24)
        assert cache.computed.value == 1
        assert len({id(answer) for answer, _ in answers}) == 1
        assert sum(not was_there for _, was_there in answers) == 1
        assert cache._computing == {}

    for _ in range(10):
        ask_at_once()


@pytest.mark.scenario("CS-028")
def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    cache: LiveCache[str] = LiveCache()
    stop = Stop()

    def fail() -> str:
        stop.come_by()
        raise ValueError("cannot be computed")

    first = Background(lambda: cache.get("key", fail))
    stop.wait_until_reached()
    others = [Background(lambda: cache.get("key", fail)) for _ in range(8)]
    stop.let_go()
    for thread in (first, *others):
        with pytest.raises(ValueError, match="cannot be computed"):
            thread.result()
    assert (len(cache), cache._computing) == (0, {})
    assert cache.get("key", lambda: "computed after all") == ("computed after all", False)


@pytest.mark.scenario("CS-029")
def test_a_thousand_threads_select_at_once() -> None:
    before = threading.stack_size(256 * 1024)
    try:
        with only(A, B) as snapshot:
            plans = in_threads(lambda number: lz.select(attention(batch_size=1 + number % 4)), 1000)
            assert {plan.kernel_id for plan in plans} == {"a.attention"}
            # Batches of 1, 2 and 3, and 4 lie in three octaves.
            assert snapshot.live_cache.computed.value == 3
            assert snapshot.live_cache.hits.value == 997
    finally:
        threading.stack_size(before)
    assert threading.active_count() < 100


def alternate(then: Callable[[Policy], object], is_over: Callable[[], bool]) -> None:
    """Put the two policies in force in turn, 300 times and on until it is over."""
    deadline = time.monotonic() + TIMEOUT_S
    turn = 0
    while turn < 300 or not is_over():
        assert time.monotonic() < deadline
        policy = (ONLY_A, ONLY_B)[turn % 2]
        lz.set_policy(policy)
        then(policy)
        turn += 1


@pytest.mark.scenario("CS-030")
def test_selections_are_right_while_everything_is_invalidated() -> None:
    """What a snapshot selects never changes, and is what its own policy says."""
    satisfied = Counter()
    with only(A, B, C):

        def work(number: int) -> None:
            if number == 0:
                alternate(lambda policy: publish_snapshot(), lambda: satisfied.value == 7)
                return
            policies: set[str] = set()
            while len(policies) < 2:
                snapshot = current_snapshot()
                plans = [snapshot.select(attention(batch_size=1 + number)) for _ in range(3)]
                expected = "b.attention" if snapshot.policy is ONLY_B else "a.attention"
                assert {plan.kernel_id for plan in plans} == {expected}
                policies.add(expected)
            satisfied.raise_by_one()

        in_threads(work, 8)


@pytest.mark.scenario("CS-031")
def test_each_of_many_policies_holds_whole_and_from_when_it_was_set() -> None:
    satisfied = Counter()

    def check(policy: Policy) -> None:
        assert current_snapshot().policy is policy
        assert lz.select(attention()).kernel_id == ("b.attention" if policy is ONLY_B else "a.attention")

    with only(A, B, C):

        def work(number: int) -> None:
            if number == 0:
                alternate(check, lambda: satisfied.value == 5)
                return
            seen: set[str] = set()
            while len(seen) < 2:
                seen.add(lz.select(attention()).kernel_id)
                assert seen <= {"a.attention", "b.attention"}
            satisfied.raise_by_one()

        in_threads(work, 6)


@pytest.mark.scenario("CS-031")
def test_policies_that_come_while_a_snapshot_is_built_share_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, built, build = Stop(), Counter(), Snapshot

    def stop_and_build(*arguments: Any, **options: Any) -> Any:
        built.raise_by_one()
        stop.come_by()
        return build(*arguments, **options)

    with only(A, B, C):
        monkeypatch.setattr(dispatch, "Snapshot", stop_and_build)
        before = dispatch._requested
        first = Background(lambda: lz.set_policy(ONLY_A))
        stop.wait_until_reached()
        others = [Background(lambda: lz.set_policy(ONLY_B)) for _ in range(50)]
        deadline = time.monotonic() + TIMEOUT_S
        while dispatch._requested < before + 51:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        # Selections go on with the snapshot that is in force.
        assert lz.select(attention()).kernel_id == "a.attention"
        stop.let_go()
        for thread in (first, *others):
            thread.result()
        assert built.value == 2
        assert lz.select(attention()).kernel_id == "b.attention"


@pytest.mark.scenario("CS-032")
def test_kernels_come_and_go_in_many_threads_and_indices_stay_whole() -> None:
    def work(number: int) -> None:
        first, second = (f"{name}.number_{number}" for name in ("first", "second"))
        for _ in range(20):
            lz.register_kernels([(spec(first), unreachable), (spec(second), unreachable)])
            registry = current_snapshot().registry
            assert registry.get(first) is not None
            assert registry.get(second) is not None
            for other in range(8):
                # Registered together, and the first one goes first.
                assert registry.get(f"first.number_{other}") is None or registry.get(f"second.number_{other}")
            listed = {k.kernel_id for k in registry if "attention.full" in k.spec.operations}
            candidates = [k.kernel_id for k in registry.candidates("attention.full")]
            assert sorted(candidates) == sorted(listed)
            lz.unregister_kernel(first)
            lz.unregister_kernel(second)

    in_threads(work, 8)
    assert {k.kernel_id for k in current_snapshot().registry} == {k.kernel_id for k in builtin_kernels()}


@pytest.mark.scenario("CS-032")
def test_of_threads_that_register_one_name_one_succeeds_and_a_batch_is_all_or_nothing() -> None:
    def register(number: int) -> bool:
        try:
            lz.register_kernels([(spec(f"own.number_{number}"), unreachable), (spec("shared.attention"), unreachable)])
        except SpecError as error:
            assert "'shared.attention' is registered twice" in str(error)  # noqa: PT017 - a loser among winners
            return False
        return True

    for _ in range(10):
        successes = in_threads(register, 8)
        assert sum(successes) == 1
        registry = current_snapshot().registry
        assert [registry.get(f"own.number_{number}") is not None for number in range(8)] == successes
        lz.unregister_kernel(f"own.number_{successes.index(True)}")
        lz.unregister_kernel("shared.attention")
        assert registry.get("shared.attention") is not None  # that snapshot does not change any more
        assert len(current_snapshot().registry) == len(builtin_kernels())

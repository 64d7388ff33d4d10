"""The published snapshot, what it is built from, and selection through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CallCounters, CounterGroup, log_warning
from layerzero_runtime.device import detect_device, uses_cuda
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.policies.policy import EMPTY, Policy
from layerzero_runtime.registry import Registry
from layerzero_runtime.serving.health import Health
from layerzero_runtime.serving.prepared import PreparedKernels
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import MAX_ROUTES, Snapshot
from layerzero_runtime.tables.table_set import TableSet

if TYPE_CHECKING:
    from layerzero_runtime.serving.verification import Verification
    from layerzero_runtime.serving.workload_recorder import WorkloadRecorder
    from layerzero_runtime.statistics import Statistics


@dataclass(frozen=True)
class _Sources:
    """What the next snapshot is built from, beside health: immutable, replaced as a whole."""

    registry: Registry
    policy: Policy = EMPTY
    verification: Verification | None = None
    recorder: WorkloadRecorder | None = None
    tables: TableSet | None = None


# Guards `_sources` and `_requested`; held for as long as it takes to replace one value.
_sources_lock = threading.Lock()
# Held while a snapshot is built. Order: this before `_sources_lock`, and neither while user code runs.
_build_lock = threading.Lock()
_counters = CounterGroup()
_calls = CallCounters(MAX_ROUTES)
_prepared = PreparedKernels()
_sources: _Sources | None = None
_requested = _built = 0


def current_snapshot() -> Snapshot:
    """The snapshot in force, built at the first selection."""
    snapshot = PUBLISHED.snapshot
    return _publish(lambda sources: sources, only_if_none=True) if snapshot is None else snapshot


def publish_snapshot() -> Snapshot:
    """Build a snapshot with the tables as they are on disk now, and publish it."""
    return _publish(lambda sources: replace(sources, tables=TableSet(_counters)))


def _publish(change: Callable[[_Sources], _Sources], *, only_if_none: bool = False) -> Snapshot:
    """Change what snapshots are built from, and publish one with the change in it.

    Changes that come in while a snapshot is being built share the next one. Whatever `change` raises leaves everything
    as it was.
    """
    global _sources, _requested, _built
    with _sources_lock:
        before = _sources or _Sources(Registry(builtin_kernels()), tables=TableSet(_counters))
        _sources = change(before)
        _requested += 1
        mine = _requested
    with _build_lock:
        if PUBLISHED.snapshot is not None and (_built >= mine or only_if_none):
            return PUBLISHED.snapshot
        with _sources_lock:
            sources, newest = _sources, _requested
        snapshot = Snapshot(
            sources.registry,
            _counters,
            policy=sources.policy,
            health=_health,
            tables=sources.tables,
            prepared=_prepared,
            calls=_calls,
            verification=sources.verification,
            recorder=sources.recorder,
        )
        PUBLISHED.publish(snapshot)
        _built = newest
        return snapshot


def republish() -> None:
    """Publish a snapshot of the same sources: what health and prepared kernels allow has changed."""
    _publish(lambda sources: sources)


# A breaker that opens or closes makes a new snapshot.
_health = Health(republish)


def health() -> Health:
    """The breakers of this process."""
    return _health


def select(context: SelectionContext) -> ExecutionPlan:
    """The plan for a described call; without a device in the context, for the detected one.

    Raises:
        ContextError: the operation is unknown or a size is missing.
        NoKernelAvailableError: no registered kernel accepts the context.
    """
    return current_snapshot().select(on_a_device(context))


def select_batch(contexts: Iterable[SelectionContext]) -> list[ExecutionPlan]:
    """The plans of several calls, all from one snapshot; equal contexts are selected once.

    Raises:
        ContextError, NoKernelAvailableError: as `select`, for the first context that has no plan.
    """
    snapshot = current_snapshot()
    plans: dict[tuple[SelectionContext, object], ExecutionPlan] = {}
    found = []
    for context in contexts:
        key = (context, context.device)
        if key not in plans:
            plans[key] = snapshot.select(on_a_device(context))
        found.append(plans[key])
    return found


def on_a_device(context: SelectionContext) -> SelectionContext:
    """The context with a device: its own, else the detected one."""
    return context if context.device is not None else context.with_device(detect_device())


def register_kernel(spec: KernelSpec, function: KernelFunction) -> None:
    """Let a function of yours compete. It takes the arguments that the operation's kernels take
    (`Operation.arguments`), and is trusted to work wherever its spec allows a call.

    Raises:
        SpecError: the id is taken, or no operation of the spec exists.
    """
    register_kernels([(spec, function)])


def register_kernels(kernels: Sequence[tuple[KernelSpec, KernelFunction]]) -> None:
    """Register several kernels, all or none.

    Raises:
        SpecError: an id is taken, or no operation of a spec exists.
    """
    for spec, _ in kernels:
        unknown = [name for name in spec.operations if name not in OPERATIONS]
        if unknown:
            raise SpecError(f"{spec.kernel_id}: operation {unknown[0]!r} is unknown, allowed: {', '.join(OPERATIONS)}")
    added = tuple(Kernel(spec, FunctionLoader(function)) for spec, function in kernels)
    _publish(lambda sources: replace(sources, registry=sources.registry.with_kernels(added)))


def unregister_kernel(kernel_id: str) -> None:
    """Take a kernel out. Calls that have selected it already still run it.

    Raises:
        SpecError: no kernel has the id.
    """
    kernel = current_snapshot().registry.get(kernel_id)
    _health.forget(kernel_id)
    _publish(lambda sources: replace(sources, registry=sources.registry.without(kernel_id)))
    if kernel is not None:
        _prepared.forget(kernel)


def set_policy(policy: Policy | str | None) -> None:
    """Put a policy in force: a `Policy`, the path of a YAML file, or None for the empty one.

    A file that is not valid leaves the policy as it was.

    Raises:
        PolicyLoadError: the file cannot be read, or a rule is not valid; says where.
    """
    if policy is None:
        policy = EMPTY
    elif not isinstance(policy, Policy):
        from layerzero_runtime.errors import PolicyLoadError
        from layerzero_runtime.policies.policy_file import load_policy

        try:
            policy = load_policy(policy)
        except PolicyLoadError as error:
            _counters.raise_by_one("policies_refused")
            log_warning(f"{error}; the policy before it stays in force")
            raise
    put = policy
    _publish(lambda sources: replace(sources, policy=put))


def verify_results(every: int | None) -> None:
    """Compare every n-th call of each kernel with the reference in float64; None ends that. For debugging: such calls
    are slow, and all calls are described one by one.

    Raises:
        ContextError: `every` is below 1.
    """
    from layerzero_runtime.serving.verification import Verification

    verification = None if every is None else Verification(every, _counters, _health)
    _publish(lambda sources: replace(sources, verification=verification))


def record_workload(path: str | None, *, hits: bool = False) -> None:
    """Write the shapes of missed calls, and with `hits` those of all calls, to a workload file that
    `layerzero-tune run --workload` takes; None ends that and writes what is left.

    Raises:
        ContextError: the file cannot be written.
    """
    from layerzero_runtime.serving.workload_recorder import WorkloadRecorder

    recorder = None if path is None else WorkloadRecorder(path, records_hits=hits, counters=_counters)
    before: list[WorkloadRecorder | None] = []

    def change(sources: _Sources) -> _Sources:
        before.append(sources.recorder)
        return replace(sources, recorder=recorder)

    _publish(change)
    for ended in filter(None, before):
        ended.close()


def stats() -> Statistics:
    """Counters by name: `calls`, `hits`, `misses`, `intercepted`, `empty`, `fallbacks` and those that were raised, with
    the state of the live cache, which is that of the snapshot in force, the broken kernels and, where CUDA devices are
    in use, the GPUs that run below their clocks for want of power or cooling.

    `stats().prometheus()` gives them in Prometheus' text format.
    """
    from layerzero_runtime.statistics import Statistics

    snapshot = PUBLISHED.snapshot
    calls, misses = _calls.total()
    values: dict[str, int] = {"calls": calls, "hits": calls - misses, "misses": misses}
    values |= {"intercepted": 0, "empty": 0, "fallbacks": 0}
    broken: tuple[str, ...] = ()
    if snapshot is not None:
        values |= {
            "live_cache_hits": snapshot.live_cache.hits.value,
            "live_cache_computed": snapshot.live_cache.computed.value,
            "live_cache_entries": len(snapshot.live_cache),
        }
        broken = tuple(sorted(snapshot.broken))
    throttled: dict[int, tuple[str, ...]] = {}
    if uses_cuda():
        from layerzero_runtime.devices.throttling import throttled_gpus

        throttled = throttled_gpus()
    return Statistics(values | dict(_counters), broken, throttled)


def count(name: str) -> None:
    """Raise a counter of `stats` by one."""
    _counters.raise_by_one(name)

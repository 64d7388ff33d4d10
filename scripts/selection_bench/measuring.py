"""Rows of the benchmark, the clock, the yardstick, and what is put in force while it runs."""

from __future__ import annotations

import gc
import statistics
import threading
import timeit
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from time import perf_counter_ns
from typing import Any

import torch

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.tables.table import MISS, Table, load_table
from layerzero_runtime.tables.table_set import TableSet

REPEATS = 7
H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)


@dataclass(frozen=True)
class Row:
    """What one scenario asks for and what was found.

    Attributes:
        ns: the time that is compared with the yardstick, None where the figure is no time of one selection.
        met: whether the figure is what is asked; None where nothing could be measured.
    """

    scenario: str
    asked: str
    measured: str
    ns: float | None = None
    met: bool | None = True


def per_call_ns(statement: str, names: dict[str, Any], calls: int, repeats: int = REPEATS) -> float:
    """Median time of a statement, the garbage collector off."""
    timer = timeit.Timer(statement, globals=names)
    timer.timeit(max(1, calls // 10))
    return statistics.median(timer.repeat(repeats, calls)) / calls * 1e9


def ratio_of(
    setups: tuple[Callable[[], object], Callable[[], object]], statement: str, names: dict[str, Any], calls: int
) -> float:
    """Time of a statement after the first setup over that after the second; median of interleaved rounds."""
    found = []
    for _ in range(REPEATS):
        times = []
        for setup in setups:
            setup()
            times.append(per_call_ns(statement, names, calls, 1))
        found.append(times[0] / times[1])
    return statistics.median(found)


def each_ns(call: Callable[[], object], calls: int, clock: Callable[[], int] = perf_counter_ns) -> list[int]:
    """The time of every single call, ascending; some 40 ns of each are the clock's."""
    times = []
    for _ in range(calls):
        begin = clock()
        call()
        times.append(clock() - begin)
    return sorted(times)


def lru_hit_ns() -> float:
    """The yardstick: a hit of a plain `lru_cache` with four positional ints that are new objects at every call."""

    @lru_cache(maxsize=1024)
    def cached(a: int, b: int, c: int, d: int) -> int:
        return a

    arguments = [tuple(int(f"{1000 + (number * 7 + place) % 97}") for place in range(4)) for number in range(2000)]
    names = {"cached": cached, "arguments": arguments}
    return per_call_ns("for a, b, c, d in arguments: cached(a, b, c, d)", names, 20) / len(arguments)


def held_bytes(make: Callable[[], object]) -> int:
    """Bytes that what `make` returns holds."""
    make()
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


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run the work in threads that start together."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def calls_per_second(threads: int, call: Callable[[], object], seconds: float) -> float:
    """How often all threads together make the call in a second."""
    made = [0] * threads
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)

    def work(number: int) -> None:
        done = 0
        while not stop.is_set():
            for _ in range(100):
                call()
            done += 100
        made[number] = done

    timer.start()
    begin = perf_counter_ns()
    in_threads(threads, work)
    return sum(made) / (perf_counter_ns() - begin) * 1e9


def attention(**changes: Any) -> SelectionContext:
    """A described call on a device that is not here: a miss."""
    fields: dict[str, Any] = {
        "operation": "attention.full",
        "dtype": "float16",
        "batch_size": 4,
        "seq_len_q": 512,
        "num_heads": 16,
        "head_dim": 64,
        "device": H100,
    }
    return SelectionContext(**(fields | changes))


def kernel(kernel_id: str, **changes: Any) -> Kernel:
    """A kernel of that device; it is selected, never called."""
    fields: dict[str, Any] = {
        "kernel_id": kernel_id,
        "operations": ("attention.full", "attention.cross"),
        "platforms": ("cuda",),
        "dtypes": ("float16",),
        "requires": (),
    }
    return Kernel(KernelSpec(**(fields | changes)), FunctionLoader(lambda *arguments: arguments[0]))


class _StandIn(TableSet):
    """The shipped table as if it had been measured on this machine, so that there are hits to time."""

    def __init__(self, table: Table) -> None:
        super().__init__(dispatch._counters)
        self._table = table

    def of(self, device: DeviceSpec) -> Table | None:
        return self._table if device.platform == self._table.device.platform else None

    def alike(self, device: DeviceSpec) -> tuple[Table, ...]:
        return ()

    def is_stale(self, table: Table, kernel_id: str, kernel: Kernel | None) -> bool:
        return kernel is None


def shipped_table() -> Table:
    package = import_module("layerzero_tables")
    name = min(module.name for module in iter_modules(package.__path__) if module.ispkg)
    return load_table(import_module(f"layerzero_tables.{name}"))


@contextmanager
def in_force(*kernels: Kernel, builtin: bool = True) -> Iterator[None]:
    """These kernels registered, beside the built-in ones or in place of them."""
    registered = (*builtin_kernels(), *kernels) if builtin else kernels
    dispatch._publish(lambda sources: replace(sources, registry=Registry(registered)))
    try:
        yield
    finally:
        dispatch._publish(lambda sources: replace(sources, registry=Registry(builtin_kernels())))


@dataclass(frozen=True)
class Hit:
    """A call that the table answers at a leaf without guards, and where its answer is found."""

    gate: torch.Tensor
    sizes: Sequence[tuple[int, int]]
    context: SelectionContext

    @property
    def route(self) -> Route:
        """That of the snapshot in force."""
        operation = operation_named("mlp.swiglu")
        return dispatch.current_snapshot().route(operation, self.context, {})

    def call(self) -> torch.Tensor:
        return lz.swiglu(self.gate, self.gate)

    @contextmanager
    def without_kernel(self) -> Iterator[None]:
        """Calls give their first argument back: what is left of them is the dispatch."""
        route, sizes = self.route, self.sizes[0]
        leaf = route.decide(*sizes)
        served, route.functions[leaf] = route.functions[leaf], lambda gate, up: gate
        try:
            yield
        finally:
            route.functions[leaf] = served


def table_hit() -> Hit:
    """Put the shipped table in force, and find a call that it answers."""
    table = shipped_table()
    dispatch._publish(lambda sources: replace(sources, tables=_StandIn(table)))
    for key, entry in table.entries["mlp.swiglu"].items():
        if key[0] != "eager" or key[-1]:
            continue
        for rows, width in ((2**i, 2**j) for i in range(12) for j in range(8, 14)):
            leaf = entry.decide(rows, width)
            chain = () if leaf == MISS else entry.leaves[leaf]
            if chain and not chain[0].guards:
                gate = torch.randn(rows, width).to(getattr(torch, key[1]))
                context = SelectionContext.from_tensors("mlp.swiglu", gate, gate)
                return Hit(gate, [(int(f"{rows}"), int(f"{width}")) for _ in range(1000)], context)
    raise LookupError(f"{table.name} answers no call of mlp.swiglu without a guard")

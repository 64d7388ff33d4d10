"""Rows of the benchmark, the calls that it times, and threads that make them."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch
from benchmarking.in_force import put_in_force, shipped_table
from benchmarking.timing import REPEATS, per_call_ns

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelSpec
from layerzero_runtime.operations import operation_named
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.tables.table import MISS

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


@dataclass(frozen=True)
class Hit:
    """A call that the table answers at a leaf without guards, and where its answer is found."""

    gate: torch.Tensor
    sizes: Sequence[tuple[int, int]]
    context: SelectionContext

    @property
    def route(self) -> Route:
        """That of the snapshot in force."""
        return dispatch.current_snapshot().route(operation_named(self.context.operation), self.context, {})

    def call(self) -> torch.Tensor:
        return lz.swiglu(self.gate, self.gate)


def table_hit() -> Hit:
    """Put the shipped table in force, and find a call that it answers."""
    table = shipped_table()
    put_in_force(table)
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

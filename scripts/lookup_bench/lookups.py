"""Lookups: from features or sizes in hand to the function that serves, without the call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from benchmarking.timing import Loop

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from lookup_bench.answered import Contexts
from lookup_bench.row import Row, within
from lookup_bench.stopwatch import Effort, Stopwatch

CALLS = 2048  # of one loop, whose ints keep the caches as busy as the yardstick's
_FEATURES = {"layout": "bhsd", "causal_alignment": "top_left"}


def rows(stopwatch: Stopwatch, answered: Mapping[str, Contexts]) -> Iterator[Row]:
    decode, norm = answered["attention.cross"], answered["norm.rms"]
    yield from _from_features(stopwatch, decode)
    for contexts, names in ((decode, "batch, q, k"), (norm, "rows, width")):
        kernel = bound_to(contexts[0]).kernel
        for how, same in (("repeated", True), ("changing", False)):
            calls = fresh_sizes(contexts, same=same)
            loop = Loop(f"for {names} in calls: kernel({names})", {"kernel": kernel, "calls": calls}, CALLS)
            name = f"bound {contexts[0].operation}.kernel(sizes), {how} sizes"
            yield within(stopwatch.timed(loop), name, "ours", 3, note=f"{len(names.split())} sizes, fresh ints")
    yield _rate(decode, stopwatch.effort)
    yield _select(stopwatch, decode)


def bound_to(context: SelectionContext, *, width: bool = True, **options: Any) -> Any:
    """`bind` for the context's static features; with `width`, of rows the hidden size too."""
    names = ["dtype"]
    if context.operation.startswith("attention"):
        names += ["num_heads", "num_kv_heads", "head_dim"]
    elif width:
        names += ["hidden_size"]
    features = {name: getattr(context, name) for name in names}
    return lz.bind(context.operation, device="cpu", **features, **options)


def fresh_sizes(contexts: Contexts, *, same: bool) -> list[tuple[int, ...]]:
    """Bucketed sizes of CALLS calls, each int an object of its own: of one context, or of all in turn."""
    operation = operation_named(contexts[0].operation)
    sizes = [operation.sizes(context) for context in (contexts[:1] if same else contexts)]
    return [tuple(int(f"{size}") for size in sizes[number % len(sizes)]) for number in range(CALLS)]


def _from_features(stopwatch: Stopwatch, contexts: Contexts) -> Iterator[Row]:
    """Over the routes of several static keys, as a process has them that runs several models."""
    operation, snapshot = operation_named(contexts[0].operation), dispatch.current_snapshot()
    alike = [
        replace(contexts[0], dtype=dtype, head_dim=head_dim, v_head_dim=head_dim, num_heads=8 * group)
        for dtype, head_dim, group in product(("bfloat16", "float32"), (64, 128), (1, 4))
    ]
    routes = {operation.static_key(context): snapshot.route(operation, context, _FEATURES) for context in alike}
    key = operation.static_key(contexts[0])
    assert key in routes, f"{key} is not among {list(routes)}"
    sizes = fresh_sizes(contexts, same=False)
    names: dict[str, Any] = {"routes": routes, "calls": [(key, *each) for each in sizes]}
    find = "route.functions[route.decide(batch, q, k)]"
    loop = Loop(f"for key, batch, q, k in calls: route = routes[key]; {find}", names, CALLS)
    note = f"{len(routes)} static keys; a dict read, the generated function, the list of functions"
    yield within(stopwatch.timed(loop), "lookup, static key in hand and three sizes", "ours", 2, note=note)
    mode, dtype, head_dim, group, unusual = key
    names = {
        "routes": routes,
        "calls": [(dtype, int(f"{head_dim}"), *each) for each in sizes],
        "mode": mode,
        "group": group,
        "unusual": unusual,
    }
    read = "routes[mode, dtype, head_dim, group, unusual]"
    loop = Loop(f"for dtype, head_dim, batch, q, k in calls: route = {read}; {find}", names, CALLS)
    yield within(stopwatch.timed(loop), "lookup, static key built from its features, and three sizes", "ours")


def _rate(contexts: Contexts, effort: Effort) -> Row:
    """One thread for some time on end, the garbage collector on as in any process."""
    kernel, sizes = bound_to(contexts[0]).kernel, fresh_sizes(contexts, same=False)
    found = []
    for _ in range(effort.repeats):
        made, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < effort.rate_s:
            for batch, q, k in sizes:
                kernel(batch, q, k)
            made += CALLS
        found.append(elapsed / made * 1e9)
    ns = statistics.median(found)
    name = f"bound {contexts[0].operation}.kernel(sizes), again and again in one thread"
    note = f"{1e3 / ns:.2f} M/s by the wall clock, garbage collector on"
    return Row(name, "> 1 M/s (< 1,000 ns)", ns, None, min(found), max(found), note, ns < 1000, "ours")


def _select(stopwatch: Stopwatch, contexts: Contexts) -> Row:
    assert all(lz.select(context).source == "table" for context in contexts)
    loop = Loop("for context in calls: select(context)", {"select": lz.select, "calls": contexts}, len(contexts))
    return within(stopwatch.timed(loop), "lz.select(context), a hit", "ours")

"""Calls of bound and of public functions, less the call of the same idle kernel: what dispatch adds to a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from benchmarking.timing import Loop

from lookup_bench.answered import Contexts
from lookup_bench.calls import Calls, alternating, changing, check, repeated
from lookup_bench.lookups import bound_to
from lookup_bench.row import Row, within
from lookup_bench.stopwatch import Stopwatch, Timed

# What a bound function looks at, by operation and options of `bound_to`, and how often the yardstick that may be.
_BOUND: tuple[tuple[str, dict[str, Any], str, float], ...] = (
    ("norm.rms", {}, "hidden_size given: one numel", 3),
    ("norm.rms", {"width": False}, "any width: one shape", 3),
    ("mlp.swiglu", {}, "hidden_size given: one numel", 3),
    ("attention.full", {}, "one shape", 3),
    ("attention.causal", {"equal_lengths": True}, "equal lengths: one shape", 3),
    ("attention.causal", {}, "two shapes", 5),
    ("attention.cross", {}, "two shapes", 5),
)
# Public functions by operation, with bound and goal for shapes that repeat where one is asked.
_PUBLIC: Mapping[str, tuple[str, float | None, float | None]] = {
    "attention.full": ("lz.attention", 16, 12),
    "attention.cross": ("lz.attention, decode step", 16, 12),
    "norm.rms": ("lz.rms_norm", 10, 8),
    "norm.add_rms": ("lz.add_rms_norm", None, None),
    "norm.layer": ("lz.layer_norm", None, None),
    "mlp.swiglu": ("lz.swiglu", None, None),
}
OPERATIONS = tuple(dict.fromkeys((*(operation for operation, *_ in _BOUND), *_PUBLIC)))
# Those of the rows with guards.
GUARDED_OPERATIONS = ("attention.cross", "norm.rms")


def bound_rows(stopwatch: Stopwatch, answered: Mapping[str, Contexts]) -> Iterator[Row]:
    for operation, options, looks_at, most in _BOUND:
        contexts = answered[operation]
        function = bound_to(contexts[0], **options)
        for how, calls in (("repeated", repeated(contexts)), ("changing", changing(contexts))):
            found = _overhead(stopwatch, calls.bound(function), calls)
            name = f"bound {operation}, {looks_at}, {how} shapes"
            yield within(found, name, "ours", most, note=f"over the idle kernel; {calls}")


def public_rows(stopwatch: Stopwatch, answered: Mapping[str, Contexts]) -> Iterator[Row]:
    """Weights are parameters: under `no_grad` they require gradients, with gradients enabled nothing does."""
    for operation, (name, most, goal) in _PUBLIC.items():
        for how, ordered in (("repeated", repeated), ("alternating", alternating)):
            bounds = (most, goal) if how == "repeated" else (None, None)
            for grad, trained in (("no_grad", True), ("gradients enabled", False)):
                calls = ordered(answered[operation], trained=trained)
                with torch.no_grad() if trained else nullcontext():
                    found = _overhead(stopwatch, calls.public(), calls)
                note = f"over the idle kernel; {calls}"
                yield within(found, f"{name}, {grad}, {how} shapes", "ours", bounds[0], goal=bounds[1], note=note)


def guarded_rows(stopwatch: Stopwatch, answered: Mapping[str, Contexts]) -> Iterator[Row]:
    """Where the plan that serves is checked on every call."""
    for operation in GUARDED_OPERATIONS:
        calls = repeated(answered[operation], trained=True)
        with torch.no_grad():
            found = _overhead(stopwatch, calls.public(), calls)
        name = f"{_PUBLIC[operation][0]}, no_grad, repeated shapes, a leaf with a guard"
        yield within(found, name, "ours", note=f"over the idle kernel; {calls}")


def _overhead(stopwatch: Stopwatch, loop: Loop, calls: Calls) -> Timed:
    check(loop, calls)
    return stopwatch.timed(loop, calls.idle())

"""A table as large as a real one of a GPU may become: static keys x buckets, printed by the compiler's own emitter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.limits import Limit
from layerzero_tune.compile.form import Entry, Evidence, Leaf, Split, Step, TableForm, Tree
from layerzero_tune.compile.region import Box, Region

OPERATION = "attention.causal"
KERNELS = ("torch.sdpa.flash_cpu_folded", "torch.sdpa.flash_cpu", "torch.matmul.causal", "torch.sdpa")
# As the shipped table has it: a plan that needs dense rows, and behind it one that takes any.
GUARD = Limit("stride_last_dim", "one_of", (1,))
LARGEST = 65536


def big_table(device: DeviceSpec, keys: int, leaves: int) -> TableForm:
    """The form of a table with `keys` static keys of `leaves` buckets each."""
    operation = operation_named(OPERATION)
    axes = tuple(axis.name for axis in operation.axes)
    features = product(("eager", "graph"), ("bfloat16", "float16", "float32"), (64, 96, 128, 192, 256), (1, 4))
    bounds = ((1, LARGEST),) * len(axes)
    entries = []
    for number, (mode, dtype, head_dim, group) in zip(range(keys), features, strict=False):
        tree = _grown(bounds, leaves, axis=0, numbers=_numbers(number))
        static_key = (mode, dtype, head_dim, group, "bottom_right", ())
        entries.append(Entry(OPERATION, static_key, axes, (0, 1, 2), bounds, LARGEST**2, tree))
    return TableForm(
        device=device.to_dict(),
        provenance={
            "results": "0" * 32,
            "measurements": keys * leaves * len(KERNELS),
            "measured_from": "2026-03-01T10:00:00+00:00",
            "measured_to": "2026-03-01T11:00:00+00:00",
            "versions": {"torch": "2.13.0+cpu"},
        },
        kernels={kernel_id: {"library": "torch", "version": "2.13", "source": "0" * 32} for kernel_id in KERNELS},
        entries=tuple(entries),
    )


def _grown(box: Box, leaves: int, axis: int, numbers: Iterator[int]) -> Tree:
    """A balanced tree that halves the box along one axis after another, each edge off the middle by a little."""
    if leaves == 1:
        return _leaf(box, next(numbers))
    low, high = box[axis]
    edge = (low + high) // 2 + next(numbers) % 7
    parts = [(*box[:axis], part, *box[axis + 1 :]) for part in ((low, edge), (edge + 1, high))]
    following = (axis + 1) % len(box)
    halves = leaves // 2, leaves - leaves // 2
    grown = [_grown(part, half, following, numbers) for part, half in zip(parts, halves, strict=True)]
    return Split((axis,), edge, grown[0], grown[1])


def _leaf(box: Sequence[tuple[int, int]], number: int) -> Leaf:
    first = Step((KERNELS[number % 3], "{}"), (GUARD,) if number % 3 < 2 else ())
    chain = (first, Step((KERNELS[3], "{}"))) if first.guards else (first,)
    evidence = Evidence((tuple(low for low, _ in box),), 1.1, 1.05, KERNELS[3], 0.1, 20, "2026-03-01T10:30:00+00:00")
    return Leaf(Region(tuple(box), tuple(range(len(box)))), chain, evidence)


def _numbers(seed: int) -> Iterator[int]:
    """Numbers that repeat after no less than 2^31 - 2 (Park and Miller's generator)."""
    state = seed + 1
    while True:
        state = state * 48271 % 2147483647
        yield state

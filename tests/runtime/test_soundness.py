"""Contracts 1 to 3 on a generated table: hits are legal, every entry is reached, and nothing is clamped."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operation import Operation, Sizes
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.serving.published import PUBLISHED
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.compile.form import Entry, Leaf, TableForm
from tests.runtime.conftest import forget
from tests.runtime.public_calls import PublicCall, public_calls
from tests.runtime.synthetic_table import REGIONS

Tables = tuple[Path, TableForm]


class Watched:
    """A loader whose functions note the kernel's id when they are called."""

    def __init__(self, kernel: Kernel, used: list[str]) -> None:
        self._kernel, self._used = kernel, used
        # Where the source is looked for.
        self.__code__ = kernel.load.__code__

    def __call__(self, context: SelectionContext, configuration: Configuration) -> KernelFunction:
        function = self._kernel.load(context, configuration)

        def watched(*arguments: Any) -> Any:
            self._used.append(self._kernel.kernel_id)
            return function(*arguments)

        return watched


@pytest.fixture
def used() -> list[str]:
    """Ids of the kernels that were called, in order."""
    return []


@pytest.fixture
def watched_snapshot(shared_snapshot: Snapshot, used: list[str]) -> Iterator[Snapshot]:
    registry = Registry(replace(kernel, load=Watched(kernel, used)) for kernel in builtin_kernels())
    before = PUBLISHED.snapshot
    snapshot = Snapshot(registry, CounterGroup())
    PUBLISHED.publish(snapshot)
    yield snapshot
    PUBLISHED.publish(before)


FUNCTIONS = ("attention", "rms_norm", "add_rms_norm", "layer_norm", "swiglu", "geglu")


def test_random_calls_get_legal_kernels_and_right_results(watched_snapshot: Snapshot, used: list[str]) -> None:
    """The kernel that ran is the one that `select` names for the described call, on the slow and on the fast path."""
    seen: Counter[tuple[str, str]] = Counter()

    @settings(max_examples=250, deadline=None)
    @given(public_calls())
    def check(call: PublicCall) -> None:
        context = call.context
        plan = watched_snapshot.select(context)
        used.clear()
        outputs = [call.run(), call.run()]
        assert used == [plan.kernel_id] * 2
        kernel = watched_snapshot.registry.get(plan.kernel_id)
        assert kernel is not None
        assert rejections(kernel.spec.limits, context) == ()
        for output in outputs:
            call.assert_right(output)
        seen[plan.source, plan.kernel_id] += 1

    check()
    # What was checked was not misses alone, nor one kernel.
    assert sum(count for (source, _), count in seen.items() if source == "table") >= 30
    assert len({kernel_id for source, kernel_id in seen if source == "table"}) >= 6


def context_of(entry: Entry) -> SelectionContext:
    """A context with the features that the entry's key names, and sizes that mean nothing."""
    operation = operation_named(entry.operation)
    mode, dtype, *values, unusual = entry.static_key
    assert unusual == ()
    features = dict(zip(operation.static, values, strict=True))
    if "gqa_group" not in features:
        return SelectionContext(operation=operation.name, dtype=dtype, mode=mode, rows=1, hidden_size=1, **features)
    geometry = features.pop("causal_geometry", None)
    alignment = {} if geometry in (None, "square") else {"causal_alignment": geometry}
    cross = bool(alignment) or operation.name == "attention.cross"
    sizes = {"batch_size": 1, "num_kv_heads": 1, "num_heads": features.pop("gqa_group"), "seq_len_q": 1}
    return SelectionContext(
        operation=operation.name, dtype=dtype, mode=mode, seq_len_k=1 + cross, **sizes, **alignment, **features
    )


def legal_sizes(entry: Entry, leaf: Leaf) -> list[Sizes]:
    """The leaf's corners and middle that calls with the entry's key may have."""
    ranges = [
        sorted({low, (low + high) // 2, high}) for axis, (low, high) in enumerate(leaf.region.box) if axis in entry.free
    ]
    found = []
    for free in itertools.product(*ranges):
        sizes = tuple(free) if len(free) == len(entry.axes) else (*free, free[-1])
        equal_lengths = entry.free[-1] == 2 and sizes[1] == sizes[2]
        if (
            not equal_lengths
            and leaf.region.holds(sizes)
            and (entry.max_product is None or math.prod(free) <= entry.max_product)
        ):
            found.append(sizes)
    return found


def leaves_taken(snapshot: Snapshot, call: PublicCall) -> tuple[object, object]:
    """What the public function takes at its first call and at its second, and on which path. No kernel runs."""
    route = snapshot.route(call.operation, call.context, call.features)
    count = len(route.functions)
    route.functions[:] = [lambda *arguments, leaf=leaf: ("slow", leaf) for leaf in (*range(count - 1), -1)]
    slow = call.run()
    functions = [lambda *arguments, leaf=leaf: ("fast", leaf) for leaf in (*range(count - 1), -1)]
    marked: Any = SimpleNamespace(count_call=route.count_call, decide=route.decide, functions=functions)
    replaced = {id(route): marked, id(route.functions): functions}
    for name in FUNCTIONS:
        kinds = tuple(tuple(replaced.get(id(part), part) for part in kind) for kind in getattr(snapshot.seen, name))
        setattr(snapshot.seen, name, kinds)
    return slow, call.run()


def call_of(operation: Operation, context: SelectionContext) -> PublicCall:
    tensors = {
        tensor.name: torch.zeros(tensor.shape(context), dtype=getattr(torch, tensor.dtype(context)))
        for tensor in operation.present_tensors(context)
    }
    features: dict[str, Any] = {}
    if operation.name.startswith("attention"):
        features = {"layout": context.layout, "causal_alignment": context.causal_alignment}
    elif operation.name == "mlp.geglu":
        features = {"approximate": context.approximate}
    return PublicCall(operation, operation.arguments(context, tensors), features)


def test_every_key_and_every_leaf_is_reached_from_a_call(synthetic_tables: Tables, shared_snapshot: Snapshot) -> None:
    entries = synthetic_tables[1].entries
    assert len(entries) == len(REGIONS)
    for entry in entries:
        operation = operation_named(entry.operation)
        for leaf_number, leaf in enumerate(entry.leaves()):
            candidates = legal_sizes(entry, leaf)
            assert candidates, f"no call reaches leaf {leaf.region} of {entry.operation} {entry.static_key}"
            for sizes in candidates:
                call = call_of(operation, operation.with_sizes(context_of(entry), sizes))
                context = call.context
                assert operation.static_key(context) == entry.static_key
                assert operation.sizes(context) == sizes
                plan = shared_snapshot.select(context)
                expected = (entry.static_key, leaf_number) if leaf.chain else None
                assert plan.entry == expected
                taken = leaf_number if leaf.chain else -1
                forget(shared_snapshot.seen)
                # Of all calls that may hit, a layer norm without a bias alone is described at every call.
                second = "slow" if operation.name == "norm.layer" and not context.has_bias else "fast"
                assert leaves_taken(shared_snapshot, call) == (("slow", taken), (second, taken))


def in_range() -> list[SelectionContext]:
    """For each region a context in the middle of what was measured."""
    device = detect_device("cpu")
    middles = []
    for region in REGIONS:
        cells = sorted(sizes for sizes, _ in region.cells())
        operation = operation_named(region.operation)
        middles.append(operation.with_sizes(region.context, cells[len(cells) // 2]).with_device(device))
    return middles


@pytest.mark.parametrize("context", in_range(), ids=lambda context: f"{context.operation}-{context.dtype}")
def test_features_that_were_not_measured_miss(context: SelectionContext, shared_snapshot: Snapshot) -> None:
    assert shared_snapshot.select(context).source == "table"
    changes: list[dict[str, Any]] = [{"mode": "graph"}, {"requires_grad": True}, {"requires_deterministic": True}]
    changes.append({"dtype": "float16", "weight_dtype": "float16"})
    if context.operation.startswith("attention"):
        changes += [{"attn_mask": "bool"}, {"attn_mask": "float"}, {"dropout_p": 0.1}, {"scale": 0.3}]
        changes += [{"layout": "bshd"}, {"v_head_dim": 8}, {"head_dim": 17, "v_head_dim": 17}, {"num_heads": 7}]
    if context.operation.startswith("norm"):
        changes += [{"weight_dtype": "float64"}, {"has_weight": False}]
    if context.operation == "norm.rms":
        changes += [{"offset": 0.5}]
    for change in changes:
        plan = shared_snapshot.select(replace(context, **change))
        assert (plan.source, plan.entry) == ("live", None), change
        assert plan.miss_reason is not None
        assert plan.miss_reason.startswith("not measured: "), change


def test_outside_the_measured_range_is_a_miss(synthetic_tables: Tables, shared_snapshot: Snapshot) -> None:
    device = detect_device("cpu")
    corners = 0
    for entry in synthetic_tables[1].entries:
        operation = operation_named(entry.operation)
        base = context_of(entry).with_device(device)
        middle = [(low + high) // 2 for low, high in entry.bounds]
        outside = []
        for axis in entry.free:
            low, high = entry.bounds[axis]
            for size in (low - 1, high + 1, 1000 * high):
                sizes = [*middle[:axis], size, *middle[axis + 1 :]]
                outside += [sizes if 2 in entry.free or len(sizes) < 3 else [*sizes[:2], sizes[1]]]
        if entry.max_product is not None:
            corners += 1
            outside.append([high for _, high in entry.bounds])
        for chosen in outside:
            if min(chosen) < 1:
                continue
            plan = shared_snapshot.select(operation.with_sizes(base, tuple(chosen)))
            assert plan.source == "live"
            assert plan.miss_reason is not None
            assert plan.miss_reason.startswith("outside the measured range: "), (entry.operation, chosen)
    assert corners >= 3


def test_guards_read_the_call(shared_snapshot: Snapshot) -> None:
    """A leaf whose first plan needs contiguous tensors, or a last stride of 1, gives the one behind it otherwise."""
    guarded = 0
    for context in in_range():
        plan = shared_snapshot.select(context)
        strided = replace(context, is_contiguous=False, stride_last_dim=2)
        other = shared_snapshot.select(strided)
        kernel = shared_snapshot.registry.get(plan.kernel_id)
        assert kernel is not None
        assert other.entry == plan.entry
        if rejections(kernel.spec.limits, strided):
            guarded += 1
            assert other.kernel_id == operation_named(context.operation).default_kernel
        else:
            assert other == plan
    assert guarded >= 3


def test_a_fast_path_does_not_take_calls_of_another_kind(shared_snapshot: Snapshot) -> None:
    """A call that hits, then the same with one feature that was not measured: it must be a miss at once."""
    x, weight, query = torch.randn(8, 128), torch.randn(128), torch.randn(1, 2, 16, 16)
    half = weight.bfloat16()
    pairs: tuple[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]], ...] = (
        (lz.rms_norm, (x.bfloat16(), half), (x.bfloat16(), weight)),
        (lz.rms_norm, (x, weight), (x, None)),
        (lz.add_rms_norm, (x, x, weight), (x, x, weight.double())),
        (lz.layer_norm, (x, weight, weight), (x, weight.double(), weight.double())),
        (lz.attention, (query, query, query), (query, query, query[..., :8])),
        (lz.attention, (query, query, query), (query, query, query, torch.ones(16, 16).bool())),
        (lz.attention, (query, query, query), (query, query, query, None, 0.5)),
        (lz.attention, (query, query, query), (query, query, query, None, 0.0, False, 0.5)),
    )
    for function, hit, other in pairs:
        for arguments, misses in ((hit, 0), (hit, 0), (other, 1), (hit, 0), (other, 1)):
            before = lz.stats()["misses"]
            try:
                function(*arguments)
            except RuntimeError:
                assert other is arguments  # torch does not take every mixture of dtypes
            assert lz.stats()["misses"] == before + misses, (function.__name__, misses)

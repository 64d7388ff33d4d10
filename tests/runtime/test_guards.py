"""Calls that must not be served as one that was seen before: each differs from it in one thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerzero_runtime as lz
from layerzero_runtime.calls import attention as attention_module
from layerzero_runtime.calls import guards
from layerzero_runtime.calls import mlp as mlp_module
from layerzero_runtime.calls import norm as norm_module
from layerzero_runtime.dispatch import publish_snapshot
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.serving.seen_calls import MAX_SEEN, REPEATS, SeenCalls
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.call_examples import CALLS, qkv, rows
from tests.runtime.conftest import forget
from tests.runtime.kernel_calls import is_floating
from tests.runtime.public_calls import PublicCall

# Of all calls of the table, those without a weight or bias, and those in the other layout, are described every time.
SERVED_BY_THEMSELVES = [
    call for call in CALLS if None not in call.arguments[:3] and call.features.get("layout", "bhsd") == "bhsd"
]
ATTENTION = [call for call in SERVED_BY_THEMSELVES if call.operation.name.startswith("attention")]


def name_of(call: PublicCall) -> str:
    return "-".join([call.operation.name, *(str(tuple(a.shape)) for a in call.arguments if is_floating(a))])


each_kind = pytest.mark.parametrize("call", SERVED_BY_THEMSELVES, ids=name_of)
each_attention = pytest.mark.parametrize("call", ATTENTION, ids=name_of)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations whose calls were described, in order."""
    found: list[str] = []
    for module in (attention_module, mlp_module, norm_module):

        def noted(snapshot: Any, operation: Any, *rest: Any, serve: Any = module.serve, **options: Any) -> Any:
            found.append(operation.name)
            return serve(snapshot, operation, *rest, **options)

        monkeypatch.setattr(module, "serve", noted)
    return found


@pytest.fixture
def nothing_seen(shared_snapshot: Snapshot) -> Snapshot:
    forget(shared_snapshot.seen)
    return shared_snapshot


@pytest.fixture(params=["torchs_guards", "torchs_guards_repeated", "written_out"])
def seen_before(
    request: pytest.FixtureRequest, nothing_seen: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> Callable[[PublicCall], None]:
    """Make a call often enough: attention has another guard for calls that repeat in all their sizes."""
    if request.param == "written_out":
        monkeypatch.setattr(guards, "_native_guards", lambda: None)
    times = REPEATS + 4 if request.param.endswith("repeated") else 2

    def repeat(call: PublicCall) -> None:
        for _ in range(times):
            call.run()

    return repeat


def assert_described(call: PublicCall, other: Callable[[], object], described: list[str]) -> None:
    """The call is served by itself, `other` is described, and the call is served by itself again."""
    described.clear()
    call.run()
    assert described == []
    other()
    assert described == [call.operation.name]
    call.run()
    assert described == [call.operation.name]


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function mode": Functions,
    "dispatch mode": Operators,
    "default device": lambda: torch.device("cpu"),
    "deterministic": deterministic,
    "forward mode": forward_ad.dual_level,
}


@each_kind
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_surroundings_are_seen(
    surrounding: str, call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]
) -> None:
    if surrounding == "dispatch mode" and call.context.causal_mask == "bottom_right":
        pytest.skip("torch cannot make a CausalBias under a dispatch mode")
    seen_before(call)

    def other() -> None:
        with SURROUNDINGS[surrounding]():
            call.run()

    assert_described(call, other, described)


@each_kind
def test_vmap_is_seen(call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]) -> None:
    seen_before(call)
    first, *rest = call.arguments
    stacked = torch.stack([first, first])
    assert_described(call, lambda: torch.vmap(lambda one: call.on(one, *rest).run())(stacked), described)


class Marked(torch.Tensor):
    """A subclass."""


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "subclass": lambda tensor: tensor.as_subclass(Marked),
    "subclass of Parameter": lambda tensor: type("Own", (torch.nn.Parameter,), {})(tensor, requires_grad=False),
    "dtype": lambda tensor: tensor.double(),
    "device": lambda tensor: tensor.to("meta"),
    "gradients": lambda tensor: tensor.detach().requires_grad_(),
    "layout": lambda tensor: tensor.to_sparse(),
    "negated view": lambda tensor: torch._neg_view(tensor),
    "dimensions": lambda tensor: tensor[0],
    "last size": lambda tensor: tensor[..., :-1],
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_one_tensor_is_seen(
    change: str, call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]
) -> None:
    """Whether torch then takes the call or refuses it."""
    seen_before(call)
    for place, argument in enumerate(call.arguments):
        if not is_floating(argument):
            continue
        arguments = list(call.arguments)
        arguments[place] = CHANGES[change](argument)
        described.clear()
        try:
            outputs = call.on(*arguments).run()
        except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError):
            continue  # refused while it was being described
        assert described == [call.operation.name], place
        if change == "gradients":
            assert outputs[0].requires_grad
            described.clear()
            with torch.no_grad():
                call.on(*arguments).run()
            assert len(described) <= 1
    described.clear()
    call.run()
    assert described == []


ARGUMENTS: dict[str, dict[str, Any]] = {
    "mask": {"attn_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)},
    "dropout": {"dropout_p": 0.5},
    "scale": {"scale": 0.3},
    "layout": {"layout": "bshd"},
    "quantised": {"quant_format": "int8"},
    "other alignment": {},
    "not causal": {},
}


@each_attention
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_attention_are_seen(
    name: str, call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]
) -> None:
    seen_before(call)
    options: dict[str, Any] = {
        "is_causal": call.operation.name == "attention.causal",
        "enable_gqa": True,
        "causal_alignment": call.features["causal_alignment"],
    }
    if name == "not causal":
        if not options["is_causal"]:
            pytest.skip("it is not causal")
        options["is_causal"] = False
    elif name == "other alignment":
        options["causal_alignment"] = "bottom_right" if options["causal_alignment"] == "top_left" else "top_left"
    if name == "mask":
        options["is_causal"] = False
    described.clear()
    parts = call.arguments[:3]
    before = dict(lz.stats())
    try:
        lz.attention(*parts, **(options | ARGUMENTS[name]))
    except (ValueError, lz.NoKernelAvailableError):
        assert name in ("layout", "quantised")  # heads and lengths do not fit, or no kernel computes it
    else:
        assert len(described) == 1
    if name in ("mask", "dropout", "scale"):
        assert lz.stats()["misses"] == before["misses"] + 1
        lz.attention(*parts, **(options | ARGUMENTS[name]))
        assert len(described) == 2  # nor is it ever kept
    described.clear()
    call.run()
    assert described == []


@each_attention
def test_the_usual_scale_is_no_feature_however_it_is_written(
    call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]
) -> None:
    *parts, _ = call.arguments
    for scale in (0.25, None, 0.25):  # 1/sqrt(16)
        given = call.on(*parts, scale)
        seen_before(given)
        described.clear()
        call.assert_right(given.run())
        assert described == []


def test_each_float_next_to_the_usual_scale_is_kept_once(nothing_seen: Snapshot, described: list[str]) -> None:
    query, key, value = (torch.randn(1, 2, 8, 49) for _ in range(3))
    scales = {49**-0.5, 1 / 49**0.5, math.nextafter(1 / 7, 1.0)}
    assert len(scales) >= 2
    for scale in (*scales, None) * 2:
        lz.attention(query, key, value, scale=scale)
    assert len(described) == len(scales)


@each_attention
def test_lengths_that_become_equal_or_unequal_are_seen(
    call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]
) -> None:
    seen_before(call)
    query, key, value, *rest = call.arguments
    if query.shape[2] == key.shape[2]:
        other = (query[:, :, :-1], key, value)
    else:
        other = (query, key[:, :, : query.shape[2]], value[:, :, : query.shape[2]])
    name = call.operation.name if call.operation.name == "attention.causal" else "attention.cross"
    if query.shape[2] != key.shape[2] and name == "attention.cross":
        name = "attention.full"
    features = {"causal_alignment": call.features["causal_alignment"]}
    changed = PublicCall(OPERATIONS[name], (*other, *rest), features)
    described.clear()
    changed.assert_right(changed.run())
    assert described == [name]


@each_attention
def test_values_of_another_width_or_length_are_seen(
    call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str], nothing_seen: Snapshot
) -> None:
    seen_before(call)
    query, key, value, *rest = call.arguments
    narrow = call.on(query, key, value[..., :8], *rest)
    for _ in range(3):  # nor is it ever kept
        described.clear()
        narrow.assert_right(narrow.run())
        assert described == [call.operation.name]
    assert len(nothing_seen.seen.attention) == 1
    described.clear()
    with pytest.raises(ValueError, match="shapes do not fit together"):
        call.on(query, key, value[:, :, :-1], *rest).run()
    with pytest.raises(ValueError, match="shapes do not fit together"):
        call.on(query[:1], key, value, *rest).run()


def test_heads_in_groups_are_seen_where_they_are_not_allowed(
    seen_before: Callable[[PublicCall], None], described: list[str]
) -> None:
    call = PublicCall(OPERATIONS["attention.cross"], (*qkv(6, 32), None, 0.0, None), {})
    seen_before(call)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        lz.attention(*call.arguments[:3])


@each_kind
def test_strides_that_a_leaf_refuses_are_seen(
    call: PublicCall, seen_before: Callable[[PublicCall], None], nothing_seen: Snapshot
) -> None:
    """A guard does not compare strides: the leaf's own guards do, at every call."""
    seen_before(call)
    spread = [
        torch.stack([argument, argument], dim=-1)[..., 0] if is_floating(argument) else argument
        for argument in call.arguments
    ]
    strided = call.on(*spread)
    assert not strided.context.is_contiguous
    seen_before(strided)
    plan = nothing_seen.select(strided.context)
    kernel = nothing_seen.registry.get(plan.kernel_id)
    assert kernel is not None
    assert not any(limit.reject(strided.context) for limit in kernel.spec.limits)
    strided.assert_right(strided.run())
    call.assert_right(call.run())


@each_kind
def test_sizes_may_change(call: PublicCall, seen_before: Callable[[PublicCall], None], described: list[str]) -> None:
    """The first ones, batches or rows: the call is served by itself. Empty calls are not."""
    seen_before(call)

    def shortened(count: int) -> PublicCall:
        return call.on(*(a[:count] if is_floating(a) and a.dim() > 1 else a for a in call.arguments))

    for count in (1, 2, 1):
        described.clear()
        shortened(count).assert_right(shortened(count).run())
        assert described == []
    assert shortened(0).run()[0].numel() == 0
    assert described == [call.operation.name]


def test_rows_of_different_shapes_are_refused(seen_before: Callable[[PublicCall], None], described: list[str]) -> None:
    x, weight = rows(2, 3, 128), rows(128)
    for operation, rest in (("mlp.swiglu", ()), ("norm.add_rms", (weight, 1e-6))):
        call = PublicCall(OPERATIONS[operation], (x, rows(2, 3, 128), *rest))
        seen_before(call)
        described.clear()
        with pytest.raises(ValueError, match="shapes differ"):
            call.on(x, rows(3, 2, 128), *rest).run()
        assert described == [operation]


def test_numbers_and_names_among_the_arguments_are_seen(nothing_seen: Snapshot, described: list[str]) -> None:
    x, weight = rows(), rows(128)
    for function, arguments, other in (
        (lz.rms_norm, (x, weight, 1e-6, 0.0), (x, weight, 1e-6, 1.0)),
        (lz.geglu, (x, rows(), "none"), (x, rows(), "tanh")),
    ):
        for _ in range(2):
            function(*arguments)
        described.clear()
        torch.testing.assert_close(function(*other), function(*other))
        assert len(described) == 1  # each is a kind of its own
        function(*arguments)
        assert len(described) == 1


def test_a_tensor_that_is_passed_twice_is_served_by_itself(nothing_seen: Snapshot, described: list[str]) -> None:
    x = torch.randn(1, 2, 8, 16)
    for _ in range(2):
        described.clear()
        lz.attention(x, x, x)
        lz.swiglu(x, x)
    assert described == []


def test_kinds_are_bounded(nothing_seen: Snapshot, described: list[str]) -> None:
    for width in range(8, 8 * (MAX_SEEN + 4), 8):
        lz.rms_norm(torch.randn(2, width), torch.randn(width))
    assert len(nothing_seen.seen.rms_norm) == MAX_SEEN
    described.clear()
    lz.rms_norm(torch.randn(3, width), torch.randn(width))
    assert described == []


def test_each_way_of_recording_has_a_kind_of_its_own(nothing_seen: Snapshot, described: list[str]) -> None:
    """Inference mode, no_grad and gradients enabled but not needed are served by themselves, in turn."""
    x, weight = rows(), torch.nn.Parameter(rows(128), requires_grad=False)
    modes: tuple[Callable[[], Any], ...] = (torch.inference_mode, torch.no_grad, nullcontext)
    for mode in modes * 2:
        with mode():
            lz.rms_norm(x, weight)
    described.clear()
    for mode in modes:
        with mode():
            lz.rms_norm(x, weight)
    assert described == []


def test_a_torch_without_the_guards_is_counted_and_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gullible:
        """Accepts everything."""

        def __init__(self, *tensors: object, **options: object) -> None:
            self.check = lambda *given: True

    before = dict(lz.stats()).get("written_out_guards", 0)
    guards._native_guards.cache_clear()
    monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", Gullible)
    try:
        x = torch.randn(2, 3)
        check = guards.tensor_guard((x,), [[None, 3]])
        assert check(torch.randn(4, 3))
        assert check(torch.randn(3, 4).t())
        assert not check(torch.randn(4, 4))
        check = guards.tensor_guard((x,), [[None, 3]], same_strides=True)
        assert check(torch.randn(4, 3))
        assert not check(torch.randn(3, 2).t())
        guards.tensor_guard((x,), [[None, 3]])
    finally:
        guards._native_guards.cache_clear()
    assert lz.stats()["written_out_guards"] == before + 1
    assert caplog.text.count("has no TensorGuards of the known kind (it accepts tensors that differ)") == 1


def test_what_was_seen_belongs_to_its_snapshot(snapshot: Snapshot, described: list[str]) -> None:
    x, weight = rows(), rows(128)
    lz.rms_norm(x, weight)
    assert isinstance(snapshot.seen, SeenCalls)
    assert len(snapshot.seen.rms_norm) == 1
    publish_snapshot()
    described.clear()
    lz.rms_norm(x, weight)
    assert described == ["norm.rms"]

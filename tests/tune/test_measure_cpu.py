"""Contests on the CPU with real kernels: every status, the structure of the times, the order of plain winners."""

from __future__ import annotations

import gc
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from time import sleep
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.transforms import apply_transforms
from layerzero_tune.measure import contest_run, full_speed
from layerzero_tune.measure.clock import Rotation, WallClock, take_sample, time_calls, warm_up
from layerzero_tune.measure.contest import ContestOutcome, MeasurementPolicy
from layerzero_tune.measure.contest_run import measure_contest
from layerzero_tune.measure.failures import SpoiledProcessError
from layerzero_tune.measure.inputs import MAX_BYTES, MAX_SETS, RandomTensors, rotating_inputs
from layerzero_tune.measure.screening import finalists
from tests.tune import torture_kernels as torture
from tests.tune.contests import ATTENTION, BRIEF, RMS, contest

# Neighbours make a fast kernel's call look as long as one that sleeps.
pytestmark = pytest.mark.alone

KERNELS = {kernel.kernel_id: kernel for kernel in torture.KERNELS}


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine's cores may stay slowed down through all of these contests; no test here depends on that."""
    monkeypatch.setattr(full_speed, "PATIENCE_S", 0.5)


def measure(*names: str, **changes: Any) -> ContestOutcome:
    return measure_contest(contest(*(f"torture.{name}" for name in names), **changes), KERNELS)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("inaccurate", "wrong", r"relative error 1\.0\de-02 above \d\.\d\de-07"),
        ("other_shape", "wrong", r"output 0 has shape \(31, 64\), required \(32, 64\)"),
        ("other_dtype", "wrong", "output 0 has dtype float64, required float32"),
        ("nan_at_the_end", "wrong", "output 0 is NaN or infinite in 1 of 2048 values checked"),
        ("in_place", "wrote_to_inputs", "writes to its input x"),
        ("two_outputs", "wrong", "gives 2 outputs, required 1"),
        ("no_tensor", "wrong", "output 0 is a float, required a tensor"),
        ("raises", "failed", "RuntimeError: tile size 48 is not supported"),
        ("cannot_load", "compile_failed", "RuntimeError: ptxas: unknown target"),
        ("cannot_compile", "compile_failed", "RuntimeError: tile size 48 is not supported"),
        ("wrong_at_every_tenth", "flaky", r"right at first, wrong later: relative error 1\.00e-01 above .*"),
        ("gpu_only", "refused", r"PLATFORM_NOT_ONE_OF: platform is 'cpu'.*'cuda'.*"),
        ("narrow", "refused", "HIDDEN_SIZE_NOT_AT_MOST: hidden_size is 64, required <= 16"),
        ("attention", "refused", "computes attention.full, attention.cross, not norm.rms"),
        ("unheard_of", "unavailable", "no kernel 'torture.unheard_of' is registered"),
    ],
)
def test_each_failure_is_a_recorded_status_and_the_others_are_measured(name: str, status: str, message: str) -> None:
    default, failed, other = measure("right", name, "right_too").outcomes
    assert failed.status == status
    assert re.fullmatch(message, failed.message)
    assert failed.screen_ns is None
    assert failed.samples_ns == ()
    for outcome in (default, other):
        assert outcome.status == "ok"
        assert outcome.message == ""
        assert outcome.screen_ns is not None
        assert outcome.screen_ns > 0
        assert outcome.relative_error is not None
        assert outcome.tolerance is not None
        assert outcome.relative_error <= outcome.tolerance
    assert len(default.samples_ns) == BRIEF.rounds
    assert all(time > 0 for time in default.samples_ns)


def test_a_kernel_without_its_library_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing_requirement.cache_clear()
    try:
        default, missing = measure("right", "needs_compiler").outcomes
    finally:
        missing_requirement.cache_clear()
    assert default.status == "ok"
    assert missing.status == "unavailable"
    assert "no-such-compiler" in missing.message


def test_out_of_memory_is_told_from_other_failures() -> None:
    outcome = measure("right", "out_of_memory").outcomes[1]
    assert outcome.status == "out_of_memory"
    assert "memory" in outcome.message


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("leaks", "out_of_memory", r"its calls kept \d+ MiB, allowed 64 MiB: it leaks memory"),
        ("loses_device", "device_error", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_kernel_that_spoils_the_process_ends_the_contest(name: str, status: str, message: str) -> None:
    three = contest("torture.right", f"torture.{name}", "torture.right_too")
    default, spoils, other = three.candidates
    # An anchor is called in all rounds: by its time alone what leaks may be out before it has kept too much.
    candidates = (default, replace(spoils, is_anchor=True), other)
    with pytest.raises(SpoiledProcessError) as spoiled:
        measure_contest(replace(three, candidates=candidates), KERNELS)
    torture.kept.clear()
    assert spoiled.value.candidate == 1
    assert spoiled.value.outcome.status == status
    assert re.fullmatch(message, spoiled.value.outcome.message)


def test_what_a_kernel_keeps_for_each_input_is_no_leak() -> None:
    copies: dict[int, torch.Tensor] = {}

    def caching(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        copies.setdefault(x.data_ptr(), x.clone())
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight + offset, eps)

    kernel = torture.kernel("caching", caching)
    large = replace(RMS, rows=1024, hidden_size=1024)
    outcome = measure_contest(
        contest("torture.caching", context=large, policy=replace(BRIEF, warmup_ms=300.0, cache_bytes=1 << 28)),
        {kernel.kernel_id: kernel},
    )
    assert sum(copy.numel() * 4 for copy in copies.values()) > 1 << 26
    assert outcome.outcomes[0].status == "ok"


def test_inputs_that_do_not_fit_into_memory_cost_the_contest_and_not_the_run() -> None:
    enormous = replace(RMS, rows=1 << 30, hidden_size=1 << 20)
    refused, *others = measure("narrow", "right", "right_too", context=enormous).outcomes
    assert refused.status == "refused"
    assert {outcome.status for outcome in others} == {"out_of_memory"}


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4, 10, 20])
def test_a_kernel_that_fails_later_is_taken_out_wherever_it_was(failing_call: int) -> None:
    flaky = torture.kernel("flaky", torture.fails_at_call(failing_call))
    kernels = {**KERNELS, flaky.kernel_id: flaky}
    policy = replace(BRIEF, warmup_ms=0.0, screen_ms=0.01, round_ms=0.01, screen_margin=1e9, rounds=16)
    default, failed = measure_contest(contest("torture.right", "torture.flaky", policy=policy), kernels).outcomes
    assert (failed.status, failed.samples_ns) == ("failed", ())
    assert failed.message == f"ValueError: call {failing_call}"
    assert len(default.samples_ns) == policy.rounds


def test_a_default_that_fails_leaves_the_others_a_yardstick() -> None:
    failed, wrong, right = measure("raises", "inaccurate", "right").outcomes
    assert [failed.status, right.status, wrong.status] == ["failed", "ok", "wrong"]
    assert right.samples_ns


def test_the_order_of_plain_differences_is_found_and_losers_are_screened_out() -> None:
    default, loser, winner = measure("slow", "ten_times_slower", "right").outcomes
    assert loser.screen_ns is not None
    assert default.screen_ns is not None
    assert winner.screen_ns is not None
    assert loser.screen_ns > 3 * default.screen_ns > 3 * winner.screen_ns
    assert max(winner.samples_ns) < min(default.samples_ns)
    assert loser.samples_ns == ()


def test_a_hopeless_candidate_is_not_screened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy neighbour would have the contest timed again, with the same steps once more.
    monkeypatch.setattr(contest_run, "MAX_ATTEMPTS", 1)
    steps: list[tuple[int | None, str]] = []
    names = ("torture.right", "torture.slow", "torture.right_too")
    jobs = measure_contest(contest(*names), KERNELS, progress=lambda *step: steps.append(step)).outcomes
    expected = ["load", "first call", "prepare", "warm-up", "verification"]
    assert [name for index, name in steps if index == 1] == expected
    assert [name for index, name in steps if index == 2].count("screening") >= 2
    assert jobs[1].screen_ns is not None
    assert jobs[1].screen_ns > 3e6


def test_a_hopeless_candidate_is_not_taken_into_the_final_rounds_for_the_noise_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The screening times lie so far apart that none of them rules out anything."""
    monkeypatch.setattr(contest_run, "finalists", lambda screened, margin: frozenset(screened))
    default, hopeless, other = measure("right", "ten_times_slower", "right_too").outcomes
    assert len(default.samples_ns) == len(other.samples_ns) == BRIEF.rounds
    assert hopeless.samples_ns == ()
    assert hopeless.screen_ns is not None


@pytest.mark.parametrize(("is_anchor", "rounds"), [(False, 0), (True, 4)])
def test_an_anchor_reaches_the_final_rounds(is_anchor: bool, rounds: int) -> None:
    """Both take milliseconds, which a busy machine changes less than a kernel's microseconds."""
    pair = contest("torture.slow", "torture.ten_times_slower")
    candidates = (pair.candidates[0], replace(pair.candidates[1], is_anchor=is_anchor))
    outcome = measure_contest(replace(pair, candidates=candidates), KERNELS)
    assert [len(job.samples_ns) for job in outcome.outcomes] == [4, rounds]


def test_a_candidate_over_the_longest_call_keeps_its_screening_time_alone() -> None:
    policy = replace(BRIEF, max_call_ms=15.0, screen_margin=1e9)
    default, slow = measure("right", "ten_times_slower", policy=policy).outcomes
    assert len(default.samples_ns) == policy.rounds
    assert slow.status == "ok"
    assert slow.screen_ns is not None
    assert slow.screen_ns > 30e6
    assert slow.samples_ns == ()


def test_a_default_over_the_longest_call_leaves_screening_times_to_all() -> None:
    outcome = measure("ten_times_slower", "right", policy=replace(BRIEF, max_call_ms=15.0))
    for job in outcome.outcomes:
        assert job.screen_ns is not None
        assert job.samples_ns == ()


def test_outcomes_known_before_are_kept_and_their_kernels_not_touched() -> None:
    known = measure("right", "raises").outcomes[1]
    deadly = contest("torture.right", "torture.killed")
    assert measure_contest(deadly, KERNELS, settled={1: known}).outcomes[1] == known


def test_steps_are_reported_before_they_are_taken() -> None:
    steps: list[tuple[int | None, str]] = []
    measure_contest(contest("torture.right", "torture.raises"), KERNELS, progress=lambda *step: steps.append(step))
    assert steps[0] == (None, "reference")
    assert (1, "load") in steps
    assert [name for index, name in steps if index == 1] == ["load", "first call"]
    own = [name for index, name in steps if index == 0]
    assert own[:2] == ["load", "first call"]
    rounds = dict.fromkeys(name for name in own if name.startswith("round"))  # one may be taken again: a busy machine
    assert list(rounds) == ["round 1", "round 2", "round 3", "round 4"]
    assert own[-2:] == ["verification", "verification"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "graph"}, "CPUs have 'eager' only"),
        ({"dropout_p": 0.5}, "dropout_p is 0.5"),
        ({"requires_grad": True}, "requires_grad is True"),
        ({"attn_mask": "bool"}, "attn_mask is 'bool'"),
        ({"is_contiguous": False}, "is_contiguous is False"),
        ({"dtype": "int8", "weight_dtype": "int8"}, "dtype is 'int8'"),
        ({"rows": None}, "norm.rms needs rows"),
        ({"operation": "norm.unknown"}, "norm.unknown"),
    ],
)
def test_points_that_cannot_be_measured_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContextError, match=re.escape(message)):
        measure("right", context=replace(RMS, **changes))


@pytest.mark.parametrize("name", ["attention", "attention_contiguous"])
@pytest.mark.parametrize(("operation", "length_k"), [("attention.full", 24), ("attention.cross", 25)])
def test_a_kernel_of_the_other_layout_is_reached_through_a_transpose(name: str, operation: str, length_k: int) -> None:
    context = replace(ATTENTION, layout="bshd", operation=operation, seq_len_k=length_k)
    outcome = measure(name, context=context).outcomes[0]
    assert outcome.status == "ok", outcome.message
    assert len(outcome.samples_ns) == BRIEF.rounds


def test_adapted_layouts_copy_only_where_contiguity_is_required() -> None:
    seen: list[torch.Tensor] = []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.extend((query, key, value))
        return query

    tensors = [torch.randn(2, 24, heads, 16) for heads in (4, 2, 2)]
    other = replace(ATTENTION, layout="bshd")
    output = apply_transforms(spy, torture.ATTENTION.spec, other)(*tensors, None)
    assert output.data_ptr() == tensors[0].data_ptr()
    assert output.shape == tensors[0].shape
    apply_transforms(spy, torture.ATTENTION_CONTIGUOUS.spec, other)(*tensors, None)
    assert all(tensor.is_contiguous() for tensor in seen[3:])
    for given_, view, copy in zip(tensors, seen[:3], seen[3:], strict=True):
        assert torch.equal(view.transpose(1, 2), given_)
        assert torch.equal(copy.transpose(1, 2), given_)
    for context in (ATTENTION, RMS):
        assert apply_transforms(spy, torture.ATTENTION.spec, context) is spy


def test_inputs_are_normal_and_the_same_for_the_same_seed() -> None:
    context = replace(RMS, rows=4096, hidden_size=512, dtype="bfloat16")
    operation = operation_named("norm.rms")
    first, again, other = (RandomTensors("cpu", seed).draw(operation, context) for seed in (1, 1, 2))
    x, weight = first["x"].float(), first["weight"].float()
    assert first["x"].dtype == torch.bfloat16
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1.0) < 0.01
    assert abs(float(weight.mean()) - 1.0) < 0.05
    assert abs(float(weight.std()) - 0.1) < 0.02
    assert torch.equal(first["x"], again["x"])
    assert len(torch.unique(x, dim=0)) == 4096
    assert not torch.equal(first["x"].sort().values[0], other["x"].sort().values[0])
    source = RandomTensors("cpu", 1)
    draws = [source.draw(operation, replace(context, dtype="float32", rows=2))["x"] for _ in range(2)]
    assert not torch.equal(*draws)
    other_pool = RandomTensors("cpu", 2).draw(operation, replace(context, dtype="float32"))["x"]
    assert float(torch.isin(draws[0], other_pool).float().mean()) < 0.5


@pytest.mark.parametrize(
    ("rows", "cache_bytes", "count"), [(32, 1 << 18, 32), (32, 1 << 30, MAX_SETS), (4096, 1 << 10, 2)]
)
def test_inputs_rotate_through_enough_sets_to_outgrow_the_cache(rows: int, cache_bytes: int, count: int) -> None:
    context = replace(RMS, rows=rows)
    policy = MeasurementPolicy(cache_bytes=cache_bytes)
    sets = rotating_inputs(operation_named("norm.rms"), context, policy, RandomTensors("cpu", 0))
    assert len(sets) == count
    assert len({arguments[0].data_ptr() for arguments in sets}) == count
    in_all = sum(tensor.numel() * 4 for arguments in sets for tensor in arguments[:2])
    assert in_all > min(cache_bytes, MAX_SETS * in_all // count - 1)
    assert in_all <= MAX_BYTES


@given(st.lists(st.integers(1, 9), max_size=8))
def test_rotation_goes_on_where_it_stopped(takes: list[int]) -> None:
    rotation = Rotation([(0,), (1,), (2,)])
    taken = [arguments[0] for calls in takes for arguments in rotation.take(calls)]
    assert taken == [position % 3 for position in range(sum(takes))]


def test_the_clock_counts_calls_and_restores_the_garbage_collector() -> None:
    seen: list[tuple[int, bool]] = []

    def function(number: int) -> None:
        seen.append((number, gc.isenabled()))

    rotation = Rotation([(0,), (1,)])
    assert time_calls(function, rotation.take(3)) > 0
    assert seen == [(0, False), (1, False), (0, False)]
    timed = WallClock().timed(function, rotation)
    take_sample(timed, call_ns=1000.0, duration_ms=0.007)
    assert len(seen) == 3 + 10  # seven calls fill 7 us; five blocks of two
    take_sample(timed, call_ns=1e9, duration_ms=0.1)
    assert len(seen) == 14
    assert warm_up(timed, 0.0) > 0
    assert len(seen) == 15
    assert gc.isenabled()


def test_a_first_call_that_stalls_is_not_what_the_warm_up_says() -> None:
    called: list[int] = []

    def timed(calls: int) -> float:
        called.append(calls)
        if len(called) > 1:
            return 1e3
        sleep(0.021)
        return 21e6

    assert warm_up(timed, 20.0) == 1e3
    assert called[:3] == [1, 1, 1]


def test_calls_that_take_many_times_the_warm_up_are_made_once() -> None:
    called: list[int] = []

    def timed(calls: int) -> float:
        called.append(calls)
        sleep(0.011)
        return 11e6

    assert warm_up(timed, 1.0) == 11e6
    assert called == [1]


def test_screening_keeps_ties_and_drops_plain_losers() -> None:
    quiet = {0: [100.0, 100.1, 99.9], 1: [102.0, 102.1, 102.0], 2: [104.0, 104.1, 103.9]}
    assert finalists(quiet, margin=0.03) == {0, 1}
    noisy = {0: [100.0, 110.0, 90.0], 1: [102.0, 90.0, 113.0], 2: [104.0, 95.0, 114.0], 3: [900.0, 1000.0, 800.0]}
    assert finalists(noisy, margin=0.03) == {0, 1, 2}
    assert finalists({5: [7.0]}, margin=0.0) == {5}
    assert finalists({}, margin=0.03) == frozenset()


@given(
    st.dictionaries(st.integers(0, 9), st.lists(st.floats(1.0, 1e9), min_size=1, max_size=5), min_size=1, max_size=6),
    st.floats(0.0, 1.0),
)
@settings(max_examples=50)
def test_screening_keeps_the_best(screened: dict[int, list[float]], margin: float) -> None:
    kept = finalists(screened, margin)
    assert kept <= set(screened)
    assert min(screened, key=lambda index: statistics.median(map(math.log, screened[index]))) in kept


def test_contests_run_without_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[bool] = []

    def body(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        states.append(torch.is_inference_mode_enabled())
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight + offset, eps)

    watched: Kernel = torture.kernel("watched", body)
    outcome = measure_contest(contest("torture.watched"), {"torture.watched": watched})
    assert outcome.outcomes[0].status == "ok"
    assert states
    assert all(states)


def test_the_context_given_to_a_kernel_has_the_device() -> None:
    devices: list[object] = []

    def load(context: SelectionContext, configuration: object) -> Callable[..., Any]:
        devices.append(context.platform)
        return torture.RIGHT.load(context, {})

    kernel = replace(torture.RIGHT, load=load)
    measure_contest(contest("torture.right"), {"torture.right": kernel})
    assert devices == ["cpu"]

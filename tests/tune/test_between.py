"""Points between measured ones: halfway at round sizes, and where the winners change."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.search.between import points_between, roundest
from tests.tune.synthetic_landscapes import beyond
from tests.tune.synthetic_results import ALL_KERNELS, Times, contest_rows, cross, full, norm


def _twos(number: int) -> int:
    return number & -number


@given(
    exact=st.floats(1.0, 1e6),
    reach=st.floats(1.0, 4.0),
    multiple=st.sampled_from([1, 2, 3, 64, 96, 128]),
)
def test_of_the_multiples_within_reach_the_one_with_most_factors_of_two_is_taken(
    exact: float, reach: float, multiple: int
) -> None:
    within = [
        count
        for count in range(math.floor(exact / reach / multiple), math.ceil(exact * reach / multiple) + 1)
        if count and exact / reach * 1.0001 <= count * multiple <= exact * reach / 1.0001
    ]
    size = roundest(exact, reach, multiple)
    assert size % multiple == 0
    if within:
        assert exact / reach * 0.999 <= size <= exact * reach * 1.001
        assert _twos(size // multiple) >= max(map(_twos, within))
    if reach == 1.0:
        assert abs(size - exact) <= multiple / 2 + 1e-3


@pytest.mark.parametrize(
    ("exact", "reach", "multiple", "size"),
    [(940, 1.11, 128, 1024), (1810, 1.19, 128, 2048), (3970, 1.25, 512, 4096), (385, 1.22, 1, 384), (37, 1.0, 1, 37)],
)
def test_widths_between_those_of_known_models(exact: int, reach: float, multiple: int, size: int) -> None:
    assert roundest(exact, reach, multiple) == size


def _between(contexts: Sequence[SelectionContext], times: Sequence[Times]) -> dict[Sizes, bool]:
    """The points between these measured ones, and which of them are edges."""
    rows = [row for context, found in zip(contexts, times, strict=True) for row in contest_rows(context, found)]
    (model,) = compile_rows(rows, ALL_KERNELS).models.values()
    operation = operation_named(contexts[0].operation)
    return {point.sizes: point.is_edge for point in points_between(operation, model)}


@pytest.mark.parametrize(("gain", "is_edge"), [(1.0, False), (0.5, True)])
def test_widths_are_round_whoever_wins_around_them(gain: float, is_edge: bool) -> None:
    contexts = [norm(64, width) for width in (768, 1152, 2176)]
    times = [{"torch.rms_norm": 1e6, "synthetic.lean": 1e6 * change} for change in (1.0 / gain, gain, gain)]
    assert _between(contexts, times) == {(64, 1024): is_edge, (64, 1536): False}


def test_lengths_halfway_are_round() -> None:
    contexts = [full(16, length) for length in (701, 2900)]
    assert _between(contexts, [{"torch.sdpa": 1e6, "synthetic.fused": 8e5}] * 2) == {(16, 1024): False}


def test_lengths_at_which_times_cross_are_exact() -> None:
    contexts = [full(16, length) for length in (701, 2900)]
    times = [{"torch.sdpa": 1e6, "synthetic.fused": 1e6 * beyond(1100, context.seq_len_q)} for context in contexts]
    ((sizes, is_edge),) = _between(contexts, times).items()
    assert is_edge
    assert sizes[0] == 16
    assert abs(sizes[1] - 1100) < 3


@pytest.mark.parametrize("crossing", [3300, 3700])
def test_an_edge_near_a_round_width_is_still_looked_for_between(crossing: int) -> None:
    contexts = [norm(64, width) for width in (1024, 1152, 4096)]
    times = [
        {"torch.rms_norm": 1e6, "synthetic.lean": 1e6 * beyond(crossing, context.hidden_size)} for context in contexts
    ]
    assert _between(contexts, times) == {(64, 3072): True}


def test_a_point_is_not_rounded_to_what_is_no_call_of_the_operation() -> None:
    """Cross attention has unequal lengths."""
    contexts = [cross(16, 149, 357), cross(16, 2600, 2809)]
    ((_, queries, keys),) = _between(contexts, [{"torch.sdpa": 1e6, "synthetic.fused": 8e5}] * 2)
    assert queries != keys
    assert (queries, keys) == (622, 1001)


def test_a_point_is_not_rounded_to_a_measured_one() -> None:
    contexts = [full(16, length) for length in (700, 1024, 1501)]
    contexts += [full(17, 1024)]
    assert (16, 1024) not in _between(contexts, [{"torch.sdpa": 1e6, "synthetic.fused": 8e5}] * 4)

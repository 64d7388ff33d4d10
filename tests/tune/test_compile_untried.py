"""Configurations at cells where they were not tried: no better than their kernel there, the less the further away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from layerzero_tune.compile.arrays import Floats
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.untried import with_untried
from layerzero_tune.results.measurement import Measurement
from tests.tune.synthetic_results import ALL_KERNELS, compiled, configured, contest_rows, norm, served, table_of

DEFAULT, TUNED, PLAIN = "torch.rms_norm", "synthetic.lean", "synthetic.wide"


def _contest(rows: int, times: Mapping[str, float], configurations: Mapping[int, float]) -> list[Measurement]:
    """A contest of kernels, and of further configurations of the tuned one."""
    made = contest_rows(norm(rows), times)
    shipped = next(row for row in made if row.kernel_id == TUNED)
    return [*made, *configured(shipped, configurations)]


def test_a_configuration_that_was_searched_for_at_large_sizes_does_not_serve_small_ones() -> None:
    """At few cells, all large, a search found one that takes half of the kernel's shipped one; at small ones, where it
    has no time, another kernel is faster than the shipped one."""
    large = {1 << power: power % 2 == 0 for power in range(10, 17)}
    rows = [row for power in range(10) for row in _contest(1 << power, {DEFAULT: 1e3, PLAIN: 8e2, TUNED: 9.5e2}, {})]
    for size, searched in large.items():
        rows += _contest(size, {DEFAULT: 1e3, PLAIN: 9.9e2, TUNED: 8e2}, {64: 4e2} if searched else {})
    table = table_of(compiled(rows))
    assert [served(table, norm(size)) for size in (3, 24, 100)] == [PLAIN] * 3
    assert [served(table, norm(size)) for size in (1 << 12, 6000, 1 << 14)] == [TUNED] * 3


def test_a_configuration_is_compared_with_one_that_was_tried_where_it_was() -> None:
    """The kernel's shipped one has the most times, none of them beside it; another one shows what the kernel takes at
    small sizes, and at one of them the configuration is fast."""
    large = [row for power in range(11, 21) for row in _contest(1 << power, {DEFAULT: 1e3, TUNED: 1.1e3}, {})]
    small = [
        row if row.configuration or row.kernel_id != TUNED else replace(row, configuration={"block": 8})
        for power in range(9)
        for row in _contest(1 << power, {DEFAULT: 1e3, TUNED: 1.2e3}, {64: 4e2} if power == 8 else {})
    ]
    (model,) = compile_rows([*large, *small], ALL_KERNELS).models.values()
    assert model.best((256, 1024)) == (TUNED, '{"block":64}')
    assert model.best((1, 1024)) == (DEFAULT, "{}")


def _even(distances: Floats) -> Floats:
    shares: Floats = np.maximum(1.0 - distances / (1.5 * distances.max(axis=0) + 1e-9), 0.0)
    return shares


RATIOS = st.one_of(st.just(math.nan), st.floats(-2.0, 2.0))


@given(st.lists(st.tuples(RATIOS, RATIOS), min_size=1, max_size=9))
def test_what_is_known_stays_and_what_its_kernel_does_not_tell_stays_unknown(pairs: list[tuple[float, float]]) -> None:
    own, base = (np.array(ratios) for ratios in zip(*pairs, strict=True))
    places = np.arange(len(pairs), dtype=float)[:, None]
    filled = with_untried(own, base, places, _even)
    known = ~np.isnan(own)
    assert np.array_equal(filled[known], own[known])
    assert np.isnan(filled[~known & np.isnan(base)]).all()
    if not np.isnan(own + base).all():
        assert not np.isnan(filled[~known & ~np.isnan(base)]).any()


def test_a_gain_fades_with_distance_into_a_loss() -> None:
    own, base = np.array([-0.5, *[math.nan] * 4]), np.zeros(5)
    filled = with_untried(own, base, np.array([[0.0], [0.1], [1.0], [4.0], [12.0]]), _even)
    assert filled[1] < -0.4
    assert list(filled) == sorted(filled)
    assert filled[-1] > 0.5

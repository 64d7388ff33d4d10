"""Waves of tiles over the multiprocessors of a GPU, and what models expect with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.foreseen import foreseen_sizes
from layerzero_tune.compile.judge import Choice, Standing, Verdict
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.compile.waves import Waves
from layerzero_tune.search.key_regret import KeyRegret
from tests.tune.synthetic_results import ALL_KERNELS, contest_rows

GPU = DeviceSpec(platform="cuda", name="GPU", compute_capability=(9, 0), multiprocessors=132)
FULL = operation_named("attention.full")
DEFAULT: Choice = ("torch.sdpa", "{}")
OTHER: Choice = ("flash_attn_4.forward", "{}")


def call(batch_kv_heads: int, length: int, group: int = 1) -> tuple[SelectionContext, tuple[int, int]]:
    context = SelectionContext(
        operation="attention.full",
        dtype="bfloat16",
        batch_size=batch_kv_heads,
        num_heads=group,
        num_kv_heads=1,
        seq_len_q=length,
        seq_len_k=length,
        head_dim=64,
    )
    return context, (batch_kv_heads, length)


def waves() -> Waves:
    found = Waves.of(FULL, GPU)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("batch_kv_heads", "length", "group", "expected"),
    [
        (7, 100, 1, (0.0, 0.0)),  # less than one wave
        (132, 128, 1, (0.0, 0.0)),  # a whole one
        (133, 128, 1, (math.log2(264 / 133), math.log2(264 / 133))),
        (66, 256, 1, (0.0, 0.0)),  # 2 tiles of either height
        (44, 512, 1, (math.log2(264 / 176), 0.0)),  # 4 tiles of 128 rows, 3 of 192
        (33, 128, 4, (0.0, 0.0)),
        (34, 128, 4, (math.log2(264 / 136), math.log2(264 / 136))),
    ],
)
def test_what_the_last_wave_leaves_idle(
    batch_kv_heads: int, length: int, group: int, expected: tuple[float, float]
) -> None:
    (found,) = waves().idle([call(batch_kv_heads, length, group)]).tolist()
    assert found == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 100_000), st.integers(1, 200_000), st.integers(1, 16))
def test_a_call_never_takes_twice_as_long_as_in_full_waves(batch_kv_heads: int, length: int, group: int) -> None:
    idle = waves().idle([call(batch_kv_heads, length, group)])
    assert idle.shape == (1, 2)
    assert (idle >= 0.0).all()
    assert (idle < 1.0).all()


@pytest.mark.parametrize(("own", "other"), [(8, 1), (1, 8), (4, 4), (5, 7)])
def test_calls_of_a_key_beside_have_their_own_heads(own: int, other: int) -> None:
    context, sizes = call(17, 128, own)
    beside = waves().idle_beside([(context, sizes, math.log2(other / own))])
    assert beside.tolist() == waves().idle([call(17, 128, other)]).tolist()


def test_compiled_models_and_those_of_a_tuning_know_the_device() -> None:
    context, sizes = call(4, 1024)
    rows = [
        replace(row, device=GPU.to_dict()) for row in contest_rows(context, {DEFAULT[0]: 1e6, "synthetic.fused": 2e6})
    ]
    (model,) = compile_rows(rows, ALL_KERNELS).models.values()
    assert model.waves == waves()
    regret = KeyRegret(FULL, (0, 1), {sizes: 1.0}, Waves.of(FULL, GPU))
    regret.learn(sizes, rows)
    regret.renew()
    assert regret.model is not None
    assert regret.model.waves == waves()


def test_no_calls_leave_nothing_idle() -> None:
    assert waves().idle([]).shape == (0, 2)


def test_calls_that_are_not_cut_into_tiles_and_devices_of_unknown_width_have_no_waves() -> None:
    assert Waves.of(operation_named("norm.rms"), GPU) is None
    assert Waves.of(FULL, replace(GPU, multiprocessors=None)) is None


def verdict(batch_kv_heads: int, length: int) -> Verdict:
    """A default of tiles of 128 rows, and another kernel of 192 that takes 1.4 times as long for each."""
    context, sizes = call(batch_kv_heads, length)
    low, high = (-(-batch_kv_heads * -(-length // rows) // 132) for rows in (128, 192))
    ratio = math.log(1.4 * high / low)
    standings = {DEFAULT: Standing(0.0, 0.0, 0.0, 10), OTHER: Standing(ratio, ratio - 0.005, ratio + 0.005, 10)}
    best = min(standings, key=lambda choice: standings[choice].log_ratio)
    one = frozenset({best})
    return Verdict(context, sizes, standings, DEFAULT, DEFAULT, best, one, one, 1000.0, "2026-03-01T00:00:00+00:00")


# Of 1,024 rows: 8 tiles of 128, 6 of 192.
MEASURED = (12, 15, 18, 20, 24, 30, 36, 39, 42, 52, 60, 75, 84, 96)


def model(waves: Waves | None) -> RegretModel:
    verdicts = tuple(verdict(heads, length) for heads in MEASURED for length in (900, 1024))
    return RegretModel(verdicts, (0, 1), (), waves)


def error(waves: Waves | None) -> float:
    """Of what is expected between the measured sizes, on average."""
    between = [heads for heads in range(12, 97) if heads not in MEASURED]
    estimates = [(model(waves).estimate(OTHER, (heads, 1024)), verdict(heads, 1024)) for heads in between]
    errors = [abs(found.log_ratio - true.standings[OTHER].log_ratio) for found, true in estimates if found is not None]
    assert len(errors) == len(between)
    return math.fsum(errors) / len(errors)


def test_waves_that_begin_between_measured_sizes_are_foreseen() -> None:
    assert error(waves()) < 0.6 * error(None)


def test_sizes_around_calls_that_fill_their_tiles_fill_theirs() -> None:
    """Calls of encoders have the lengths of their models: what a mask costs on rows that fill no tile is not theirs."""
    cells, bounds = [(64, 1024), (31, 4096), (57, 1001), (29, 3503)], ((16, 128), (500, 8000))

    def found(tiles: Mapping[int, int]) -> tuple[int, int]:
        served = foreseen_sizes(cells, (), (0, 1), bounds, None, tiles).served
        return sum(length % 128 == 0 for _, length in served), len(served)

    assert found(waves().tiles)[0] > 300
    filling, count = found({})
    assert filling < 0.03 * count

"""What a choice is taken to lose at the places of a tree's ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.ground import Ground
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.compile.waves import Waves
from tests.tune.test_compile_growth import DEFAULT, LEAN, WIDE, verdict_at
from tests.tune.test_compile_waves import FULL, GPU, call


def serving(choices: Sequence[Choice], places: Sequence[Sizes]) -> Sequence[Sequence[Choice | None]]:
    return [list(choices) for _ in places]


def passes(choice: Choice, context: SelectionContext) -> bool:
    return True


def test_what_is_expected_to_be_slower_than_the_default_loses_of_its_doubt_too() -> None:
    ratios = {32: -0.30, 64: -0.25, 128: 0.20, 181: -0.40, 256: 0.12, 512: 0.30, 1024: 0.35}
    verdicts = tuple(verdict_at((rows, 1024), {LEAN: ratio}) for rows, ratio in ratios.items())
    model = RegretModel(verdicts, (0,))
    between: tuple[Sizes, ...] = tuple((rows, 1024) for rows in (45, 90, 150, 360, 700))
    ground = Ground.of(model, verdicts, [DEFAULT, LEAN], between, serving, passes)
    losses = ground.losses[len(verdicts) :] * len(ground.losses)
    cases = set()
    for sizes, (of_default, of_lean) in zip(between, losses.tolist(), strict=True):
        found = model.estimate(LEAN, sizes)
        assert found is not None
        cases.add((found.log_ratio > 0.0, found.upper < 0.0))
        if found.log_ratio > 0.0:
            assert (of_default, of_lean) == pytest.approx((0.0, found.log_ratio + 0.25 * found.doubt))
        else:
            assert of_lean == pytest.approx(0.0)
            assert of_default == pytest.approx(-found.log_ratio if found.upper < 0.0 else 0.0)
    assert cases == {(True, False), (False, False), (False, True)}
    assert not np.isnan(ground.losses).any()


def test_a_choice_that_turns_calls_away_is_judged_with_what_serves_them() -> None:
    """`lean` takes every other cell's calls and `wide` all of them: a chain of both gains more than either alone or
    than `lean` before the default."""
    ratios = {32: -0.3, 64: -0.3, 128: -0.3, 256: -0.3}
    cells = [
        verdict_at((rows, 1024), {LEAN: ratio, WIDE: -0.1} if number % 2 else {WIDE: -0.1})
        for number, (rows, ratio) in enumerate(ratios.items())
    ]
    model = RegretModel(tuple(cells), (0,))

    def only_odd(choice: Choice, context: SelectionContext) -> bool:
        return choice != LEAN or context.rows in (64, 256)

    ground = Ground.of(model, cells, [DEFAULT, LEAN, WIDE], ((90, 1024),), serving, only_odd)
    _, column = ground.cheapest(np.arange(len(ground.sizes)))
    assert ground.chain(column) == (LEAN, WIDE)
    alone = {ground.chain(each): loss for loss, each in ground.ranking(np.arange(len(ground.sizes)))}
    assert set(alone) == {(DEFAULT,), (WIDE,), (LEAN, DEFAULT), (LEAN, WIDE)}
    assert alone[LEAN, WIDE] == 0.0 < alone[WIDE,]


@pytest.mark.parametrize(("device", "times"), [(GPU, 1 + 15), (replace(GPU, multiprocessors=None), 1)])
def test_what_is_measured_to_be_slower_than_the_default_loses_more_than_it_takes(
    device: DeviceSpec, times: int
) -> None:
    """Of calls in waves; half of what contests say, and nothing of what is expected."""
    cells = [
        replace(verdict_at((1, 1), {LEAN: ratio}), context=call(heads, 128)[0], sizes=(heads, 128))
        for heads, ratio in {20: -0.3, 24: 0.05, 28: 0.01}.items()
    ]
    model = RegretModel(tuple(cells), (0,), waves=Waves.of(FULL, device))
    ground = Ground.of(model, cells, [DEFAULT, LEAN], (), serving, passes)
    losses = ground.losses[:, 1] * len(ground.losses)
    assert losses[1] == pytest.approx(0.5 * times * 0.05)
    assert 0.5 * 0.01 <= losses[2] < 0.5 * 16 * 0.01

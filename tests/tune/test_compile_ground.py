"""What a choice is taken to lose at the places of a tree's ground."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.ground import Ground
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.regret import RegretModel
from tests.tune.test_compile_growth import DEFAULT, LEAN, verdict_at


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

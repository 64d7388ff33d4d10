"""Leaves whose plans depend on strides: the step that serves is the one that the limits allow, however it is found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.serving.stride_guards import guarded_by_strides
from layerzero_runtime.tensors import FIELD_READERS
from tests.runtime.kernel_calls import PLACEMENTS, tensor

CONTIGUOUS, UNIT_STRIDE = Limit("is_contiguous", "one_of", (True,)), Limit("stride_last_dim", "one_of", (1,))
STRIDED = Limit("stride_last_dim", "at_least", 2)
GUARDS = ((CONTIGUOUS,), (UNIT_STRIDE,), (CONTIGUOUS, UNIT_STRIDE), (STRIDED,), ())


CHAINS = [
    (*steps, last)
    for count in (1, 2)
    for steps in itertools.product(GUARDS[:4], repeat=count)
    for last in ((), (CONTIGUOUS,))
]


@pytest.mark.parametrize("shape", [(4, 8), (4, 1), (1, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_step_that_the_tensors_pass_serves(count: int, shape: tuple[int, ...]) -> None:
    mask = torch.ones(4, 4).t()[::2]  # none of the tensors that are asked
    for placements in itertools.product(sorted(set(PLACEMENTS)), repeat=count):
        tensors = [tensor(shape, "float32", placement) for placement in placements]
        for chain in CHAINS:
            for rest in ((), (mask, 1e-6)):
                check(chain, tensors, rest)


def check(chain: Sequence[tuple[Limit, ...]], tensors: Sequence[torch.Tensor], rest: tuple[Any, ...]) -> None:

    def named(name: object) -> Any:
        return lambda *arguments: (name, arguments)

    function = guarded_by_strides(
        [(guards, named(place)) for place, guards in enumerate(chain)], named("otherwise"), len(tensors)
    )

    def passes(guards: tuple[Limit, ...]) -> bool:
        return all(limit.accepts(FIELD_READERS[limit.field](tensors)) for limit in guards)

    expected = next((place for place, guards in enumerate(chain) if passes(guards)), "otherwise")
    name, arguments = function(*tensors, *rest)
    assert name == expected
    assert all(one is other for one, other in zip(arguments, (*tensors, *rest), strict=True))

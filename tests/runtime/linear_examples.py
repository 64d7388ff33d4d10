"""Calls of quantised linear layers, for tests of their contexts and of the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.operations import OPERATIONS
from tests.runtime.kernel_calls import Call, allowed_error, quantised, relative_error

DTYPES = {"linear.fp8": "float8_e4m3fn", "linear.int8": "int8"}
PUBLIC: dict[str, Callable[..., torch.Tensor]] = {"linear.fp8": lz.linear_fp8, "linear.int8": lz.linear_int8}
each_operation = pytest.mark.parametrize("operation", DTYPES)


def number(value: float = 0.5) -> torch.Tensor:
    return torch.tensor(value)


def call_of(
    operation: str, leading: tuple[int, ...] = (6,), in_features: int = 64, out_features: int = 48, **given: Any
) -> Call:
    """A call with one scale for each matrix and no bias, unless others are given."""
    torch.manual_seed(0)
    parts = {
        "x": quantised((*leading, in_features), DTYPES[operation]),
        "weight": quantised((out_features, in_features), DTYPES[operation]),
        "scale_x": number(0.5),
        "scale_w": number(0.25),
        "bias": None,
    } | given
    arguments = tuple(parts.values())
    return Call(OPERATIONS[operation].describe(*arguments), arguments)


def assert_right(call: Call, output: torch.Tensor) -> None:
    expected, reference = call.run(call.default()), call.reference()
    assert (output.shape, output.dtype) == (reference[0].shape, torch.bfloat16)
    assert output.is_contiguous()
    assert relative_error((output,), reference) <= allowed_error(call, expected, reference)

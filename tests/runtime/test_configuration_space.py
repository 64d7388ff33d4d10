"""A space of configurations says what is wrong with its declaration, and cannot change afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, FunctionLoader, Kernel, KernelSpec
from layerzero_runtime.kernels import builtin_kernels

NORM = SelectionContext(operation="norm.rms", dtype="float32", rows=4, hidden_size=64)


def test_values_are_json_scalars_and_every_configuration_is_valid_without_restrictions() -> None:
    values: tuple[Any, ...] = ("fast", 2**70, 0.5, True, None)
    space = ConfigurationSpace({"block": (16, 32), "how": values})
    assert space.parameters == {"block": (16, 32), "how": values}
    assert space.is_valid({"block": 16, "how": None}, NORM)


def test_restrictions_see_the_configuration_and_the_context() -> None:
    def fits(configuration: Configuration, context: SelectionContext) -> bool:
        return context.hidden_size is not None and configuration["block"] <= context.hidden_size

    space = ConfigurationSpace({"block": (16, 128)}, fits)
    assert [space.is_valid({"block": block}, NORM) for block in (16, 128)] == [True, False]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "no parameters, required at least one; leave the space out"),
        ({"block": ()}, r"'block' has \(\), required a tuple with at least one value"),
        ({"block": [16, 32]}, r"'block' has \[16, 32\], required a tuple"),
        ({"block": (16, 32, 16)}, r"'block' has equal values in \(16, 32, 16\)"),
        ({"block": (1, True)}, r"'block' has equal values in \(1, True\)"),
        ({"block": (0, 0.0)}, r"'block' has equal values in \(0, 0.0\)"),
        ({"block": (16, (1, 2))}, r"'block' has \(1, 2\), required are JSON scalars"),
        ({"block": (float("nan"),)}, "'block' has nan, required are JSON scalars"),
        ({"block": (1.0, float("inf"))}, "'block' has inf, required are JSON scalars"),
        ({"block": (1j,)}, "'block' has 1j, required are JSON scalars"),
        ({"a block": (1,)}, "'a block' of a space must have the name of an identifier"),
        ({3: (1,)}, "3 of a space must have the name of an identifier"),
    ],
)
def test_a_faulty_declaration_names_the_parameter_and_what_is_required(
    parameters: Mapping[Any, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        ConfigurationSpace(parameters)


def test_a_space_does_not_follow_the_mapping_that_it_was_made_from() -> None:
    given: dict[str, tuple[int, ...]] = {"block": (16,)}
    space = ConfigurationSpace(given)
    given["warps"] = (4,)
    assert list(space.parameters) == ["block"]
    with pytest.raises(TypeError):
        space.parameters["warps"] = (4,)  # type: ignore[index]


def test_a_kernel_has_no_space_unless_it_declares_one() -> None:
    assert all(kernel.space is None for kernel in builtin_kernels() if not kernel.kernel_id.startswith("triton."))
    space = ConfigurationSpace({"block": (16, 32)})
    spec = KernelSpec(kernel_id="mine.norm", operations=("norm.rms",), platforms=("cpu",), dtypes=("float32",))
    kernel = Kernel(spec, FunctionLoader(lambda *arguments: None), space)
    assert kernel.space is space
    assert kernel in {kernel}

"""The valid configurations of a space at a context."""

from __future__ import annotations

import itertools
import math

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Configuration, ConfigurationSpace

# All combinations are tried against the restrictions, at about a microsecond each, once per point.
MAX_COMBINATIONS = 1_000_000


def valid_configurations(space: ConfigurationSpace, context: SelectionContext) -> tuple[Configuration, ...]:
    """The configurations that the kernel's own restrictions allow at the context, the last parameter changing fastest.

    `context` must name its device.

    Raises:
        SpecError: the space has more than `MAX_COMBINATIONS`, or its restrictions raise.
    """
    combinations = math.prod(map(len, space.parameters.values()))
    if combinations > MAX_COMBINATIONS:
        raise SpecError(
            f"a space of {combinations:,} combinations ({', '.join(space.parameters)}) is too large, allowed are "
            f"{MAX_COMBINATIONS:,}; give its parameters fewer values"
        )
    found = (
        dict(zip(space.parameters, values, strict=True)) for values in itertools.product(*space.parameters.values())
    )
    return tuple(configuration for configuration in found if _is_valid(space, configuration, context))


def _is_valid(space: ConfigurationSpace, configuration: Configuration, context: SelectionContext) -> bool:
    try:
        return space.is_valid(configuration, context)
    except Exception as error:
        raise SpecError(
            f"the restrictions of a space fail for {dict(configuration)} at {context.operation}: "
            f"{type(error).__name__}: {error}; they must answer for every combination"
        ) from error

"""The valid configurations of a space at a context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Configuration, ConfigurationSpace
from layerzero_tune.search.configurations.trial import text_of

# All combinations are tried against the restrictions, at about a microsecond each, once per point.
MAX_COMBINATIONS = 1_000_000
# Of a space of at most so many they are kept, at some 500 bytes each.
_KEPT = 20_000
_KEPT_SPACES = 64


def valid_configurations(space: ConfigurationSpace, context: SelectionContext) -> dict[str, Configuration]:
    """By their texts the configurations that the kernel's own restrictions allow at the context, the last parameter
    changing fastest. They are shared between contexts, and never changed.

    `context` must name its device.

    Raises:
        SpecError: the space has more than `MAX_COMBINATIONS`, or its restrictions raise.
    """
    count = math.prod(map(len, space.parameters.values()))
    if count > MAX_COMBINATIONS:
        raise SpecError(
            f"a space of {count:,} combinations ({', '.join(space.parameters)}) is too large, allowed are "
            f"{MAX_COMBINATIONS:,}; give its parameters fewer values"
        )
    if count <= _KEPT:
        return {text: found for text, found in _kept(space) if _is_valid(space, found, context)}
    return {text_of(found): found for found in _combinations(space) if _is_valid(space, found, context)}


@lru_cache(_KEPT_SPACES)
def _kept(space: ConfigurationSpace) -> tuple[tuple[str, Configuration], ...]:
    return tuple((text_of(found), found) for found in _combinations(space))


def _combinations(space: ConfigurationSpace) -> Iterator[Configuration]:
    for values in itertools.product(*space.parameters.values()):
        yield dict(zip(space.parameters, values, strict=True))


def _is_valid(space: ConfigurationSpace, configuration: Configuration, context: SelectionContext) -> bool:
    try:
        return space.is_valid(configuration, context)
    except Exception as error:
        raise SpecError(
            f"the restrictions of a space fail for {dict(configuration)} at {context.operation}: "
            f"{type(error).__name__}: {error}; they must answer for every combination"
        ) from error

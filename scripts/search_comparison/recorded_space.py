"""A recorded space: every valid configuration of one kernel on one device, with its time or its failure."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from layerzero_runtime.kernel import Configuration
from layerzero_tune.search.configurations.trial import Trial, text_of

SUFFIX = ".json.gz"


@dataclass(frozen=True)
class RecordedSpace:
    """Times in ms by the text of a configuration, None where it failed; `valid` in the order of the recording."""

    name: str
    valid: tuple[Configuration, ...]
    times: dict[str, float | None]

    @cached_property
    def optimum(self) -> float:
        return min(time for time in self.times.values() if time is not None)

    @cached_property
    def neighbours(self) -> dict[str, tuple[Configuration, ...]]:
        """By the text of a configuration those that differ from it in one parameter, in the order of the recording."""
        groups: dict[tuple[object, ...], list[Configuration]] = {}
        for configuration in self.valid:
            for group in _lines(configuration):
                groups.setdefault(group, []).append(configuration)
        return {
            text_of(configuration): tuple(
                other for group in _lines(configuration) for other in groups[group] if other != configuration
            )
            for configuration in self.valid
        }

    def trials(self, configurations: Sequence[Configuration]) -> tuple[Trial, ...]:
        """The trials that measuring gives. Any anchor will do: log ratios differ by a constant."""
        found = [(configuration, self.times[text_of(configuration)]) for configuration in configurations]
        return tuple(Trial(c, time and math.log(time), time and time * 1e6) for c, time in found)

    def best(self, count: int) -> tuple[Configuration, ...]:
        timed = [(time, text_of(c), c) for c in self.valid if (time := self.times[text_of(c)]) is not None]
        return tuple(configuration for _, _, configuration in sorted(timed, key=lambda found: found[:2])[:count])


def load_space(path: Path) -> RecordedSpace:
    """A cachefile of Kernel Tuner; parameters with one value throughout are left out."""
    with gzip.open(path) as file:
        recorded = json.load(file)
    rows = list(recorded["cache"].values())
    names = [name for name in recorded["tune_params_keys"] if len({row[name] for row in rows}) > 1]
    valid = tuple({name: row[name] for name in names} for row in rows)
    times = {
        text_of(c): None if isinstance(row["time"], str) else row["time"] for c, row in zip(valid, rows, strict=True)
    }
    return RecordedSpace(path.name.removesuffix(SUFFIX), valid, times)


def _lines(configuration: Configuration) -> list[tuple[object, ...]]:
    """The lines through a configuration on which one parameter changes."""
    items = tuple(configuration.items())
    return [(name, *items[:index], *items[index + 1 :]) for index, (name, _) in enumerate(items)]

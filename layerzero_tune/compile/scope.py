"""The scope of a configuration: where a table may expect it to serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, Kernel, Scalar
from layerzero_tune.compile.judge import Choice, Verdict


@dataclass(frozen=True)
class Scope:
    """Where its space holds a configuration, in the regimes in which it was measured.

    Elsewhere it is as correct, but its times are those of another thing. By an evaluation of norms on an H100, without
    scopes a table lost 0.036 (log time) at RMSNorm, 0.044 at LayerNorm and 0.014 at add and RMSNorm in graphs, with
    them 0.016, 0.019 and 0.007: rows of 5,120 columns got what is best where a block of 4,096 holds a whole row.
    """

    space: ConfigurationSpace
    configuration: Configuration
    regimes: frozenset[Scalar]

    def holds(self, context: SelectionContext) -> bool:
        """`context` has the device."""
        return (
            bool(self.regimes)
            and self.space.is_valid(self.configuration, context)
            and self.space.regime(self.configuration, context) in self.regimes
        )


def scope_of(kernel: Kernel, choice: Choice, verdicts: Sequence[Verdict], device: DeviceSpec | None) -> Scope | None:
    """That of a choice that was measured at some of these cells on a device; None for a kernel's own choice, which has
    no bounds but the kernel's limits, and where the kernel has no space any more. One with other parameters than the
    space has now holds nowhere."""
    configuration: Configuration = json.loads(choice[1])
    space = kernel.space
    if not configuration or space is None:
        return None
    if configuration.keys() != space.parameters.keys():
        return Scope(space, configuration, frozenset())
    found = (verdict.context for verdict in verdicts if choice in verdict.standings)
    described = (context if device is None else context.with_device(device) for context in found)
    return Scope(space, configuration, frozenset(space.regime(configuration, context) for context in described))

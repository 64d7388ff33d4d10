"""`CompileJob`: what of a contest can be compiled before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Configuration, Kernel
from layerzero_runtime.operations import operation_named
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.contest import Contest


@dataclass(frozen=True)
class CompileJob:
    """The load of a kernel with a configuration. `context` names its device; its sizes do not matter, as a load relies
    on device and static features alone."""

    context: SelectionContext
    kernel_id: str
    configuration: Configuration

    @property
    def library(self) -> str:
        """Whose kernel it is, by its id."""
        return self.kernel_id.partition(".")[0]

    @cached_property
    def key(self) -> str:
        """Equal for jobs that compile the same code."""
        static_key = operation_named(self.context.operation).static_key(self.context)
        return repr((self.context.operation, static_key, *choice_of(self.kernel_id, self.configuration)))


def compile_jobs(contest: Contest, kernels: Mapping[str, Kernel], device: DeviceSpec) -> dict[int, CompileJob]:
    """By candidate's index the jobs of a contest on the device; kernels that do not compile have none."""
    context = contest.context.with_device(device)
    return {
        index: CompileJob(context, candidate.kernel_id, candidate.configuration)
        for index, candidate in enumerate(contest.candidates)
        if (kernel := kernels.get(candidate.kernel_id)) is not None and kernel.spec.compiles
    }

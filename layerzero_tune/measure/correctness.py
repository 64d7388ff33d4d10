"""Correct before fast: a kernel's result against a float64 reference, before its time counts."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from layerzero_runtime.accuracy import DEFAULT_ERROR_FACTOR, error_floor, output_fault
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.operation import Operation
from layerzero_tune.measure.inputs import RandomTensors
from layerzero_tune.measure.sampling import Sample, draw_sample
from layerzero_tune.results.measurement import Status

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Trial:
    """One checked call.

    Attributes:
        errors: the relative L2 error of every output.
        fault: what is wrong with the result as such (there are no errors then), else empty.
        status: "ok", or which kind of fault it is.
        call_ns: time of the call in ns, what the first call does beside its work included.
    """

    errors: tuple[float, ...] = ()
    fault: str = ""
    status: Status = "ok"
    call_ns: float = math.inf


@dataclass(frozen=True)
class Verdict:
    """The output that comes closest to its tolerance or exceeds it most; for a right result the status is "ok" and the
    message empty."""

    relative_error: float | None
    tolerance: float | None
    status: Status
    message: str


def tolerances(default: Trial, dtype: str) -> tuple[float, ...]:
    """Per output, the relative L2 error allowed: twice the default's own and the floor."""
    return tuple(DEFAULT_ERROR_FACTOR * error + error_floor(dtype) for error in default.errors)


def judge(trial: Trial, allowed: Sequence[float]) -> Verdict:
    """Whether every output keeps its tolerance."""
    if trial.fault:
        return Verdict(None, None, trial.status, trial.fault)
    error, tolerance = max(zip(trial.errors, allowed, strict=True), key=lambda pair: pair[0] / pair[1])
    if error <= tolerance:
        return Verdict(error, tolerance, "ok", "")
    return Verdict(error, tolerance, "wrong", f"relative error {error:.2e} above {tolerance:.2e}")


@dataclass(frozen=True)
class Check:
    """The call on which all kernels of a contest are checked, and a sample of its right results in float64."""

    operation: Operation
    context: SelectionContext
    tensors: Mapping[str, Tensor]
    untouched: Mapping[str, Tensor]
    sample: Sample
    expected: tuple[Tensor, ...]

    @classmethod
    def prepare(cls, operation: Operation, context: SelectionContext, source: RandomTensors, seed: int) -> Check:
        """Draw fresh inputs and evaluate the reference on a sample of them.

        Raises:
            ContextError: no tolerance is defined for the dtype of the context's results.
        """
        import torch

        error_floor(context.result_dtype)
        tensors = source.draw(operation, context)
        untouched = {name: tensor.clone() for name, tensor in tensors.items()}
        sample = draw_sample(operation, context, tensors, random.Random(seed))
        expected = _reference(operation, sample, torch.float64)
        return cls(operation, context, tensors, untouched, sample, expected)

    def run(self, function: KernelFunction) -> Trial:
        """Call the function once and compare; what the function raises is raised."""
        import torch

        arguments = self.operation.arguments(self.context, self.tensors)
        start = perf_counter_ns()
        result = function(*arguments)
        if any(tensor.is_cuda for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        call_ns = float(perf_counter_ns() - start)
        for name, tensor in self.tensors.items():
            if not torch.equal(tensor, self.untouched[name]):
                tensor.copy_(self.untouched[name])
                return Trial(fault=f"writes to its input {name}", status="wrote_to_inputs")
        outputs = result if isinstance(result, tuple | list) else (result,)
        if fault := output_fault(outputs, self.operation.outputs(self.context), self.context.result_dtype):
            return Trial(fault=fault, status="wrong")
        parts = tuple(self.sample.pick(output) for output in outputs)
        trial = self._compare(parts)
        self._spoil(*outputs, *parts)
        return replace(trial, call_ns=call_ns)

    def written_out(self) -> Trial:
        """The reference evaluated in the results' dtype: what accuracy to ask for where the default gave no result."""
        import torch

        outputs = _reference(self.operation, self.sample, getattr(torch, self.context.result_dtype))
        trial = self._compare(outputs)
        self._spoil(*outputs)
        return trial

    def _spoil(self, *results: Tensor) -> None:
        """Overwrite results with NaN before their memory is free, and may become the output of the next kernel.

        A kernel that leaves elements unwritten would inherit right answers otherwise.
        """
        inputs = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}
        for result in results:
            if result.untyped_storage().data_ptr() not in inputs:
                whole = result.new_empty(0).set_(result.untyped_storage())
                whole.fill_(float("nan"))

    def _compare(self, parts: Sequence[Tensor]) -> Trial:
        import torch

        errors = []
        for index, (part, expected) in enumerate(zip(parts, self.expected, strict=True)):
            found = part.to(torch.float64)
            if undefined := int((~found.isfinite()).sum()):
                return Trial(
                    fault=f"output {index} is NaN or infinite in {undefined} of {found.numel()} values checked",
                    status="wrong",
                )
            distance, size = float((found - expected).norm()), float(expected.norm())
            if distance > 0.0 and size == 0.0:
                return Trial(fault=f"output {index} is not zero where the reference is", status="wrong")
            errors.append(distance / size if size else 0.0)
        return Trial(tuple(errors))


def _reference(operation: Operation, sample: Sample, dtype: Any) -> tuple[Tensor, ...]:
    converted = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in sample.tensors.items()
    }
    return operation.reference(sample.context, *operation.arguments(sample.context, converted))

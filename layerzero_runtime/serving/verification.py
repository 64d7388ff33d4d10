"""Verification: every n-th call compared with the reference, to find kernels that are wrong without an error."""

from __future__ import annotations

from typing import Any

from layerzero_runtime import ranks
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import Counter, CounterGroup, log_warning
from layerzero_runtime.errors import ContextError, KernelExecutionError
from layerzero_runtime.operation import Operation
from layerzero_runtime.serving.health import Health


class Verification:
    """Compares every n-th call of each kernel. A wrong result is counted and logged, its kernel's breaker trips, and
    the call gets the reference's result in its place.

    Raises:
        ContextError: `every` is below 1.
    """

    def __init__(self, every: int, counters: CounterGroup, health: Health) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ContextError(f"every is {every!r}, required an integer of at least 1, or None to end verification")
        self._every = every
        self._counters = counters
        self._health = health
        self._calls: dict[str, Counter] = {}

    def verify(
        self,
        kernel_id: str,
        operation: Operation,
        context: SelectionContext,
        arguments: tuple[Any, ...],
        result: Any,
    ) -> Any:
        """The result, or the reference's where this call is compared and the result is wrong."""
        calls = self._calls.get(kernel_id) or self._calls.setdefault(kernel_id, Counter())
        if calls.raise_by_one() % self._every or context.dropout_p:
            return result
        self._counters.raise_by_one("verified")
        outputs = result if isinstance(result, tuple) else (result,)
        reference, error, allowed = _compare(operation, context, arguments, outputs)
        if error <= allowed:
            return result
        self._counters.raise_by_one("wrong_results")
        log_warning(
            f"{kernel_id} gave a wrong result at {context.to_dict()}: relative error {error:.2e}, allowed {allowed:.2e}"
        )
        if ranks.attached():
            raise KernelExecutionError(
                f"{kernel_id} gave a wrong result (relative error {error:.2e}, allowed {allowed:.2e}); "
                "ranks are attached, so it is not replaced on this one alone"
            )
        self._health.failed(kernel_id, f"a wrong result, relative error {error:.2e}")
        return reference if isinstance(result, tuple) else reference[0]


def _compare(
    operation: Operation, context: SelectionContext, arguments: tuple[Any, ...], outputs: tuple[Any, ...]
) -> tuple[tuple[Any, ...], float, float]:
    """(results of the reference in the outputs' dtypes, largest relative error of an output, what is allowed).

    Allowed is as in tuning: twice the error that the reference itself has in the results' dtype, and a floor. NaN and
    infinities count as right where the reference has the same.
    """
    import torch

    from layerzero_runtime.accuracy import DEFAULT_ERROR_FACTOR, error_floor

    def evaluated(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return operation.reference(
            context,
            *(
                part.detach().to(dtype) if isinstance(part, torch.Tensor) and part.is_floating_point() else part
                for part in arguments
            ),
        )

    exact = evaluated(torch.float64)
    rounded = evaluated(getattr(torch, context.result_dtype))
    error, allowed = 0.0, 0.0
    for output, right, own in zip(outputs, exact, rounded, strict=True):
        found = _relative(output.detach(), right)
        bound = DEFAULT_ERROR_FACTOR * _relative(own, right) + error_floor(context.result_dtype)
        if found - bound >= error - allowed:
            error, allowed = found, bound
    replaced = tuple(right.to(output.dtype) for output, right in zip(outputs, exact, strict=True))
    return replaced, error, allowed


def _relative(found: Any, exact: Any) -> float:
    """Relative L2 distance over what is finite in both; infinite where one is and the other is not, or signs differ."""
    import torch

    found = found.to(torch.float64)
    finite = exact.isfinite()
    if not torch.equal(found[~finite], exact[~finite]) and not bool(
        (found[~finite].isnan() == exact[~finite].isnan()).all() and not found[~finite].isfinite().any()
    ):
        return float("inf")
    if not bool(found[finite].isfinite().all()):
        return float("inf")
    distance, size = float((found[finite] - exact[finite]).norm()), float(exact[finite].norm())
    return distance / size if size else (float("inf") if distance else 0.0)

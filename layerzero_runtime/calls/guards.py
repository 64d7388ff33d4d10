"""Guards: whether tensors are like those of a call that was served before.

One C call looks at everything that a plan depends on: types, the effective dispatch keys (autocast, dispatch modes,
transforms, layouts, inference mode), dtypes, devices, whether autograd would record, numbers of dimensions, and the
sizes that are fixed. It is what torch.compile checks its own inputs with, and costs what two reads of a shape do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from layerzero_runtime.calls.interception import autocast, dispatch_modes, grad_enabled, transforms
from layerzero_runtime.counters import log_warning
from layerzero_runtime.dispatch import count
from layerzero_runtime.serving.routes import Route
from layerzero_runtime.serving.seen_calls import SeenCalls

Guard = Callable[..., bool]
Keeper = Callable[[SeenCalls, Route], None]
# Of each tensor, its sizes, None for one that may differ.
FixedSizes = Sequence[list[int | None]]


def tensor_guard(tensors: Sequence[Tensor], sizes: FixedSizes, *, same_strides: bool = False) -> Guard:
    """A function of as many tensors, True where they differ from these in no more than the sizes that are None and,
    unless they have to be the same, in strides.

    Calls that pass one tensor twice have a slower guard, as has a torch without `TensorGuards`.
    """
    strides: FixedSizes = [list(tensor.stride()) if same_strides else [None] * tensor.dim() for tensor in tensors]
    native = _native_guards()
    if native is None or len({id(tensor) for tensor in tensors}) < len(tensors):
        return _written_out_guard(tensors, sizes, strides)
    guard: Guard = native(*tensors, dynamic_dims_sizes=list(sizes), dynamic_dims_strides=strides).check
    return guard


def rows_keeper(function: str, tensors: Sequence[Tensor | None], *features: Any) -> Keeper | None:
    """What keeps the kind of a call on rows: all sizes of its tensors may differ but the last. None without a weight.

    A kind is (guard, features, width, decide, functions, count_call, recover).
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) < len(tensors):
        return None

    def keep(seen: SeenCalls, route: Route) -> None:
        sizes = [[*[None] * (tensor.dim() - 1), tensor.shape[-1]] for tensor in given]
        parts = (given[0].shape[-1], route.decide, route.functions, route.count_call, route.recover)
        seen.keep(function, (tensor_guard(given, sizes), *features, *parts))

    return keep


@cache
def _native_guards() -> Any:
    """torch's class of such guards, None where it is missing or answers otherwise than here assumed: it is private."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        agrees = _agrees(TensorGuards)
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        agrees, reason = False, f"{type(error).__name__}: {error}"
    else:
        reason = "it accepts tensors that differ"
    if agrees:
        return TensorGuards
    count("written_out_guards")
    log_warning(f"torch {torch.__version__} has no TensorGuards of the known kind ({reason}); calls cost 1 us more")
    return None


def _agrees(native: Any) -> bool:
    """Whether torch's guards tell apart what they must, tried on a few tensors."""
    with torch.inference_mode(False), torch.enable_grad():
        plain = torch.empty(2, 3, device="cpu")
        guard = native(plain, dynamic_dims_sizes=[[None, 3]], dynamic_dims_strides=[[None, None]]).check
        alike = (torch.empty(5, 3, device="cpu"), torch.empty(3, 2, device="cpu").t())
        different = (
            torch.empty(2, 4, device="cpu"),
            torch.empty(2, 3, 1, device="cpu"),
            plain.double(),
            plain.to("meta"),
            torch.empty(2, 3, device="cpu", requires_grad=True),
            torch.nn.Parameter(plain, requires_grad=False),
            None,
        )
        if not all(map(guard, alike)) or any(map(guard, different)):
            return False
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return not guard(plain)


def _written_out_guard(tensors: Sequence[Tensor], sizes: FixedSizes, strides: FixedSizes) -> Guard:
    expected = [
        (type(tensor), tensor.dtype, tensor.device, tensor.layout, [*fixed, *fixed_strides])
        for tensor, fixed, fixed_strides in zip(tensors, sizes, strides, strict=True)
    ]

    def check(*given: Any) -> bool:
        if dispatch_modes() or autocast() or transforms() is not None:
            return False
        recording = grad_enabled()
        for tensor, (kind, dtype, device, layout, fixed) in zip(given, expected, strict=True):
            if (
                type(tensor) is not kind
                or tensor.dtype is not dtype
                or tensor.device != device
                or tensor.layout is not layout
                or tensor.is_neg()
                or tensor.is_conj()
                or (recording and tensor.requires_grad)
                or 2 * tensor.dim() != len(fixed)
                or any(
                    wanted is not None and wanted != found
                    for wanted, found in zip(fixed, (*tensor.shape, *tensor.stride()), strict=True)
                )
            ):
                return False
        return True

    return check

"""What a context says of tensors: dtype, device, strides, gradients. torch itself is never imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import DTYPES
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.errors import ContextError, ContextTypeError

if TYPE_CHECKING:
    from torch import Tensor

NamedTensors = dict[str, "Tensor"]


def check_tensors(values: Mapping[str, object]) -> None:
    """Check that the named arguments are tensors.

    Raises:
        ContextTypeError: one is not.
    """
    torch = sys.modules.get("torch")
    for name, value in values.items():
        if torch is None or not isinstance(value, torch.Tensor):
            raise ContextTypeError(f"{name} must be a tensor, not {type(value).__name__}")


def dtype_name(tensor: Tensor) -> str:
    """torch's name of the dtype without the prefix.

    Raises:
        ContextError: no kernel knows the dtype.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ContextError(f"dtype is {name}, allowed: {', '.join(DTYPES)}")
    return name


def dtype_is_bool(tensor: Tensor) -> bool:
    return str(tensor.dtype) == "torch.bool"


def common_dtype(tensors: NamedTensors) -> str:
    """The dtype that all tensors have.

    Raises:
        ContextError: they differ.
    """
    names = {argument: dtype_name(tensor) for argument, tensor in tensors.items()}
    if len(set(names.values())) > 1:
        raise ContextError(f"dtypes differ: {_listed(names)}; convert the tensors to one dtype")
    return next(iter(names.values()))


def common_device(tensors: NamedTensors) -> DeviceSpec:
    """The device that all tensors are on.

    Raises:
        ContextError: they are on different devices.
    """
    devices = {argument: str(tensor.device) for argument, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ContextError(f"tensors are on different devices: {_listed(devices)}; move them to one device")
    return detect_device(next(iter(devices.values())))


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{argument} {value}" for argument, value in values.items())


def rows_by_width(tensors: NamedTensors) -> tuple[int, int]:
    """(product of the leading dimensions, last dimension) of tensors of one shape.

    Raises:
        ContextError: the shapes differ, or there is no dimension.
        ContextTypeError: one is no tensor.
    """
    check_tensors(tensors)
    shapes = {argument: tuple(tensor.shape) for argument, tensor in tensors.items()}
    shape = next(iter(shapes.values()))
    # Compared, not collected in a set: symbolic sizes, of a call that torch.compile traces, have no hash.
    if any(other != shape for other in shapes.values()):
        raise ContextError(f"shapes differ: {_listed({name: str(value) for name, value in shapes.items()})}")
    if not shape:
        raise ContextError("the tensor has no dimension to work on, required at least 1")
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]


def stride_last_dim(tensors: Iterable[Tensor]) -> int:
    """The first stride of a last dimension that is not 1, else 1; a dimension of one element does not count."""
    for tensor in tensors:
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return tensor.stride(-1)
    return 1


def is_contiguous(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


# Fields that can be read off the tensors of a call without describing the whole of it.
FIELD_READERS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "stride_last_dim": stride_last_dim,
    "is_contiguous": is_contiguous,
}


def call_features(tensors: NamedTensors) -> dict[str, Any]:
    """The fields of a context that every operation reads off its tensors in the same way."""
    return {
        "device": common_device(tensors),
        **{field: read(tensors.values()) for field, read in FIELD_READERS.items()},
        "requires_grad": gradients_needed(*tensors.values()),
        "requires_deterministic": determinism_required(),
    }


def call_key(arguments: Sequence[Any]) -> Hashable:
    """All that the context of a call on these arguments can depend on beside the operation and its features: two calls
    of equal keys have equal contexts."""
    torch = sys.modules["torch"]
    kind = torch.Tensor
    return (
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        *[
            (each.shape, each.stride(), each.dtype, each.device, each.requires_grad) if isinstance(each, kind) else each
            for each in arguments
        ],
    )


def gradients_needed(*tensors: Tensor) -> bool:
    """Whether autograd would record a call on these tensors."""
    return sys.modules["torch"].is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def determinism_required() -> bool:
    return bool(sys.modules["torch"].are_deterministic_algorithms_enabled())

"""`warmup`: loading, compiling and trying plans ahead of the calls that need them."""

from __future__ import annotations

from collections.abc import Iterable

from layerzero_runtime import ranks
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import log_warning
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.dispatch import current_snapshot, health, on_a_device, republish
from layerzero_runtime.errors import ContextError, NoKernelAvailableError
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan


def warmup(contexts: Iterable[SelectionContext]) -> list[ExecutionPlan]:
    """Prepare what serves these calls, each tried once on random tensors of its shapes, and give the plans in force.

    What is prepared serves all calls of the context's static features, whatever their sizes. A kernel that fails trips
    its breaker, and the next best is prepared in its place. With ranks attached every rank has to call this with the
    same contexts; afterwards it is checked that all select alike.

    Raises:
        ContextError: a context is not valid, or describes another device than those of this machine.
        NoKernelAvailableError: no kernel accepts a context.
        RanksDifferError: ranks are attached and select differently afterwards.
    """
    placed = [on_a_device(context) for context in contexts]
    for context in placed:
        operation = operation_named(context.operation)
        operation.validate(context)
        _torch_name(context.device)
        _prepare(operation, context)
    republish()
    if ranks.attached():
        from layerzero_runtime.distributed import verify_consistent

        verify_consistent(ranks.group())
    snapshot = current_snapshot()
    return [snapshot.select(context) for context in placed]


def _prepare(operation: Operation, context: SelectionContext) -> None:
    import torch

    snapshot = current_snapshot()
    # Each failure takes a kernel out of the next snapshot, so this ends.
    while True:
        choice = snapshot.choose(operation, context, to_run=True).choice
        with torch.inference_mode():
            arguments = _random_arguments(operation, context)
            try:
                snapshot.run(snapshot.prepare(choice, operation, context), operation, context, arguments)
                return
            except Exception as error:
                if choice.kernel.kernel_id == operation.default_kernel:
                    raise
                reason = f"{type(error).__name__}: {error}"
        log_warning(f"{choice.kernel.kernel_id} failed in warmup at {context.to_dict()}: {reason}")
        health().failed(choice.kernel.kernel_id, reason)
        snapshot = current_snapshot()
        if choice.kernel.kernel_id not in snapshot.broken:
            raise NoKernelAvailableError(f"{choice.kernel.kernel_id} failed in warmup: {reason}")


def _random_arguments(operation: Operation, context: SelectionContext) -> tuple[object, ...]:
    import torch

    if context.attn_mask != "none":
        raise ContextError(f"warmup draws no {context.attn_mask!r} masks; leave attn_mask out, a mask is a miss anyway")
    device = _torch_name(context.device)
    tensors = {
        tensor.name: torch.randn(tensor.shape(context), device=device).to(getattr(torch, tensor.dtype(context)))
        for tensor in operation.present_tensors(context)
    }
    return operation.arguments(context, tensors)


def _torch_name(device: DeviceSpec | None) -> str:
    """torch's name of a device of this machine.

    Raises:
        ContextError: it is none.
    """
    assert device is not None
    if device.platform not in ("cpu", "cuda"):
        raise ContextError(f"warmup is for the devices of this machine, not for {device.name}; allowed: cpu, cuda")
    name = device.platform if device.index is None else f"{device.platform}:{device.index}"
    if detect_device(name) != device:
        raise ContextError(f"warmup is for the devices of this machine, {name} is not {device.name}")
    return name

"""Inputs of measurements: random normal tensors, and enough sets of them to outgrow the last-level cache."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Operation, TensorArgument
from layerzero_tune.measure.contest import MeasurementPolicy

if TYPE_CHECKING:
    from torch import Tensor

Arguments = tuple[Any, ...]

# Normal numbers drawn per contest; tensors are filled from random places of this pool, round and round, since a copy
# costs a twentieth of a draw. A prime (the largest below 2^20), so that no two rows of a tensor are equal.
POOL_ELEMENTS = 1_048_573
# More sets would only help calls on less than 1/64 of the cache, whose inputs are in the cache in a serving loop too.
MAX_SETS = 64
MAX_BYTES = 2 * 1024**3

# What a context may say that the generated inputs do not have: measuring it would record times of another call.
_MEASURABLE: dict[str, Any] = {
    "attn_mask": "none",
    "dropout_p": 0.0,
    "requires_grad": False,
    "is_contiguous": True,
    "stride_last_dim": 1,
}


def check_measurable(context: SelectionContext) -> None:
    """Check that the context asks for nothing that the generated inputs lack.

    Raises:
        ContextError: it has a mask, dropout, gradients, or tensors that are not contiguous.
    """
    for name, usual in _MEASURABLE.items():
        if (value := getattr(context, name)) != usual:
            raise ContextError(
                f"{name} is {value!r}, and only {usual!r} can be measured; take this point out of the workload "
                "(such calls are served by the live selector)"
            )


class RandomTensors:
    """Draws the tensors of calls, the same for the same seed and order of draws. Never zeros: they multiply faster."""

    def __init__(self, device: str, seed: int) -> None:
        self._device = device
        self._seed = seed
        self._places = random.Random(seed)
        self._pools: dict[tuple[str, float, float], Tensor] = {}

    def draw(self, operation: Operation, context: SelectionContext) -> dict[str, Tensor]:
        """The tensors that the context has, contiguous in its layout, by the names of the operation's arguments."""
        return {argument.name: self._fill(argument, context) for argument in operation.present_tensors(context)}

    def _fill(self, argument: TensorArgument, context: SelectionContext) -> Tensor:
        import torch

        shape = argument.shape(context)
        count = math.prod(shape)
        pool = self._pool(argument.dtype(context), argument.center, argument.spread)
        tensor = torch.empty(shape, dtype=pool.dtype, device=self._device)
        flat = tensor.view(-1)
        place = self._places.randrange(POOL_ELEMENTS)
        filled = 0
        while filled < count:
            piece = pool[place : place + count - filled]
            flat[filled : filled + len(piece)] = piece
            filled += len(piece)
            place = 0
        return tensor

    def _pool(self, dtype: str, center: float, spread: float) -> Tensor:
        import torch

        key = (dtype, center, spread)
        if key not in self._pools:
            generator = torch.Generator(self._device).manual_seed(self._seed)
            drawn_in = torch.float64 if dtype == "float64" else torch.float32
            pool = torch.randn(POOL_ELEMENTS, generator=generator, dtype=drawn_in, device=self._device)
            self._pools[key] = pool.mul_(spread).add_(center).to(getattr(torch, dtype))
        return self._pools[key]


def rotating_inputs(
    operation: Operation, context: SelectionContext, policy: MeasurementPolicy, source: RandomTensors
) -> tuple[Arguments, ...]:
    """Arguments of as many calls on distinct tensors as together outgrow `policy.cache_bytes`.

    At least 2 calls and at most `MAX_SETS`, and no more than fit into `MAX_BYTES` (one, if the tensors of a single call
    are more than half of that).
    """
    first = source.draw(operation, context)
    set_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    wanted = max(2, policy.cache_bytes // set_bytes + 1)
    count = max(1, min(wanted, MAX_SETS, MAX_BYTES // set_bytes))
    sets = (first, *(source.draw(operation, context) for _ in range(count - 1)))
    return tuple(operation.arguments(context, tensors) for tensors in sets)

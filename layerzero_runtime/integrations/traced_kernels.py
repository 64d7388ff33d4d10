"""The functions of kernels as traced graphs call them: traced by Dynamo, or operators of torch (`kernel_operators`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.integrations.in_force import Answer
from layerzero_runtime.integrations.kernel_operators import operator_of
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.operation import Operation
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.snapshot import Snapshot

if TYPE_CHECKING:
    from torch import Tensor


def traced_function(
    snapshot: Snapshot,
    choice: Choice,
    operation: Operation,
    context: SelectionContext,
    features: Mapping[str, Any],
    arguments: tuple[Any, ...],
) -> KernelFunction:
    """A function that Dynamo can trace; `features` and `arguments` as for `operation.describe`.

    Raises:
        KernelExecutionError: the kernel's library is missing or loading it failed.
    """
    if _builds_a_bias(operation, choice.kernel.kernel_id, context):
        return _sdpa_bottom_right(context.layout, context.gqa_group != 1)
    if choice.kernel.spec.traceable:
        return snapshot.prepare(choice, operation, context).function
    return operator_of(snapshot, choice, operation, context, features, arguments)


def traced_default(snapshot: Snapshot, operation: Operation, features: Mapping[str, Any]) -> Answer:
    """The operation's default, for calls that cannot be described; `features` are what its loader asks for.

    Raises:
        KernelExecutionError: the default is not registered, or its library is missing.
    """
    prepared = snapshot.default(operation, features)
    context = SelectionContext(operation=operation.name, dtype="float32", **features)
    function = prepared.function
    if _builds_a_bias(operation, prepared.kernel.kernel_id, context):
        function = _sdpa_bottom_right(context.layout, context.gqa_group != 1)
    basis = prepared.kernel
    return Answer(function, Choice(basis, {}), basis, lambda later: later.registry.get(operation.default_kernel))


def _builds_a_bias(operation: Operation, kernel_id: str, context: SelectionContext) -> bool:
    """Whether a kernel builds torch's `CausalBias`, a subclass that Dynamo cannot build."""
    return kernel_id == operation.default_kernel and context.causal_mask == "bottom_right"


@cache
def _sdpa_bottom_right(layout: str, enable_gqa: bool) -> KernelFunction:
    """SDPA with the mask that torch makes of a bottom-right `CausalBias` where no fused kernel takes one."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if attn_mask is not None:
            raise ContextError("attn_mask is given beside a bottom-right causal mask, required is one of the two")
        length_q, length_k = query.shape[2], key.shape[2]
        seen = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
        return scaled_dot_product_attention(query, key, value, seen, dropout_p, scale=scale, enable_gqa=enable_gqa)

    def attend_bshd(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *others).transpose(1, 2)

    return attend if layout == "bhsd" else attend_bshd

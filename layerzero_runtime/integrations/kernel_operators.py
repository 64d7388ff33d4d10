"""Kernels that Dynamo cannot trace, as operators of torch (`torch.ops.layerzero.*`): one call in the graph.

An operator stands for one kernel with one configuration under one set of static features; its name says which, and is
the same in every process. It gives dense results that share no memory with its arguments, of the shapes and dtypes that
its operation says; where the kernel is differentiable, its backward is an operator too, which computes the forward
again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import KernelExecutionError
from layerzero_runtime.kernel import KernelFunction, KernelSpec
from layerzero_runtime.operation import Operation
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.serving.prepared import PreparedKernel
from layerzero_runtime.snapshot import Snapshot

MAX_OPERATORS = 1024
_NAMESPACE = "layerzero"
# An operator cannot be taken back, and lives as long as this.
_LIBRARY: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_AUTOGRAD_KEYS = DispatchKeySet(DispatchKey.AutogradFunctionality) | DispatchKeySet(DispatchKey.ADInplaceOrView)

_lock = threading.Lock()
_operators: dict[str, _KernelOperator] = {}


def operator_of(
    snapshot: Snapshot,
    choice: Choice,
    operation: Operation,
    context: SelectionContext,
    features: Mapping[str, Any],
    arguments: tuple[Any, ...],
) -> KernelFunction:
    """The operator of a choice for the context's static features.

    Args:
        context: a call with these features.
        features: what `operation.describe` takes by keyword.
        arguments: those of the call; the types and the presence of each hold for every call.

    Raises:
        KernelExecutionError: the kernel cannot be loaded, or there are too many operators.
    """
    spec = choice.kernel.spec
    is_transposed = context.num_heads is not None and context.layout not in spec.layouts
    if is_transposed:
        layout = spec.layouts[0]
        context, features = replace(context, layout=layout), {**features, "layout": layout}
    prepared = snapshot.prepare(choice, operation, context)
    kinds = tuple(map(_kind, arguments))
    tags, dtype = _tags(spec, context), _result_dtype(snapshot, operation, context, arguments)
    name = _name(choice, operation, context, (kinds, tags, dtype))
    with _lock:
        known = _operators.get(name)
        if known is None:
            if len(_operators) >= MAX_OPERATORS:
                raise KernelExecutionError(
                    f"{spec.kernel_id} needs an operator for {context.to_dict()}, and there are {MAX_OPERATORS} "
                    "already, the most that a process may have; deny the kernel, or call it outside of torch.compile"
                )
            known = _KernelOperator(prepared, operation, context, features, dtype)
            known.define(name, kinds, tags)
            _operators[name] = known
        # The kernel of this name may be another than before, registered anew.
        known.prepared = prepared
    return known.transposed if is_transposed else known.operator


def _kind(argument: object) -> str:
    """The type of an argument in an operator's schema. One that is not there may be of any: no call has it."""
    if argument is None or isinstance(argument, Tensor):
        return "Tensor?" if argument is None else "Tensor"
    return {bool: "bool", int: "SymInt", torch.SymInt: "SymInt"}.get(type(argument), "float")


def _result_dtype(
    snapshot: Snapshot, operation: Operation, context: SelectionContext, arguments: tuple[Any, ...]
) -> torch.dtype:
    """What a call gives. Beside a weight of another dtype that is what the default gives."""
    if context.mixed_weight_dtype is None:
        return getattr(torch, context.output_dtype)  # type: ignore[no-any-return]
    kernel = snapshot.registry.get(operation.default_kernel)
    if kernel is None:
        raise KernelExecutionError(f"{operation.default_kernel}, the default of {operation.name}, is not registered")
    default = snapshot.prepare(Choice(kernel, {}), operation, context).function
    shaped = (
        torch.empty((2,) * part.dim(), dtype=part.dtype, device="meta") if isinstance(part, Tensor) else part
        for part in arguments
    )
    result = default(*shaped)
    dtype: torch.dtype = (result[0] if isinstance(result, tuple) else result).dtype
    return dtype


def _tags(spec: KernelSpec, context: SelectionContext) -> tuple[torch.Tag, ...]:
    # What a kernel asks of strides was checked on those of the traced call: Inductor must not change them.
    tags = [torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides]
    if context.dropout_p:
        tags.append(torch.Tag.nondeterministic_seeded)
    if not spec.is_cuda_graph_safe:
        tags.append(torch.Tag.cudagraph_unsafe)
    return tuple(tags)


def _name(choice: Choice, operation: Operation, context: SelectionContext, form: tuple[Any, ...]) -> str:
    """A name that tells apart all that a graph may rely on: Inductor keeps compiled graphs on disk by such names."""
    assert context.device is not None
    kernel_id = choice.kernel.kernel_id
    content = (
        sorted(choice.configuration.items()),
        choice.densify,
        operation.name,
        context.device.slug,
        operation.static_key(context),
        choice.kernel.spec.supports_backward,
        form,
    )
    return f"{kernel_id.replace('.', '_')}_{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}"


class _KernelOperator:
    """One operator, and the kernel behind it.

    Attributes:
        operator: what graphs call.
        transposed: the same for calls in the other dense layout.
    """

    def __init__(
        self,
        prepared: PreparedKernel,
        operation: Operation,
        context: SelectionContext,
        features: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.prepared = prepared
        self._operation = operation
        self._context = context
        self._features = features
        self._dtype = dtype
        self._outputs = len(operation.outputs(context))
        self.operator: Any = None
        self._backward_operator: Any = None

    def define(self, name: str, kinds: Sequence[str], tags: tuple[torch.Tag, ...]) -> None:
        parameters = ", ".join(f"{kind} argument_{index}" for index, kind in enumerate(kinds))
        results = ", ".join(["Tensor"] * self._outputs)
        self.operator = _defined(name, f"({parameters}) -> ({results})", tags, self._run, self._shaped_results)
        operator = self.operator

        def transposed(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
            result: Tensor = operator(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *others)
            return result.transpose(1, 2)

        self.transposed = transposed
        if self.prepared.kernel.spec.supports_backward:
            schema = f"(Tensor[] gradients, int[] needed, {parameters}) -> Tensor[]"
            self._backward_operator = _defined(
                f"{name}_backward", schema, tags, self._run_backward, self._shaped_gradients
            )
            torch.library.register_autograd(
                f"{_NAMESPACE}::{name}", self._backward, setup_context=self._keep_for_backward, lib=_LIBRARY
            )

    def _run(self, *arguments: Any) -> Any:
        prepared = self.prepared
        if prepared.proven:
            result = prepared.function(*arguments)
        else:
            result = prepared.run(self._operation.describe(*arguments, **self._features), arguments)
        if isinstance(result, Tensor):
            return result.to(self._dtype).contiguous()
        return tuple(part.to(self._dtype).contiguous() for part in result)

    def _shaped_results(self, *arguments: Any) -> Any:
        first: Tensor = arguments[0]
        if self._context.out_features is not None:
            last = arguments[1].shape[0]
        else:
            last = first.shape[-1] if self._context.rows is not None else arguments[2].shape[-1]
        shape = (*first.shape[:-1], last)
        results = tuple(first.new_empty(shape, dtype=self._dtype) for _ in range(self._outputs))
        return results if self._outputs > 1 else results[0]

    def _run_backward(self, gradients: list[Tensor], needed: list[int], *arguments: Any) -> list[Tensor]:
        inputs = [
            part.detach().requires_grad_(index in needed) if isinstance(part, Tensor) else part
            for index, part in enumerate(arguments)
        ]
        # The inside of an operator is below autograd, which has to record here once more.
        included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS), torch.enable_grad():
            result = self.prepared.function(*inputs)
            results = (result,) if isinstance(result, Tensor) else result
            wanted = [inputs[index] for index in needed]
            found = torch.autograd.grad(results, wanted, gradients, materialize_grads=True)
        return [gradient.contiguous() for gradient in found]

    def _shaped_gradients(self, gradients: list[Tensor], needed: list[int], *arguments: Any) -> list[Tensor]:
        return [arguments[index].new_empty(arguments[index].shape) for index in needed]

    def _keep_for_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(part if isinstance(part, Tensor) else None for part in inputs))
        ctx.others = tuple(None if isinstance(part, Tensor) else part for part in inputs)

    def _backward(self, ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = [index for index, is_needed in enumerate(ctx.needs_input_grad) if is_needed]
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = (other if tensor is None else tensor for tensor, other in pairs)
        found = dict(zip(needed, self._backward_operator(list(gradients), needed, *arguments), strict=True))
        return tuple(found.get(index) for index in range(len(ctx.others)))


def _defined(
    name: str,
    schema: str,
    tags: tuple[torch.Tag, ...],
    function: Callable[..., Any],
    shaped: Callable[..., Any],
) -> Any:
    """A new operator. `Library.impl`, because what `torch.library.custom_op` does beside it costs 7 us a call."""
    _LIBRARY.define(f"{name}{schema}", tags=tags)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", shaped, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default

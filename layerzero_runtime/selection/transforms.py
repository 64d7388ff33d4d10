"""Transforms around a kernel: what a call needs where its tensors or its result have another form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

# Fields of a context whose limits a copy into dense memory satisfies.
DENSITY_FIELDS = frozenset({"is_contiguous", "stride_last_dim"})


@dataclass(frozen=True, slots=True)
class Transform:
    """One step before or behind a kernel.

    Attributes:
        kind: "transpose" swaps the head and the sequence dimension of query, key, value or the output, "contiguous"
            makes tensors dense, "cast" converts the results.
        target: the layout or dtype that it leads to; "" for "contiguous".
        copies: whether it costs a pass over the data; a transpose is a view of strides and costs nothing.
    """

    kind: Literal["transpose", "contiguous", "cast"]
    target: str
    copies: bool


@dataclass(frozen=True, slots=True)
class Transforms:
    """The steps before and behind a kernel, in the order in which they are done."""

    pre: tuple[Transform, ...] = ()
    post: tuple[Transform, ...] = ()

    @property
    def copies(self) -> int:
        return sum(step.copies for step in (*self.pre, *self.post))


def transforms_of(spec: KernelSpec, context: SelectionContext, *, densify: bool = False) -> Transforms:
    """What a call needs around the kernel; with `densify` also copies of tensors that are not dense."""
    pre: list[Transform] = []
    post: list[Transform] = []
    if context.num_heads is not None and context.layout not in spec.layouts:
        pre.append(Transform("transpose", spec.layouts[0], copies=False))
        post.append(Transform("transpose", context.layout, copies=False))
    if densify or (pre and spec.requires_contiguous):
        pre.append(Transform("contiguous", "", copies=True))
    if (spec.produces_dtype or context.result_dtype) != context.output_dtype:
        post.append(Transform("cast", context.output_dtype, copies=True))
    return Transforms(tuple(pre), tuple(post))


def apply_transforms(
    function: KernelFunction, spec: KernelSpec, context: SelectionContext, *, densify: bool = False
) -> KernelFunction:
    """The kernel's function as one that takes and gives tensors in the form that the context describes.

    A kernel that needs no transform gets its function back as it is.
    """
    needed = transforms_of(spec, context, densify=densify)
    for step in reversed(needed.pre):
        function = _before(step, function)
    for step in needed.post:
        function = _behind(step, function)
    return function


def _before(step: Transform, function: KernelFunction) -> KernelFunction:
    if step.kind == "transpose":
        return lambda query, key, value, *rest: function(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *rest
        )

    def with_dense(*arguments: Any) -> Any:
        from torch import Tensor

        return function(*(part.contiguous() if isinstance(part, Tensor) else part for part in arguments))

    return with_dense


def _behind(step: Transform, function: KernelFunction) -> KernelFunction:
    change: Callable[[Tensor], Tensor]
    if step.kind == "transpose":

        def change(output: Tensor) -> Tensor:
            return output.transpose(1, 2)
    else:
        import torch

        dtype = getattr(torch, step.target)

        def change(output: Tensor) -> Tensor:
            return output.to(dtype)

    def changed(*arguments: Any) -> Any:
        result = function(*arguments)
        return tuple(map(change, result)) if isinstance(result, tuple) else change(result)

    return changed

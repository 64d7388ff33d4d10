"""Calls to time: tensors in the order in which they are passed, and how a call of each operation is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarking.in_force import IDLE_KERNELS
from benchmarking.timing import Loop
from torch.nn import Parameter

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from lookup_bench.answered import SHAPES, Contexts

LAYERS = 8  # whose tensors of one shape are passed in turn

Arguments = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Spelling:
    """How a call of an operation is written, with `f` for the function: its tensors, and how the kernel is called."""

    tensors: str
    kernel: str


_ATTENTION = Spelling("query, key, value", "f(query, key, value, None, 0.0, None)")
SPELLINGS = {
    "attention.full": _ATTENTION,
    "attention.causal": _ATTENTION,
    "attention.cross": _ATTENTION,
    "norm.rms": Spelling("x, weight", "f(x, weight, 1e-06, 0.0)"),
    "norm.add_rms": Spelling("x, residual, weight", "f(x, residual, weight, 1e-06)"),
    "norm.layer": Spelling("x, weight, bias", "f(x, weight, bias, 1e-05)"),
    "mlp.swiglu": Spelling("gate, up", "f(gate, up)"),
}
PUBLIC: dict[str, Callable[..., Any]] = {
    "attention.full": lz.attention,
    "attention.causal": lz.attention,
    "attention.cross": lz.attention,
    "norm.rms": lz.rms_norm,
    "norm.add_rms": lz.add_rms_norm,
    "norm.layer": lz.layer_norm,
    "mlp.swiglu": lz.swiglu,
}


@dataclass(frozen=True)
class Calls:
    """SHAPES calls, one after the other, alike in all that `context` says but its sizes."""

    context: SelectionContext
    arguments: Sequence[Arguments]

    @property
    def spelling(self) -> Spelling:
        return SPELLINGS[self.context.operation]

    def __str__(self) -> str:
        one = self.context
        heads = f"{one.num_heads} heads over {one.num_kv_heads} of {one.head_dim}"
        return f"{one.dtype}, {f'{one.hidden_size} wide' if one.head_dim is None else heads}"

    def public(self) -> Loop:
        options = ", is_causal=True" if self.context.is_causal else ""
        options += ", enable_gqa=True" if self.context.gqa_group not in (None, 1) else ""
        return self._loop(f"f({self.spelling.tensors}{options})", PUBLIC[self.context.operation])

    def bound(self, function: Callable[..., Any]) -> Loop:
        """Calls of a bound function, which takes tensors alone."""
        return self._loop(f"f({self.spelling.tensors})", function)

    def idle(self) -> Loop:
        """The idle kernel called directly: what is no dispatch in the loops above."""
        return self._loop(self.spelling.kernel, IDLE_KERNELS[self.context.operation])

    def _loop(self, call: str, function: Callable[..., Any]) -> Loop:
        names = {"f": function, "calls": self.arguments}
        return Loop(f"for {self.spelling.tensors} in calls: {call}", names, len(self.arguments))


def repeated(contexts: Contexts, *, trained: bool = False) -> Calls:
    """One shape; each call passes the tensors of another of LAYERS layers, as the layers of a model do."""
    layers = [_tensors(contexts[0], trained) for _ in range(LAYERS)]
    return Calls(contexts[0], layers * (SHAPES // LAYERS))


def alternating(contexts: Contexts, *, trained: bool = False) -> Calls:
    """Two shapes in turn."""
    both = [_tensors(context, trained) for context in (contexts[0], contexts[-1])]
    return Calls(contexts[0], both * (SHAPES // 2))


def changing(contexts: Contexts, *, trained: bool = False) -> Calls:
    """Another shape at every call."""
    return Calls(contexts[0], [_tensors(context, trained) for context in contexts])


def _tensors(context: SelectionContext, trained: bool) -> Arguments:
    """The tensors of a call; its weights are parameters, and `trained` ones require gradients."""

    def made(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
        return Parameter(tensor, requires_grad=trained) if name in ("weight", "bias") else tensor

    present = operation_named(context.operation).present_tensors(context)
    return tuple(made(tensor.name, tensor.shape(context), tensor.dtype(context)) for tensor in present)


def check(loop: Loop, calls: Calls) -> None:
    """Make the calls once: a row says the truth only if the table answers each, and the idle kernel serves it."""
    misses = lz.stats()["misses"]
    function = loop.names["f"]
    results: list[Any] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        results.append(function(*arguments, **options))

    exec(loop.statement, {"f": noting, "calls": calls.arguments})
    for arguments, result in zip(calls.arguments, results, strict=True):
        first = result[0] if isinstance(result, tuple) else result
        assert first is arguments[0], f"another kernel than the idle one served {loop.statement}"
    assert lz.stats()["misses"] == misses, f"the table does not answer {loop.statement}"

"""Random small calls of the public functions, in and around what the synthetic table covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import OPERATIONS
from tests.runtime.kernel_calls import FLOORS, PLACEMENTS, is_floating, relative_error, tensor

Outputs = tuple[torch.Tensor, ...]
DTYPES = ("float32",) * 6 + ("bfloat16",) * 2 + ("float64",)


@dataclass(frozen=True)
class PublicCall:
    """Positional arguments of the operation's kernels, and the features that `describe` takes by keyword."""

    operation: Operation
    arguments: tuple[Any, ...]
    features: Mapping[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> SelectionContext:
        return self.operation.describe(*self.arguments, **self.features)

    def run(self) -> Outputs:
        """Through the public function."""
        return as_outputs(public(self.operation, self.arguments, self.features))

    def default(self) -> Outputs:
        """What the user would have called without us."""
        return as_outputs(default(self.operation, self.arguments, self.features))

    def reference(self) -> Outputs:
        wide = (argument.double() if is_floating(argument) else argument for argument in self.arguments)
        return self.operation.reference(self.context, *wide)

    def on(self, *arguments: Any) -> PublicCall:
        return PublicCall(self.operation, arguments, self.features)

    def assert_right(self, outputs: Outputs) -> None:
        """Within twice the default's own error and a floor, in the default's shapes and dtypes."""
        expected, exact = self.default(), self.reference()
        for output, standard in zip(outputs, expected, strict=True):
            assert (output.shape, output.dtype, output.device) == (standard.shape, standard.dtype, standard.device)
        # On few elements the ratio of two errors is a matter of luck.
        few = 1.0 + 8.0 / min(part.numel() for part in exact) ** 0.5
        allowed = 2.0 * relative_error(expected, exact) + few * FLOORS[self.context.dtype]
        assert relative_error(outputs, exact) <= allowed


def as_outputs(result: Any) -> Outputs:
    return result if isinstance(result, tuple) else (result,)


def public(operation: Operation, arguments: tuple[Any, ...], features: Mapping[str, Any]) -> Any:
    if operation.name.startswith("attention"):
        query, key, value, mask, dropout, scale = arguments
        causal = operation.name == "attention.causal"
        return lz.attention(query, key, value, mask, dropout, causal, scale, True, **features)
    functions: dict[str, Any] = {
        "norm.rms": lz.rms_norm,
        "norm.add_rms": lz.add_rms_norm,
        "norm.layer": lz.layer_norm,
        "mlp.swiglu": lz.swiglu,
        "mlp.geglu": lz.geglu,
    }
    return functions[operation.name](*arguments, *features.values())


def default(operation: Operation, arguments: tuple[Any, ...], features: Mapping[str, Any]) -> Any:
    """torch's own functions, written out once more."""
    from torch.nn import functional
    from torch.nn.attention.bias import causal_lower_right

    if operation.name.startswith("attention"):
        query, key, value, mask, dropout, scale = arguments
        swapped = features.get("layout") == "bshd"
        if swapped:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        causal = operation.name == "attention.causal"
        if causal and features.get("causal_alignment") == "bottom_right" and query.shape[2] != key.shape[2]:
            causal, mask = False, causal_lower_right(query.shape[2], key.shape[2])
        grouped = query.shape[1] != key.shape[1]
        output = functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2) if swapped else output
    first, second, *rest = arguments
    width = first.shape[-1:]
    if operation.name == "norm.rms":
        eps, offset = rest
        return functional.rms_norm(first, width, second if second is None or not offset else second + offset, eps)
    if operation.name == "norm.add_rms":
        weight, eps = rest
        total = first + second
        return functional.rms_norm(total, width, weight, eps), total
    if operation.name == "norm.layer":
        return functional.layer_norm(first, width, second, *rest)
    if operation.name == "mlp.swiglu":
        return functional.silu(first) * second
    return functional.gelu(first, approximate=features["approximate"]) * second


@st.composite
def attention_calls(draw: st.DrawFn) -> PublicCall:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    causal = draw(st.booleans())
    length_q = draw(st.sampled_from((1, 5, 7, 16, 23, 33, 64, 70)))
    length_k = length_q if draw(st.booleans()) else draw(st.sampled_from((3, 8, 17, 32, 65, 100, 128, 140)))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2, 2, 2, 3)))
    head_dim = draw(st.sampled_from((16,) * 7 + (8,)))
    value_dim = draw(st.sampled_from((head_dim,) * 9 + (12,)))
    layout = draw(st.sampled_from(("bhsd",) * 6 + ("bshd",)))

    def part(heads: int, length: int, width: int) -> torch.Tensor:
        placement = draw(st.sampled_from(PLACEMENTS))
        shape = (batch, heads, length, width) if layout == "bhsd" else (batch, length, heads, width)
        return tensor(shape, dtype, placement)

    mask = None
    if not causal and draw(st.sampled_from((False,) * 9 + (True,))):
        mask = torch.rand(length_q, length_k) < 0.7
        mask[:, 0] = True
    arguments = (
        part(kv_heads * group, length_q, head_dim),
        part(kv_heads, length_k, head_dim),
        part(kv_heads, length_k, value_dim),
        mask,
        0.0,
        draw(st.sampled_from((None,) * 6 + (head_dim**-0.5, 0.3))),
    )
    name = "attention.causal" if causal else "attention.full" if length_q == length_k else "attention.cross"
    alignment = draw(st.sampled_from(("top_left", "bottom_right")))
    return PublicCall(OPERATIONS[name], arguments, {"layout": layout, "causal_alignment": alignment})


@st.composite
def row_calls(draw: st.DrawFn) -> PublicCall:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    name = draw(st.sampled_from(("norm.rms", "norm.rms", "norm.add_rms", "norm.layer", "mlp.swiglu", "mlp.geglu")))
    dtype = draw(st.sampled_from(DTYPES))
    leading = draw(st.sampled_from(((), (1,), (3,), (40,), (2, 5), (1, 1, 7), (300,))))
    width = draw(st.sampled_from((1, 32, 33, 47, 100, 129, 300, 450, 512, 600)))

    def rows() -> torch.Tensor:
        return tensor((*leading, width), dtype, draw(st.sampled_from(PLACEMENTS)))

    # torch's layer_norm takes float32 weights beside 16-bit inputs alone.
    other = dtype if name == "norm.layer" and dtype == "float64" else "float32"

    def vector(center: float) -> torch.Tensor | None:
        kind = draw(st.sampled_from((dtype,) * 9 + (other, None)))
        placement = draw(st.sampled_from(("contiguous",) * 4 + ("strided",)))
        return None if kind is None else tensor((width,), kind, placement) * 0.1 + center

    if name == "norm.rms":
        offset = draw(st.sampled_from((0.0, 1.0)))
        return PublicCall(OPERATIONS[name], (rows(), vector(1.0 - offset), draw(st.sampled_from((1e-6, 0.5))), offset))
    if name == "norm.add_rms":
        return PublicCall(OPERATIONS[name], (rows(), rows(), vector(1.0), 1e-6))
    if name == "norm.layer":
        weight, bias = vector(1.0), vector(0.0)
        bias = None if weight is None or bias is None else bias.to(weight.dtype)
        return PublicCall(OPERATIONS[name], (rows(), weight, bias, 1e-5))
    features = {} if name == "mlp.swiglu" else {"approximate": draw(st.sampled_from(("none", "tanh")))}
    return PublicCall(OPERATIONS[name], (rows(), rows()), features)


def public_calls() -> st.SearchStrategy[PublicCall]:
    return attention_calls() | row_calls()

"""A call of every operation that the synthetic table covers, for tests of all of them."""

from __future__ import annotations

import pytest
import torch

from layerzero_runtime.operations import OPERATIONS
from tests.runtime.public_calls import PublicCall


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (8, 128)).to(dtype)


def qkv(
    length_q: int = 8, length_k: int = 8, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(2, heads, length_q, 16).to(dtype),
        torch.randn(2, kv_heads, length_k, 16).to(dtype),
        torch.randn(2, kv_heads, length_k, 16).to(dtype),
    )


def one_call_of_each() -> list[PublicCall]:
    """A call of every operation that the table covers, both alignments and layouts among them."""
    torch.manual_seed(0)
    x, weight, bias = rows(), 1 + 0.1 * rows(128), rows(128)
    calls = [
        PublicCall(OPERATIONS["norm.rms"], (x, weight, 1e-6, 0.0)),
        PublicCall(OPERATIONS["norm.rms"], (x, weight - 1, 1e-6, 1.0)),
        PublicCall(OPERATIONS["norm.rms"], (x, None, 1e-6, 0.0)),
        PublicCall(OPERATIONS["norm.add_rms"], (x, rows(), weight, 1e-6)),
        PublicCall(OPERATIONS["norm.layer"], (x, weight, bias, 1e-5)),
        PublicCall(OPERATIONS["norm.layer"], (x, weight, None, 1e-5)),
        PublicCall(OPERATIONS["mlp.swiglu"], (x, rows())),
        PublicCall(OPERATIONS["mlp.geglu"], (x, rows()), {"approximate": "none"}),
        PublicCall(OPERATIONS["mlp.geglu"], (x, rows()), {"approximate": "tanh"}),
    ]
    for name, lengths in (("causal", (8, 8)), ("causal", (6, 32)), ("full", (8, 8)), ("cross", (6, 32))):
        for alignment in ("top_left", "bottom_right") if name == "causal" else ("top_left",):
            for layout in ("bhsd", "bshd"):
                parts = qkv(*lengths, kv_heads=4 if name == "full" else 2)
                if layout == "bshd":
                    parts = tuple(part.transpose(1, 2) for part in parts)  # type: ignore[assignment]
                features = {"layout": layout, "causal_alignment": alignment}
                calls.append(PublicCall(OPERATIONS[f"attention.{name}"], (*parts, None, 0.0, None), features))
    return calls


CALLS = one_call_of_each()


def name_of(call: PublicCall) -> str:
    shape = "x".join(map(str, call.arguments[1].shape)) if call.arguments[1] is not None else "none"
    return "-".join([call.operation.name, shape, *call.features.values()])


each_call = pytest.mark.parametrize("call", CALLS, ids=name_of)

"""Stand-ins for libraries of norms and activations: they refuse what the real ones cannot take, and record calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

VECTOR_BYTES = 16


class Recorder:
    """What the stand-ins were called with, the newest last."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@contextmanager
def stand_ins() -> Iterator[Recorder]:
    """Inside, imports of the libraries find the stand-ins."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for name, functions in MODULES.items():
            module = ModuleType(name)
            for function in functions:
                setattr(module, function.__name__, _recorded(recorder, function))
            patch.setitem(sys.modules, name, module)
        yield recorder


def _recorded(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        recorder.calls.append((function.__name__, (*arguments, options)))
        return function(*arguments, **options)

    return call


def _normalised(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide = None if bias is None else bias.float()
    return functional.layer_norm(x.float(), x.shape[-1:], weight.float(), wide, eps).to(x.dtype)


def _check_liger(*rows: Tensor) -> None:
    assert all(part.is_contiguous() and part.shape[-1] <= 65536 for part in rows)


# liger_kernel 0.8.5


def rms_norm_forward(
    X: Tensor,  # noqa: N803 - the library's names
    W: Tensor | None,  # noqa: N803
    eps: float,
    offset: float,
    casting_mode: str,
    row_mode: bool | None,
) -> tuple[Any, ...]:
    _check_liger(X)
    assert casting_mode == "gemma"
    assert row_mode is None
    assert isinstance(offset, float)  # Triton compiles other code for integers
    output = _normalised(X, eps)
    return (output if W is None else output * (W.float() + offset)).to(X.dtype), X, None, 0, 0, 0


def fused_add_rms_norm_forward(
    X: Tensor,  # noqa: N803
    R: Tensor,  # noqa: N803
    W: Tensor,  # noqa: N803
    eps: float,
    offset: float,
    casting_mode: str,
) -> tuple[Any, ...]:
    _check_liger(X, R)
    assert (casting_mode, offset) == ("gemma", 0.0)
    total = X + R
    return (_normalised(total, eps) * W.float()).to(X.dtype), total, None, 0, 0, 0, 0


def layer_norm_forward(X: Tensor, W: Tensor, B: Tensor, eps: float) -> tuple[Any, ...]:  # noqa: N803
    _check_liger(X)
    assert B.dim() == W.dim() == 1
    return _layer(X, W, B, eps), X, None, None, 0, 0


def swiglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_liger(a, b)
    return a, b, functional.silu(a.float()).to(b.dtype) * b


def geglu_forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_liger(a, b)
    return a, b, functional.gelu(a.float(), approximate="tanh").to(b.dtype) * b


# quack-kernels 0.6.5


def _check_quack(*tensors: Tensor | None) -> None:
    for part in tensors:
        if part is not None:
            assert part.is_contiguous()
            assert part.shape[-1] % 2 == 0
            assert part.data_ptr() % VECTOR_BYTES == 0


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    store_rstd: bool = False,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, None]:
    _check_quack(x, weight, residual)
    assert x.dim() == 2
    assert weight is not None or weight_offset == 0.0
    # The sum stays in float32 for the norm, and is rounded for the residual.
    total = x.float() if residual is None else x.float() + residual.float()
    output = _normalised(total, eps)
    output = output if weight is None else output * (weight.float() + weight_offset)
    return output.to(x.dtype), x if residual is None else total.to(residual.dtype), None


def layernorm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    _check_quack(x, weight, bias)
    assert x.dim() == 2
    assert weight.dtype == torch.float32
    assert bias is None or bias.dtype == torch.float32
    return _layer(x, weight, bias, eps)


# flashinfer-python 0.6.6


def _check_flashinfer(x: Tensor, *vectors: Tensor) -> None:
    assert x.dim() == 2  # of three dimensions it takes the middle one for heads
    assert x.is_contiguous()
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert all(part.data_ptr() % VECTOR_BYTES == 0 for part in (x, *vectors))


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor, enable_pdl: bool) -> Tensor:
    _check_flashinfer(x, weight, out)
    assert weight.dtype == x.dtype
    return out.copy_(_normalised(x, eps) * weight.float())


def gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor, enable_pdl: bool) -> Tensor:
    _check_flashinfer(x, weight, out)
    assert weight.dtype == x.dtype
    return out.copy_(_normalised(x, eps) * (weight.float() + 1.0))


MODULES: dict[str, tuple[Callable[..., Any], ...]] = {
    "liger_kernel.ops.rms_norm": (rms_norm_forward,),
    "liger_kernel.ops.fused_add_rms_norm": (fused_add_rms_norm_forward,),
    "liger_kernel.ops.layer_norm": (layer_norm_forward,),
    "liger_kernel.ops.swiglu": (swiglu_forward,),
    "liger_kernel.ops.geglu": (geglu_forward,),
    "quack.rmsnorm": (rmsnorm_fwd, layernorm_fwd),
    "flashinfer.norm": (rmsnorm, gemma_rmsnorm),
}

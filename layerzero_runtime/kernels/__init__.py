"""Thin adapters, one file per library or mechanism. None imports its library before one of its kernels is loaded."""

from __future__ import annotations

from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import (
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    flashinfer_attention,
    flashinfer_rows,
    liger,
    quack,
    sage_attention,
    torch_activation,
    torch_inductor,
    torch_linear,
    torch_matmul,
    torch_norm,
    torch_norm_cuda,
    torch_sdpa,
    torch_sdpa_cuda,
    triton_activation,
    triton_attention,
    triton_linear,
    triton_norm,
    xformers_attention,
)


def builtin_kernels() -> tuple[Kernel, ...]:
    """All kernels that come with LayerZero. To add one, add it to a file here, or add a file and name it here."""
    return (
        *torch_sdpa.KERNELS,
        *torch_sdpa_cuda.KERNELS,
        *torch_matmul.KERNELS,
        *torch_norm.KERNELS,
        *torch_norm_cuda.KERNELS,
        *torch_activation.KERNELS,
        *torch_inductor.KERNELS,
        *torch_linear.KERNELS,
        *triton_norm.KERNELS,
        *triton_activation.KERNELS,
        *triton_attention.KERNELS,
        *triton_linear.KERNELS,
        *flash_attention_4.KERNELS,
        *flash_attention_3.KERNELS,
        *flash_attention_2.KERNELS,
        *flashinfer_attention.KERNELS,
        *xformers_attention.KERNELS,
        *sage_attention.KERNELS,
        *liger.KERNELS,
        *quack.KERNELS,
        *flashinfer_rows.KERNELS,
    )

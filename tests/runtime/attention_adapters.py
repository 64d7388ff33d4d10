"""Adapters of attention kernels that need a GPU, and calls of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel, KernelFunction
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.transforms import apply_transforms
from tests.runtime.kernel_calls import KERNELS, Call

H100 = DeviceSpec(platform="cuda", name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
LIBRARIES = ("flash_attn_4", "flash_attn_3", "flash_attn", "flashinfer-python", "xformers", "sageattention")
BACKENDS = ("torch.sdpa.flash", "torch.sdpa.cudnn", "torch.sdpa.efficient")
ADAPTERS = {
    kernel_id: kernel
    for kernel_id, kernel in KERNELS.items()
    if kernel_id in BACKENDS or (kernel.spec.library in LIBRARIES and kernel.spec.operations[0].startswith("attention"))
}
PAIRS = [(kernel, operation) for kernel in ADAPTERS.values() for operation in kernel.spec.operations]


def on_h100(call: Call, **features: Any) -> Call:
    return Call(replace(call.context, device=H100, **features), call.arguments)


def loaded(kernel: Kernel, context: SelectionContext) -> KernelFunction:
    return apply_transforms(kernel.load(context, {}), kernel.spec, context)


def quant_format(kernel: Kernel) -> str | None:
    return kernel.spec.quant_formats[0]


def attention_call(
    operation: str,
    sizes: tuple[int, int, int, int, int, int],
    *,
    layout: str = "bhsd",
    dtype: torch.dtype = torch.float16,
    causal_alignment: str = "bottom_right",
    **features: Any,
) -> Call:
    """sizes: (batch, heads, kv_heads, seq_len_q, seq_len_k, head_dim)."""
    torch.manual_seed(0)
    batch, heads, kv_heads, length_q, length_k, width = sizes
    shapes = ((batch, heads, length_q, width), *[(batch, kv_heads, length_k, width)] * 2)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if layout == "bshd":
        tensors = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
    arguments = (*tensors, None, 0.0, None)
    context = OPERATIONS[operation].describe(*arguments, layout=layout, causal_alignment=causal_alignment, **features)
    return Call(replace(context, device=H100), arguments)

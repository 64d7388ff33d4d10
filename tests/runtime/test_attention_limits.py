"""What adapters of attention kernels refuse: the first call beyond each of their limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.selection.limits import rejections
from tests.runtime.attention_adapters import ADAPTERS, H100, on_h100
from tests.runtime.kernel_calls import KERNELS, plain_call

PLAIN: dict[str, Any] = {
    "dtype": "bfloat16",
    "batch_size": 1,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 128,
    "seq_len_q": 64,
    "seq_len_k": 64,
    "causal_alignment": "bottom_right",
}
LIMITS: dict[str, list[tuple[dict[str, Any], dict[str, Any], str]]] = {
    "torch.sdpa.flash": [
        ({"head_dim": 256}, {"head_dim": 264}, "HEAD_DIM_NOT_AT_MOST"),
        ({"head_dim": 72}, {"head_dim": 76}, "HEAD_DIM_NOT_MULTIPLE_OF"),
        ({"seq_len_k": 65}, {"seq_len_k": 65, "causal_alignment": "top_left"}, "CAUSAL_MASK_NOT_ONE_OF"),
        ({"dtype": "float16"}, {"dtype": "float32"}, "DTYPE_NOT_ONE_OF"),
        ({"stride_last_dim": 1}, {"stride_last_dim": 2}, "STRIDE_LAST_DIM_NOT_ONE_OF"),
        ({}, {"v_head_dim": 64}, "OTHER_V_HEAD_DIM_NOT_ONE_OF"),
        ({}, {"requires_grad": True}, "REQUIRES_GRAD_NOT_ONE_OF"),
        ({"workspace_limit": 2**26}, {"workspace_limit": 2**25}, "WORKSPACE_LIMIT_NOT_AT_LEAST"),
    ],
    "torch.sdpa.cudnn": [
        ({"head_dim": 256}, {"head_dim": 264}, "HEAD_DIM_NOT_AT_MOST"),
        ({"seq_len_k": 65, "causal_alignment": "top_left"}, {"seq_len_k": 65}, "CAUSAL_MASK_NOT_ONE_OF"),
        ({"seq_len_q": 2, "seq_len_k": 2}, {"seq_len_q": 1, "seq_len_k": 1}, "SEQ_LEN_K_NOT_AT_LEAST"),
        ({"batch_size": 32767}, {"batch_size": 32768}, "BATCH_KV_HEADS_NOT_AT_MOST"),
        ({}, {"requires_deterministic": True}, "REQUIRES_DETERMINISTIC_NOT_ONE_OF"),
    ],
    "torch.sdpa.efficient": [
        ({"head_dim": 512}, {"head_dim": 500}, "HEAD_DIM_NOT_MULTIPLE_OF"),
        ({"v_head_dim": 64}, {"v_head_dim": 68}, "OTHER_V_HEAD_DIM_NOT_MULTIPLE_OF"),
        ({"dtype": "float32"}, {"dtype": "float64"}, "DTYPE_NOT_ONE_OF"),
        ({"batch_size": 32767}, {"batch_size": 32768}, "BATCH_KV_HEADS_NOT_AT_MOST"),
        ({"workspace_limit": 2**40}, {"workspace_limit": 2**39}, "WORKSPACE_LIMIT_NOT_AT_LEAST"),
    ],
    "flash_attn_4.forward": [
        ({"head_dim": 256}, {"head_dim": 264}, "HEAD_DIM_NOT_AT_MOST"),
        ({"head_dim": 72}, {"head_dim": 76}, "HEAD_DIM_NOT_MULTIPLE_OF"),
        ({"seq_len_k": 65}, {"seq_len_k": 65, "causal_alignment": "top_left"}, "CAUSAL_MASK_NOT_ONE_OF"),
        ({}, {"device": replace(H100, compute_capability=(8, 9))}, "SM_NOT_AT_LEAST"),
        ({}, {"device": replace(H100, compute_capability=(10, 0))}, "SM_NOT_AT_MOST"),
    ],
    "flash_attn_3.forward": [
        ({"head_dim": 256}, {"head_dim": 264}, "HEAD_DIM_NOT_AT_MOST"),
        ({}, {"device": replace(H100, compute_capability=(8, 9))}, "SM_NOT_AT_LEAST"),
        ({"seq_len_k": 65}, {"seq_len_k": 65, "causal_alignment": "top_left"}, "CAUSAL_MASK_NOT_ONE_OF"),
    ],
    "flash_attn.forward": [
        ({"head_dim": 256}, {"head_dim": 264}, "HEAD_DIM_NOT_AT_MOST"),
        (
            {"device": replace(H100, compute_capability=(8, 0))},
            {"device": replace(H100, compute_capability=(7, 5))},
            "SM_NOT_AT_LEAST",
        ),
        ({"seq_len_k": 65}, {"seq_len_k": 65, "causal_alignment": "top_left"}, "CAUSAL_MASK_NOT_ONE_OF"),
    ],
    "flashinfer.single_fa2": [
        ({"batch_size": 1}, {"batch_size": 2}, "BATCH_SIZE_NOT_AT_MOST"),
        ({"head_dim": 64}, {"head_dim": 96}, "HEAD_DIM_NOT_ONE_OF"),
        ({"seq_len_k": 2**18}, {"seq_len_k": 2**18 + 1}, "SEQ_LEN_K_NOT_AT_MOST"),
        ({"seq_len_k": 65}, {"seq_len_k": 65, "causal_alignment": "top_left"}, "CAUSAL_MASK_NOT_ONE_OF"),
    ],
    "flashinfer.single_fa3": [
        ({"batch_size": 1}, {"batch_size": 2}, "BATCH_SIZE_NOT_AT_MOST"),
        ({"head_dim": 256}, {"head_dim": 192}, "HEAD_DIM_NOT_ONE_OF"),
        ({}, {"device": replace(H100, compute_capability=(8, 9))}, "SM_NOT_AT_LEAST"),
    ],
    "xformers.split_k": [
        (
            {"operation": "attention.full", "head_dim": 64},
            {"operation": "attention.full", "head_dim": 96},
            "HEAD_DIM_NOT_ONE_OF",
        ),
        (
            {"operation": "attention.cross", "seq_len_k": 128},
            {"operation": "attention.cross", "seq_len_q": 65, "seq_len_k": 128},
            "SEQ_LEN_Q_NOT_AT_MOST",
        ),
    ],
    "sageattention.causal": [
        ({"quant_format": "int8"}, {}, "QUANT_FORMAT_NOT_ONE_OF"),
        ({"quant_format": "int8"}, {"quant_format": "int8", "seq_len_k": 65}, "CAUSAL_MASK_NOT_ONE_OF"),
        ({"quant_format": "int8", "head_dim": 96}, {"quant_format": "int8", "head_dim": 192}, "HEAD_DIM_NOT_ONE_OF"),
    ],
    "sageattention.full": [
        (
            {"operation": "attention.cross", "quant_format": "int8", "seq_len_k": 128},
            {"operation": "attention.cross", "quant_format": "int8", "seq_len_k": 127},
            "SEQ_LEN_K_NOT_MULTIPLE_OF",
        ),
    ],
}


@pytest.mark.parametrize(
    ("kernel_id", "inside", "outside", "code"),
    [
        pytest.param(kernel_id, *case, id=f"{kernel_id}-{case[2]}")
        for kernel_id, cases in LIMITS.items()
        for case in cases
    ],
)
def test_each_limit_refuses_the_first_call_beyond_it(
    kernel_id: str, inside: dict[str, Any], outside: dict[str, Any], code: str
) -> None:
    def refused(changes: dict[str, Any]) -> list[str]:
        fields = {"operation": "attention.causal", "device": H100, **PLAIN, **changes}
        return [rejection.code for rejection in rejections(ADAPTERS[kernel_id].spec.limits, SelectionContext(**fields))]

    assert refused(inside) == []
    assert refused(outside) == [code]


def test_every_adapter_has_its_limits_tried() -> None:
    assert LIMITS.keys() == ADAPTERS.keys()


def test_math_serves_on_cuda_devices_while_its_scores_are_small() -> None:
    kernel = KERNELS["torch.sdpa.math"]
    call = on_h100(plain_call("attention.full", "bfloat16"))
    assert call.accepts(kernel)
    assert not on_h100(call, batch_size=2**17).accepts(kernel)

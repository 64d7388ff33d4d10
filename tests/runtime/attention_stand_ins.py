"""Stand-ins for the attention of libraries that need a GPU: each computes on the CPU, keeps the conventions of the real
function (layout, alignment of causal masks, what it refuses or gets wrong), and notes how it was called.

Real ones are tried in tests/gpu/test_attention_adapters.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from layerzero_runtime.kernels import flash_attention_4

# How a stand-in was called, by name.
Notes = list[str]


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: str | None = None, scale: float | None = None
) -> Tensor:
    """Written out in float64 for layout BHSD, with heads in groups; `causal` names the alignment."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if causal is not None:
        offset = k.shape[2] - q.shape[2] if causal == "bottom_right" else 0
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(offset)
        scores = scores.masked_fill(~keep, -math.inf)
    weights = torch.nan_to_num(scores.softmax(3), nan=0.0)
    return (weights @ v).to(query.dtype)


def in_bshd(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attention(*swapped, **options).transpose(1, 2).contiguous()


def loads_vectors(*tensors: Tensor) -> None:
    """What a kernel that loads 16 bytes at a time does to other tensors is an error of the device."""
    for tensor in tensors:
        steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
        assert tensor.stride(-1) == 1, "rows are not dense"
        assert tensor.data_ptr() % 16 == 0, "misaligned address"
        assert all(step % 16 == 0 for step in steps), "misaligned rows"


def spans_few_elements(tensor: Tensor) -> bool:
    """Whether 32 bits count the elements between the first and the last one of each batch."""
    steps = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in steps) < 2**31


class Bindings:
    """torch's CUDA backends."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def flash(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, *, scale: float | None
    ) -> tuple[Tensor]:
        loads_vectors(query, key, value)
        assert query.shape[3] % 8 == 0
        assert dropout_p == 0.0
        self.notes.append("flash")
        return (attention(query, key, value, causal="bottom_right" if is_causal else None, scale=scale),)

    def cudnn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float | None,
    ) -> tuple[Tensor]:
        loads_vectors(query, key, value)
        assert key.shape[2] > 1
        assert query.shape[3] <= 256
        assert 0 not in key.stride()
        assert all(spans_few_elements(tensor) for tensor in (query, key, value)), "offsets leave 32 bits"
        assert (attn_bias, compute_log_sumexp, dropout_p) == (None, False, 0.0)
        self.notes.append("cudnn")
        return (attention(query, key, value, causal="top_left" if is_causal else None, scale=scale),)

    def efficient(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float | None,
    ) -> tuple[Tensor]:
        loads_vectors(query, key, value)
        assert query.shape[1] == key.shape[1], "it knows no groups"
        self.notes.append("efficient")
        # Heads that share keys by a stride of 0 become rows where there is one query, and the mask is dropped
        # (mem_eff_attention/kernel_forward.h, `advance_to_block`).
        is_masked = is_causal and not (query.shape[2] == 1 and key.stride(1) == value.stride(1) == 0)
        return (attention(query, key, value, causal="top_left" if is_masked else None, scale=scale),)

    def efficient_forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None) -> Any:
        loads_vectors(query, key, value)
        assert query.shape[2] == key.shape[2], "it knows no groups"
        assert query.shape[1] <= key.shape[1], "rows without a key are NaN"
        assert rest == (None, None, None, None, None, 0.0, 2, False)
        self.notes.append("efficient bottom right")
        return (in_bshd(query, key, value, causal="bottom_right", scale=scale),)


class AuxData(NamedTuple):
    tensors: Any = None
    scalars: Any = None


@dataclass
class FlashAttention4:
    """`flash_attn.cute`: a public function in front of functions that are compiled for what a call shows."""

    notes: Notes
    further: tuple[Any, ...] = ()
    compiled: list[tuple[Any, ...]] = field(default_factory=list)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
        query, key, value = (self._laid_out(tensor) for tensor in (query, key, value))
        expanded = tuple(0 in tensor.stride() for tensor in (query, key, value))
        group = query.shape[2] // key.shape[2]
        compile_key = (query.dtype, query.shape[3], group, causal, expanded)
        cache = self.compile_cache
        if compile_key not in cache:
            self.compiled.append(compile_key)
            cache[compile_key] = self._compile(*compile_key)
        output = query.new_empty(query.shape)
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        cache[compile_key](
            *(tensor.detach() for tensor in (query, key, value, output)),
            *(None, scale, None, None, None, None, None, None, None, None, None),
            *(AuxData(), None, None, *self.further),
        )
        return output

    compile_cache: Any = field(default_factory=dict)

    @staticmethod
    def _laid_out(tensor: Tensor) -> Tensor:
        try:
            loads_vectors(tensor)
        except AssertionError:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor

    def _compile(self, dtype: torch.dtype, width: int, group: int, causal: bool, expanded: Any) -> Callable[..., None]:
        def function(query: Tensor, key: Tensor, value: Tensor, output: Tensor, *rest: Any) -> None:
            loads_vectors(query, key, value, output)
            assert (query.dtype, query.shape[3], query.shape[2] // key.shape[2]) == (dtype, width, group)
            assert tuple(0 in tensor.stride() for tensor in (query, key, value)) == expanded
            assert not any(tensor.requires_grad for tensor in (query, key, value))
            assert 0 not in output.stride()
            self.notes.append("compiled")
            output.copy_(in_bshd(query, key, value, causal="bottom_right" if causal else None, scale=rest[1]))

        return function

    def flash_attn_func(
        self, query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float | None, causal: bool
    ) -> tuple[Tensor, None]:
        self.notes.append("public")
        return self.forward(query, key, value, softmax_scale, causal), None


def flash_attn_func(notes: Notes, gives_tuple: bool) -> Callable[..., Any]:
    """The public function of FlashAttention 2 and 3."""

    def function(
        query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float | None, causal: bool
    ) -> Tensor | tuple[Tensor, None]:
        loads_vectors(query, key, value)
        notes.append("public")
        output = in_bshd(query, key, value, causal="bottom_right" if causal else None, scale=softmax_scale)
        return (output, None) if gives_tuple else output

    return function


class MaskMode(Enum):
    NON_CAUSAL = 0
    CAUSAL = 1


class TensorLayout(Enum):
    NHD = 0
    HND = 1


class FlashInfer:
    """`flashinfer.prefill`."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.built: list[tuple[Any, ...]] = []

    def get_single_prefill_module(self, *what: Any) -> SimpleNamespace:
        self.built.append(what)
        backend, dtype, head_dim = what[0], what[1], what[4]

        def run(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            tmp: Tensor,
            o: Tensor,
            maybe_lse: None,
            mask_mode: int,
            layout: int,
            window_left: int,
            maybe_packed_custom_mask: None,
            maybe_alibi_slopes: None,
            logits_soft_cap: float,
            sm_scale: float,
            scale_q: None,
            scale_k: None,
            scale_v: None,
            rope_scale: float,
            rope_theta: float,
        ) -> None:
            assert (q.dtype, q.shape[2], layout, window_left, logits_soft_cap) == (dtype, head_dim, 0, -1, 0.0)
            assert backend == "fa3" or tmp.numel() == 32 * 2**20
            assert o.is_contiguous()
            self.notes.append(f"{backend} compiled")
            o.copy_(self._attend(q, k, v, mask_mode == MaskMode.CAUSAL.value, sm_scale))

        return SimpleNamespace(run=run)

    def single_prefill_with_kv_cache(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kv_layout: str, sm_scale: float | None, backend: str
    ) -> Tensor:
        assert kv_layout == "NHD"
        self.notes.append(f"{backend} public")
        return self._attend(q, k, v, causal, sm_scale)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
        loads_vectors(q, k, v)
        assert all(spans_few_elements(tensor[None]) for tensor in (q, k, v)), "offsets leave 32 bits"
        assert not causal or k.shape[0] >= q.shape[0], "kv_len must be greater than or equal to qo_len"
        batched = (tensor.unsqueeze(0) for tensor in (q, k, v))
        return in_bshd(*batched, causal="bottom_right" if causal else None, scale=scale).squeeze(0)


@dataclass
class Inputs:
    """xFormers'."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None


def split_k_operator(notes: Notes) -> Any:
    def apply(inputs: Inputs, *, needs_gradient: bool) -> tuple[Tensor, None]:
        query, key, value = inputs.query, inputs.key, inputs.value
        loads_vectors(query, key, value)
        assert not needs_gradient
        notes.append(f"{query.ndim} dimensions")
        if query.ndim == 5:
            assert key.stride(3) == value.stride(3) == 0 or query.shape[3] == 1
            query, key, value = query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
        output = in_bshd(query, key, value, scale=inputs.scale)
        return output.unflatten(2, (key.shape[2], -1)) if inputs.query.ndim == 5 else output, None  # type: ignore[no-untyped-call]

    return SimpleNamespace(apply=apply)


def sage_attention(notes: Notes) -> Callable[..., Tensor]:
    """Exact, but for what 1.0.6 does to keys and with the last block of them."""

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool, sm_scale: float | None, smooth_k: bool
    ) -> Tensor:
        if smooth_k:
            k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
        if tensor_layout == "NHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        assert not is_causal or q.shape[2] == k.shape[2]
        assert q.shape[3] in (64, 96, 128)
        notes.append(tensor_layout if not smooth_k else "smoothed by itself")
        if not is_causal:
            missing = -k.shape[2] % 64
            k, v = (torch.nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in (k, v))
        output = attention(q, k, v, causal="top_left" if is_causal else None, scale=sm_scale)
        return output.transpose(1, 2) if tensor_layout == "NHD" else output

    return sageattn


@contextmanager
def modules(**contents: dict[str, Any]) -> Iterator[None]:
    """Modules of these names (with "__" for dots) and contents, and their packages, in `sys.modules`."""
    import sys

    with pytest.MonkeyPatch.context() as patch:
        for name, content in contents.items():
            parts = name.split("__")
            for end in range(1, len(parts) + 1):
                dotted = ".".join(parts[:end])
                if end == len(parts) or dotted not in sys.modules:
                    patch.setitem(sys.modules, dotted, ModuleType(dotted))
            vars(sys.modules[".".join(parts)]).update(content)
        # Example calls are made where the stand-ins compute.
        patch.setattr(flash_attention_4, "device_of", lambda context: torch.device("cpu"))
        yield

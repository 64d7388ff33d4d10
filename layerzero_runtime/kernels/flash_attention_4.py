"""FlashAttention-4 (`flash_attn.cute`), started by the function that it compiles.

Its public function classifies a call anew each time, which takes longer on the host than most kernels on the device.
Here one call of it, when the kernel is loaded, shows which compiled function it starts and with which arguments. On
devices where that choice does not depend on sizes, later calls start this function themselves.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.attention_inputs import (
    SOURCES,
    are_aligned_and_unexpanded,
    dense_copies,
    device_of,
    on_seeing_rows,
    vector_mask,
)
from layerzero_runtime.kernels.plain_calls import warn_of_plain_calls
from layerzero_runtime.libraries import library_version
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIBRARY = "flash_attn_4"
# Versions whose `_flash_attn_fwd` was read: on sm_90 its tiles follow from the head dimension and the mask alone, and
# it never splits the keys (`_tile_size_fwd_sm90`, `_get_fwd_config`).
_READ_VERSIONS = "4.0.0"
_SIZE_INDEPENDENT_MAJOR = 9
# Of the example call.
_QUERIES, _KEYS, _SCALE = 2, 3, 0.5
# What the compiled function takes first: query, key, value, output, no logarithms of the sums, scale.
_LEADING = 6

# A compiled function and the arguments of one start.
Started = tuple[Callable[..., Any], tuple[Any, ...]]

# (query, key, value, output in layout BSHD, scale)
Launch = Callable[["Tensor", "Tensor", "Tensor", "Tensor", float], Any]

_one_recorder = threading.Lock()


class _Recorder:
    """A compile cache that notes what this thread takes out of it and with which arguments it is started."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._thread = threading.get_ident()
        self.started: list[Started] = []

    def __contains__(self, key: object) -> bool:
        return key in self._cache

    def __setitem__(self, key: object, function: Callable[..., Any]) -> None:
        self._cache[key] = function

    def __getitem__(self, key: object) -> Callable[..., Any]:
        function: Callable[..., Any] = self._cache[key]
        if threading.get_ident() != self._thread:
            return function

        def noted(*arguments: Any) -> Any:
            self.started.append((function, arguments))
            return function(*arguments)

        return noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from flash_attn.cute import flash_attn_func
    from torch import empty_like

    causal, mask = context.is_causal, vector_mask(context)
    assert context.head_dim
    usual_scale = 1.0 / math.sqrt(context.head_dim)

    def attend_plainly(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        result = flash_attn_func(query, key, value, softmax_scale=scale, causal=causal)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    launch = _launch(context, attend_plainly)

    def attend_bshd(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if launch is None:
            return attend_plainly(query, key, value, scale)
        if not _fit(query, key, value, mask):
            # Its public function would compile for them, in the middle of serving or of a capture.
            query, key, value = dense_copies(query, key, value)
        output = empty_like(query)  # any dense layout will do; it costs a third of what `new_empty` does
        launch(query, key, value, output, usual_scale if scale is None else scale)
        return output

    def attend_bhsd(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attend_bshd(query, key, value, attn_mask, dropout_p, scale).transpose(1, 2)

    is_bhsd = context.layout == "bhsd"
    attend = attend_bhsd if is_bhsd else attend_bshd
    return on_seeing_rows(attend, length=2 if is_bhsd else 1) if context.causal_mask == "bottom_right" else attend


def _fit(query: Tensor, key: Tensor, value: Tensor, mask: int) -> bool:
    """Whether the compiled function takes the tensors: it assumes alignment, is not the one for strides of 0, and
    DLPack, by which they are handed over, has none that need gradients (also while none are recorded)."""
    if query.requires_grad or key.requires_grad or value.requires_grad:
        return False
    return are_aligned_and_unexpanded(query, key, value, mask)


def _launch(context: SelectionContext, attend: Callable[..., Tensor]) -> Launch | None:
    """What starts the compiled function for calls like the context's, compiled here; None where only `attend` can."""
    import torch

    if not torch.cuda.is_available():  # the process compiles for a GPU that it does not see
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), torch.no_grad():
            attend(*_example(context, torch.device("cuda", 0)), _SCALE)
        return None
    query, key, value = _example(context, device_of(context))
    with torch.no_grad():
        if context.sm is None or context.sm[0] != _SIZE_INDEPENDENT_MAJOR:
            attend(query, key, value, _SCALE)
            return None
        started, output = _started_by(lambda: attend(query, key, value, _SCALE))
    if reason := _unknown(started, (query, key, value, output)):
        warn_of_plain_calls(_LIBRARY, reason, f"flash-attn-4 {_READ_VERSIONS}")
        return None
    [(function, arguments)] = started
    rest = arguments[_LEADING:]

    def launch(query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float) -> Any:
        return function(query, key, value, output, None, scale, *rest)

    return launch


def _example(context: SelectionContext, device: torch.device) -> Sequence[Tensor]:
    """Query, key and value of a small call for which the same is compiled as for all like the context's."""
    import torch

    assert context.head_dim and context.gqa_group
    return [
        torch.ones(1, length, heads, context.head_dim, device=device, dtype=getattr(torch, context.dtype))
        for length, heads in ((_QUERIES, context.gqa_group), (_KEYS, 1), (_KEYS, 1))
    ]


def _unknown(started: Sequence[Started], tensors: tuple[Tensor, ...]) -> str:
    """What of a call is not as it was when its source was read; "" if all is."""
    import torch

    version = library_version(_LIBRARY) or "unknown"
    if not version.startswith(_READ_VERSIONS):
        return f"version {version}, known is {_READ_VERSIONS}"
    if len(started) != 1:
        return f"a call starts {len(started)} compiled functions, known is 1"
    [(_, arguments)] = started
    given = [part.data_ptr() if isinstance(part, torch.Tensor) else part for part in arguments[:_LEADING]]
    if given != [*(tensor.data_ptr() for tensor in tensors), None, _SCALE]:
        return "its compiled function takes other arguments first"
    return "" if all(map(_is_nothing, arguments[_LEADING:])) else "its compiled function takes further arguments"


def _is_nothing(argument: Any) -> bool:
    """None, or a tuple of nothing but None."""
    return argument is None or (isinstance(argument, tuple) and all(part is None for part in argument))


def _started_by(call: Callable[[], Tensor]) -> tuple[list[Started], Tensor]:
    """(the compiled functions that the call starts, with their arguments; its result)."""
    from flash_attn.cute import interface

    forward = interface._flash_attn_fwd
    with _one_recorder:
        cache = getattr(forward, "compile_cache", None)
        if cache is None:
            return [], call()
        recorder = _Recorder(cache)
        forward.compile_cache = recorder
        try:
            return recorder.started, call()
        finally:
            forward.compile_cache = cache


# `_flash_attn_fwd` and `_validate_head_dims` in flash_attn/cute/interface.py: 16-bit types, head dimensions of
# multiples of 16 bytes, 8 to 256 on sm_90. Its causal mask lies bottom-right. Other last strides it copies.
_KERNEL = KernelSpec(
    kernel_id="flash_attn_4.forward",
    operations=("attention.causal", "attention.full", "attention.cross"),
    platforms=("cuda",),
    dtypes=("float16", "bfloat16"),
    library=_LIBRARY,
    version_digits=3,
    requires=("torch", "flash_attn_4"),
    min_version="4.0.0",
    min_sm=(9, 0),
    max_sm=(9, 0),
    layouts=("bshd", "bhsd"),
    max_head_dim=256,
    head_dim_multiple=8,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=("square", "bottom_right"),
    requires_last_dim_stride1=True,
    compiles=True,
    priority=45,
    extra_limits=(Limit("batch_kv_heads", "at_most", 65535),),
)

KERNELS = (Kernel(_KERNEL, _load, sources=(*SOURCES, "plain_calls.py")),)

"""Kernels of `norm.rms` and attention that are right, wrong, or deadly, for a worker to load by this module's name."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

Body = Callable[..., Any]


def rms_norm(x: Any, weight: Any, eps: float, offset: float) -> Any:
    import torch

    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight + offset, eps)


def _attention(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, scale: float | None) -> Any:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _slow(x: Any, weight: Any, eps: float, offset: float) -> Any:
    time.sleep(0.003)
    return rms_norm(x, weight, eps, offset)


def _ten_times_slower(x: Any, weight: Any, eps: float, offset: float) -> Any:
    time.sleep(0.03)
    return rms_norm(x, weight, eps, offset)


def _inaccurate(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return rms_norm(x, weight, eps, offset) * 1.01


def _other_shape(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return rms_norm(x, weight, eps, offset)[:-1]


def _other_dtype(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return rms_norm(x, weight, eps, offset).double()


def _nan_at_the_end(x: Any, weight: Any, eps: float, offset: float) -> Any:
    output = rms_norm(x, weight, eps, offset)
    output[-1, -1] = float("nan")
    return output


def _writes_nothing(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return x.new_empty(x.shape)


def _in_place(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return x.copy_(rms_norm(x, weight, eps, offset))


def _two_outputs(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return rms_norm(x, weight, eps, offset), x


def _no_tensor(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return 1.0


def _raises(x: Any, weight: Any, eps: float, offset: float) -> Any:
    raise RuntimeError("tile size 48 is not supported\nat line 7")


def _out_of_memory(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return x.new_empty(1 << 55)


def _segfaults(x: Any, weight: Any, eps: float, offset: float) -> Any:
    print("about to read address 0", flush=True)
    return ctypes.string_at(0)


def _hangs(x: Any, weight: Any, eps: float, offset: float) -> Any:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter lock, as a kernel's endless loop does


def _killed(x: Any, weight: Any, eps: float, offset: float) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _exits(x: Any, weight: Any, eps: float, offset: float) -> Any:
    os._exit(3)


def _speaks(x: Any, weight: Any, eps: float, offset: float) -> Any:
    os.write(1, b"\0\0\0\4abcd")
    print("noise")
    return rms_norm(x, weight, eps, offset)


kept: list[Any] = []


def _leaks(x: Any, weight: Any, eps: float, offset: float) -> Any:
    kept.append(x.new_empty(1 << 20))
    return rms_norm(x, weight, eps, offset)


def _leaks_at_once(x: Any, weight: Any, eps: float, offset: float) -> Any:
    while True:
        kept.append(x.new_empty(1 << 28))


def _loses_device(x: Any, weight: Any, eps: float, offset: float) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _aborts_without_memory(x: Any, weight: Any, eps: float, offset: float) -> Any:
    print("terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc", flush=True)
    os.abort()


def _load_raises(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    raise RuntimeError("ptxas: unknown target\nsee the log")


def wrong_at_every(number: int) -> Body:
    """A right kernel but for every `number`-th call, counted over the process."""
    calls = 0

    def body(x: Any, weight: Any, eps: float, offset: float) -> Any:
        nonlocal calls
        calls += 1
        return rms_norm(x, weight, eps, offset) * (1 if calls % number else 1.1)

    return body


def fails_at_call(number: int) -> Body:
    """A right kernel until its `number`-th call, counted over the process."""
    calls = 0

    def body(x: Any, weight: Any, eps: float, offset: float) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise ValueError(f"call {calls}")
        return rms_norm(x, weight, eps, offset)

    return body


def kernel(name: str, body: Body, operation: str = "norm.rms", **spec: Any) -> Kernel:
    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        return body

    operations = ("attention.full", "attention.cross") if operation.startswith("attention") else (operation,)
    limits: dict[str, Any] = {
        "operations": operations,
        "platforms": ("cpu",),
        "dtypes": ("float32", "bfloat16"),
        "supports_gqa": True,
    }
    return Kernel(KernelSpec(kernel_id=f"torture.{name}", **{**limits, **spec}), load)


RIGHT = kernel("right", rms_norm)
RIGHT_TOO = kernel("right_too", rms_norm)
SLOW = kernel("slow", _slow)
TEN_TIMES_SLOWER = kernel("ten_times_slower", _ten_times_slower)
INACCURATE = kernel("inaccurate", _inaccurate)
OTHER_SHAPE = kernel("other_shape", _other_shape)
OTHER_DTYPE = kernel("other_dtype", _other_dtype)
NAN_AT_THE_END = kernel("nan_at_the_end", _nan_at_the_end)
WRITES_NOTHING = kernel("writes_nothing", _writes_nothing)
IN_PLACE = kernel("in_place", _in_place)
TWO_OUTPUTS = kernel("two_outputs", _two_outputs)
NO_TENSOR = kernel("no_tensor", _no_tensor)
RAISES = kernel("raises", _raises)
OUT_OF_MEMORY = kernel("out_of_memory", _out_of_memory)
SEGFAULTS = kernel("segfaults", _segfaults)
HANGS = kernel("hangs", _hangs)
KILLED = kernel("killed", _killed)
EXITS = kernel("exits", _exits)
LEAKS = kernel("leaks", _leaks)
LEAKS_AT_ONCE = kernel("leaks_at_once", _leaks_at_once)
LOSES_DEVICE = kernel("loses_device", _loses_device)
ABORTS_WITHOUT_MEMORY = kernel("aborts_without_memory", _aborts_without_memory)
CANNOT_LOAD = replace(kernel("cannot_load", rms_norm), load=_load_raises)
CANNOT_COMPILE = kernel("cannot_compile", _raises, compiles=True)
WRONG_AT_EVERY_TENTH = kernel("wrong_at_every_tenth", wrong_at_every(10))
SPEAKS = kernel("speaks", _speaks)
GPU_ONLY = kernel("gpu_only", rms_norm, platforms=("cuda",))
NARROW = kernel("narrow", rms_norm, max_hidden_size=16)
NEEDS_COMPILER = kernel("needs_compiler", rms_norm, requires=("cxx_compiler",))
ATTENTION = kernel("attention", _attention, "attention")
ATTENTION_CONTIGUOUS = kernel("attention_contiguous", _attention, "attention", requires_contiguous=True)

KERNELS = tuple(value for value in list(globals().values()) if isinstance(value, Kernel))

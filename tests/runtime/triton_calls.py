"""Calls of the Triton kernels: on a CUDA device where there is one, else interpreted on the CPU for a described GPU."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernel import Configuration, Kernel
from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.measure.correctness import Check, judge, tolerances
from layerzero_tune.measure.inputs import RandomTensors
from tests.runtime.kernel_calls import KERNELS, Call

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TRITON_KERNELS = {kernel_id: kernel for kernel_id, kernel in KERNELS.items() if kernel.spec.library == "triton"}
PAIRS = [(kernel, operation) for kernel in TRITON_KERNELS.values() for operation in kernel.spec.operations]
# So few multiprocessors that the programs of small calls have to go round.
SMALL_GPU = DeviceSpec(platform="cuda", name="Small GPU", compute_capability=(9, 0), multiprocessors=3)
# Of each kernel a configuration of small tiles, under which small calls take every path through it.
SMALL_ROWS = {
    "block_width": 128,
    "rows_per_program": 1,
    "num_warps": 1,
    "num_stages": 2,
    "programs_per_multiprocessor": 2,
}
SMALL_BLOCKS = {"block_size": 256, "num_warps": 1, "num_stages": 2, "programs_per_multiprocessor": 1}
SMALL_SPLITS = {
    "rows_per_program": 16,
    "block_keys": 16,
    "num_warps": 1,
    "num_stages": 2,
    "programs_per_multiprocessor": 8,
}
SMALL_PRODUCTS = {
    "block_rows": 16,
    "block_columns": 128,
    "block_depth": 64,
    "num_warps": 4,
    "num_stages": 4,
    "group_rows": 8,
    "programs_per_multiprocessor": 2,
}
SMALL: dict[str, Configuration] = {
    "triton.rms_norm": SMALL_ROWS,
    "triton.add_rms_norm": SMALL_ROWS,
    "triton.layer_norm": SMALL_ROWS,
    "triton.swiglu": SMALL_BLOCKS,
    "triton.geglu": SMALL_BLOCKS,
    "triton.split_kv": SMALL_SPLITS,
    "triton.linear_fp8": SMALL_PRODUCTS,
    "triton.linear_int8": SMALL_PRODUCTS,
}


def device() -> DeviceSpec:
    return SMALL_GPU if IS_INTERPRETED else detect_device("cuda")


def row_context(operation: str, dtype: str, rows: int, width: int, **fields: Any) -> SelectionContext:
    return SelectionContext(operation=operation, dtype=dtype, rows=rows, hidden_size=width, device=device(), **fields)


def linear_context(operation: str, dtype: str, sizes: tuple[int, int, int], **fields: Any) -> SelectionContext:
    """sizes: (rows, in_features, out_features)."""
    named: dict[str, Any] = dict(zip(("rows", "in_features", "out_features"), sizes, strict=True))
    return SelectionContext(operation=operation, dtype=dtype, device=device(), **named, **fields)


def attention_context(operation: str, dtype: str, sizes: tuple[int, ...], **fields: Any) -> SelectionContext:
    names = ("batch_size", "num_heads", "num_kv_heads", "seq_len_q", "seq_len_k", "head_dim")
    named: dict[str, Any] = dict(zip(names, sizes, strict=True))
    return SelectionContext(
        operation=operation, dtype=dtype, causal_alignment="bottom_right", device=device(), **named, **fields
    )


def in_small_tiles(kernel: Kernel) -> Kernel:
    """The kernel as one of another id whose own choice are small tiles."""
    load, configuration = kernel.load, SMALL[kernel.kernel_id]
    spec = replace(kernel.spec, kernel_id=f"{kernel.kernel_id}.small")
    return replace(kernel, spec=spec, load=lambda context, _: load(context, configuration))


def call_of(operation: str, *arguments: Any, **features: Any) -> Call:
    """The call on tensors that lie on `DEVICE`."""
    described = OPERATIONS[operation].describe(*arguments, **features)
    return Call(replace(described, device=device()), arguments)


def moved(call: Call) -> Call:
    """A call on tensors of the CPU as one on `DEVICE`, with the strides and offsets that they have."""
    return Call(replace(call.context, device=device()), tuple(map(_moved, call.arguments)))


def _moved(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    whole = argument.new_empty(0).set_(argument.untyped_storage()).to(DEVICE)
    return whole.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def fault(kernel: Kernel, configuration: Configuration, context: SelectionContext, seed: int = 0) -> str:
    """What the tuner finds wrong with a kernel's result; "" for a right one."""
    operation = OPERATIONS[context.operation]
    check = Check.prepare(operation, context, RandomTensors(DEVICE, seed), seed)
    default = check.run(KERNELS[operation.default_kernel].load(context, {}))
    return judge(check.run(kernel.load(context, configuration)), tolerances(default, context.result_dtype)).message


def configurations(kernel: Kernel, context: SelectionContext) -> Iterator[Configuration]:
    """The valid ones, in the order of the space's parameters."""
    assert kernel.space is not None
    parameters: Mapping[str, tuple[Any, ...]] = kernel.space.parameters
    for values in itertools.product(*parameters.values()):
        configuration = dict(zip(parameters, values, strict=True))
        if kernel.space.is_valid(configuration, context):
            yield configuration


def any_size(context: SelectionContext) -> SelectionContext:
    """The context without the sizes of its call: what is valid there is valid at some size."""
    names = ("rows", "hidden_size", "in_features", "out_features", "batch_size", "seq_len_q", "seq_len_k")
    return replace(context, **dict.fromkeys(names))  # type: ignore[arg-type]


def spread(kernel: Kernel, context: SelectionContext, count: int) -> list[Configuration]:
    """Random ones of those that are valid at any size, and the kernel's own choice."""
    found = list(configurations(kernel, any_size(context)))
    return [{}, *random.Random(0).sample(found, min(count, len(found)))]


@contextmanager
def bfloat16_as_on_a_device() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as integers of 16 bits: it cuts where devices round, and multiplies those."""
    if not IS_INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(data, tl.float32)

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def widening_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = widened(a), widened(b)
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
        patch.setattr(InterpreterBuilder, "create_dot", widening_dot)
        yield

"""What the scenarios share: described devices, kernels made for a test, and a clean process state after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from layerzero_runtime import attention as lz_attention
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.explanation import explain
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import tables_in_force
from tests.runtime.synthetic_table import write_table

H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
A100 = DeviceSpec("cuda", "NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), multiprocessors=108)
L40 = DeviceSpec("cuda", "NVIDIA L40", compute_capability=(8, 9), multiprocessors=142)
T4 = DeviceSpec("cuda", "Tesla T4", compute_capability=(7, 5), multiprocessors=40)
MI300X = DeviceSpec("rocm", "AMD Instinct MI300X", multiprocessors=304)
GAUDI = DeviceSpec("hpu", "Intel Gaudi 3")
M2 = DeviceSpec("mps", "Apple M2")
XEON = DeviceSpec("cpu", "Intel Xeon", "avx512_bf16", physical_cores=8, threads=8)
GRAVITON = DeviceSpec("cpu", "Arm Neoverse-V1", "sve_bf16", physical_cores=8, threads=8)
OLD_PC = DeviceSpec("cpu", "Intel Core2 Duo", "sse", physical_cores=2, threads=2)

# The builtin kernels of a CPU that take any call without a mask, dropout or groups.
FULL_KERNELS = {"torch.sdpa", "torch.sdpa.flash_cpu", "torch.sdpa.math", "torch.matmul"}
CAUSAL_KERNELS = {"torch.sdpa", "torch.sdpa.flash_cpu", "torch.sdpa.math", "torch.matmul.causal"}


def attention(**changes: Any) -> SelectionContext:
    """A square attention call in float16 on a described H100, unless changed."""
    fields: dict[str, Any] = {
        "operation": "attention.full",
        "dtype": "float16",
        "batch_size": 4,
        "seq_len_q": 512,
        "num_heads": 16,
        "head_dim": 64,
        "device": H100,
    }
    return SelectionContext(**(fields | changes))


def norm(**changes: Any) -> SelectionContext:
    """An RMS norm in float16 on a described H100, unless changed."""
    fields: dict[str, Any] = {
        "operation": "norm.rms",
        "dtype": "float16",
        "rows": 512,
        "hidden_size": 4096,
        "device": H100,
    }
    return SelectionContext(**(fields | changes))


def spec(kernel_id: str, **changes: Any) -> KernelSpec:
    """The declaration of an attention kernel for CUDA that needs no library, unless changed."""
    fields: dict[str, Any] = {
        "kernel_id": kernel_id,
        "operations": ("attention.full", "attention.causal", "attention.cross"),
        "platforms": ("cuda",),
        "dtypes": ("float16", "bfloat16"),
        "library": kernel_id.split(".")[0],
        "requires": (),
    }
    return KernelSpec(**(fields | changes))


def unreachable(*arguments: Any) -> Any:
    raise AssertionError("a kernel of a described device was called")


def kernel(kernel_id: str, function: KernelFunction = unreachable, **changes: Any) -> Kernel:
    return Kernel(spec(kernel_id, **changes), FunctionLoader(function))


@contextmanager
def only(*kernels: Kernel) -> Iterator[Snapshot]:
    """A published snapshot whose registry holds these kernels alone."""
    try:
        yield dispatch._publish(lambda sources: replace(sources, registry=Registry(kernels)))
    finally:
        dispatch._publish(lambda sources: replace(sources, registry=Registry(builtin_kernels())))


@contextmanager
def beside_builtin(*kernels: Kernel) -> Iterator[Snapshot]:
    """A published snapshot with these kernels beside the built-in ones."""
    with only(*builtin_kernels(), *kernels) as snapshot:
        yield snapshot


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Policy, kernels, breakers and recordings as in a fresh process, after each test."""
    yield
    dispatch.set_policy(None)
    dispatch.verify_results(None)
    dispatch.record_workload(None)
    dispatch._publish(lambda sources: replace(sources, registry=Registry(builtin_kernels())))
    dispatch.health().reset()


@pytest.fixture
def without_tables() -> Iterator[None]:
    """No measured table is in force, so that priorities decide on this machine's CPU too."""
    with tables_in_force(None):
        yield


@pytest.fixture(scope="session")
def xeon_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of the described Xeon, of invented times."""
    folder = tmp_path_factory.mktemp("xeon_tables")
    write_table(folder, XEON)
    return folder


def cpu_kernel(kernel_id: str, function: KernelFunction = unreachable, **changes: Any) -> Kernel:
    """An attention kernel for the CPU that goes before the builtin ones, unless changed."""
    fields: dict[str, Any] = {
        "platforms": ("cpu",),
        "dtypes": ("float64", "float32", "float16", "bfloat16"),
        "priority": 200,
    }
    return kernel(kernel_id, function, **(fields | changes))


class Attend:
    """An attention kernel's function that computes by torch and keeps the tensors and the scale that it was given."""

    def __init__(self, *, is_causal: bool = False, layout: str = "bhsd") -> None:
        self.is_causal, self.layout = is_causal, layout
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scales: list[float | None] = []

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        self.given.append((query, key, value))
        self.scales.append(scale)
        if self.layout == "bshd":
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        output = sdpa(query, key, value, attn_mask, dropout_p, self.is_causal, scale=scale, enable_gqa=True)
        return output.transpose(1, 2) if self.layout == "bshd" else output


def qkv(
    batch: int = 2,
    heads: int = 4,
    length: int = 8,
    width: int = 16,
    *,
    kv_heads: int | None = None,
    length_k: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value in layout bhsd."""
    torch.manual_seed(0)
    query = torch.randn(batch, heads, length, width)
    key, value = (torch.randn(batch, kv_heads or heads, length_k or length, width) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, hidden: Tensor | None = None
) -> Tensor:
    """softmax(query key^T x scale) value in float64; `hidden` marks the scores that take no part."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(part.double().repeat_interleave(group, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1) @ value


def assert_near(found: Tensor, exact: Tensor, default: Tensor | None = None) -> None:
    """Equal shapes, and a relative L2 distance of a few roundings in the dtype of what was found, beside twice that of
    the default, which for long sums differs from one instruction set to the other."""

    def distance(result: Tensor) -> float:
        return float((result.double() - exact.double()).norm() / exact.double().norm())

    assert found.shape == exact.shape
    allowed = 8 * torch.finfo(found.dtype).eps + (0.0 if default is None else 2 * distance(default))
    assert distance(found) <= allowed, (distance(found), allowed)


def by_each_kernel(operation: str, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The results of one call by every builtin kernel of the operation that takes it, alone in the registry; those that
    compile first are left out."""
    results = {}
    for candidate in Registry(builtin_kernels()).candidates(operation):
        if candidate.spec.compiles:
            continue
        with only(candidate):
            try:
                results[candidate.kernel_id] = call()
            except NoKernelAvailableError:
                continue
    return results


def each_kernel_is_right(expected: set[str], query: Tensor, key: Tensor, value: Tensor) -> None:
    """Every builtin kernel that takes the call, without a mask, is right; `expected` are those that must take it."""
    exact = exact_attention(query, key, value)
    operation = "attention.full" if query.shape[2] == key.shape[2] else "attention.cross"
    results = by_each_kernel(operation, lambda: lz_attention(query, key, value))
    assert results.keys() == expected
    for result in results.values():
        assert_near(result, exact)


def reasons(context: SelectionContext, kernel_id: str) -> str:
    """Why a kernel does not serve a described call; empty if it may."""
    try:
        refused = explain(context).refused
    except NoKernelAvailableError as error:
        refused = error.rejections
    return "; ".join(refused.get(kernel_id, ()))

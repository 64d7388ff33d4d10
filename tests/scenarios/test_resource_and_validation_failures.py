"""FS-025, FS-027 and FS-029 to FS-035: what runs out, what is not valid, what is not installed."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import (
    ContextError,
    ContextTypeError,
    DeviceError,
    NoKernelAvailableError,
    ResultsError,
    SpecError,
)
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.results.store import ResultsStore
from tests.runtime.conftest import _compile, tables_in_force
from tests.scenarios.conftest import attention, beside_builtin, kernel, norm, only
from tests.scenarios.failing_kernels import (
    Body,
    count_of,
    raising,
    refusal,
    right,
    serve_rightly,
    swiglu_context,
    swiglu_kernel,
    swiglu_spec,
)
from tests.tune.measurements import make_contest, rows_of

SIZES = (
    "batch_size",
    "seq_len_q",
    "seq_len_k",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "v_head_dim",
    "rows",
    "hidden_size",
)


@pytest.fixture(autouse=True)
def without_tables() -> Iterator[None]:
    """No measurement says which kernel is best: priority does."""
    with tables_in_force(None):
        yield


@contextmanager
def at_most_open_files(further: int) -> Iterator[None]:
    """A limit on open files that leaves room for so many more than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + further, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _all_that_are_left() -> list[int]:
    """File descriptors, until there are no more."""
    taken: list[int] = []
    while True:
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return taken


@pytest.mark.scenario("FS-025")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/fd")
def test_a_store_of_many_files_needs_few_open_ones_and_says_when_there_are_none(tmp_path: Path) -> None:
    stores = [ResultsStore(tmp_path) for _ in range(50)]
    for number in range(40):
        stores[number].append(make_contest(number))
    with at_most_open_files(8):
        for store in stores:
            assert len(store.read().rows) == 120
        stores[0].append(make_contest(40))
        taken = _all_that_are_left()
        try:
            for use in (stores[0].read, lambda: stores[1].append(make_contest(41))):
                with pytest.raises(ResultsError, match="Too many open files"):
                    use()
        finally:
            for descriptor in taken:
                os.close(descriptor)
        # Nothing was taken for damaged, and nothing is left half written.
        assert stores[2].read().rows == rows_of(*range(41))
    assert not (tmp_path / "quarantine").exists()
    assert len(list(tmp_path.iterdir())) == 41


SELECT_FOR_A_GPU = """
import layerzero_runtime as lz
from layerzero_runtime.device import detect_device
context = lz.SelectionContext(operation="norm.rms", dtype="bfloat16", rows=64, hidden_size=4096)
plan = lz.select(context)
print(detect_device().name, plan.kernel_id)
import sys
mapped = open("/proc/self/maps").read()
print("torch" in sys.modules, "libcuda" in mapped, "libcudart" in mapped)
"""


@pytest.mark.scenario("FS-027")
def test_a_process_that_only_selects_makes_no_cuda_context(tmp_path: Path) -> None:
    """NVML describes the GPU; a context is made by torch alone, when a kernel runs."""
    library = _compile(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    ended = subprocess.run(
        [sys.executable, "-c", SELECT_FOR_A_GPU],
        env=environment | {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == ["NVIDIA H100 80GB HBM3 torch.rms_norm", "False False False"]


@pytest.mark.scenario("FS-027")
def test_a_context_that_cannot_be_made_costs_one_retry() -> None:
    """Unlike a lost context: the call may go to a kernel that needs none."""
    refused = Body(raising(RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")))
    with beside_builtin(swiglu_kernel("test.gpu", refused)):
        serve_rightly()
        assert "busy or unavailable" in refusal("test.gpu")


@pytest.mark.scenario("FS-029")
@pytest.mark.parametrize(
    "kernel_id",
    [
        "",
        "flash",
        "Flash.attn",
        "flash attn.v3",
        "flash.attn;rm",
        "a..b",
        ".a",
        "a.",
        "a.b\n",
        "a/b.c",
        "é.attn",
        None,
        7,
    ],
)
def test_a_malformed_kernel_id_is_refused_where_it_is_declared(kernel_id: Any) -> None:
    before = len(dispatch.current_snapshot().registry)
    with pytest.raises(SpecError, match=r"kernel_id .* must be dotted lower-case words"):
        replace(swiglu_spec("x.y"), kernel_id=kernel_id)
    assert len(dispatch.current_snapshot().registry) == before
    assert swiglu_spec("flash_attn.v3_2").kernel_id == "flash_attn.v3_2"


@pytest.mark.scenario("FS-030")
def test_an_unknown_operation_is_named_with_those_that_there_are() -> None:
    for select in (lz.select, lz.explain, lambda context: lz.select_batch([context])):
        with pytest.raises(ContextError) as raised:
            select(attention(operation="attention.linear"))
        assert "operation is 'attention.linear'" in str(raised.value)
        assert all(name in str(raised.value) for name in OPERATIONS)
    with pytest.raises(SpecError, match=r"operation 'mlp.gelu' is unknown, allowed: .*mlp.geglu"):
        lz.register_kernel(swiglu_spec("test.gelu", operations=("mlp.gelu",)), right)
    with only(swiglu_kernel("test.only", right)), pytest.raises(NoKernelAvailableError) as missing:
        lz.select(norm())
    assert "no kernel is registered for 'norm.rms'; operations with kernels: mlp.swiglu" in str(missing.value)


@pytest.mark.scenario("FS-031")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [-1, 0, -(1 << 40)])
def test_a_size_below_one_is_an_error_at_once(size: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{size} is {value}, a size must be at least 1"):
        attention(**{size: value})


@pytest.mark.scenario("FS-032")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", ["512", 512.0, True, [512], torch.tensor(512)])
def test_a_size_of_another_type_is_an_error_and_never_converted(size: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{size} must be an integer, not "):
        attention(**{size: value})


@pytest.mark.scenario("FS-032")
def test_features_of_another_type_are_errors_that_name_them() -> None:
    wrong: dict[str, Any] = {
        "operation": 1,
        "dtype": torch.float16,
        "layout": 3,
        "dropout_p": "0.1",
        "scale": "usual",
        "requires_grad": 1,
        "workspace_limit": "64MiB",
        "device": "cuda:0",
    }
    for name, value in wrong.items():
        with pytest.raises(ContextTypeError, match=f"{name} must be"):
            attention(**{name: value})
    with pytest.raises(ContextTypeError, match="query must be a tensor, not str"):
        lz.attention("query", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))  # type: ignore[arg-type]


@pytest.mark.scenario("FS-033")
def test_a_call_that_only_a_newer_torch_could_serve_says_so() -> None:
    body = Body()
    with only(swiglu_kernel("test.modern", body, library="torch", requires=("torch",), min_version="99.1")):
        with pytest.raises(NoKernelAvailableError) as raised:
            lz.swiglu(torch.randn(4, 8), torch.randn(4, 8))
        required = f"torch {torch.__version__} is installed, required at least 99.1: pip install 'torch>=99.1'"
        assert required in str(raised.value)
        assert required in str(lz.select(swiglu_context()).unavailable_reason)
    assert body.calls == 0


@pytest.mark.scenario("FS-034")
def test_without_cuda_the_cpu_serves() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    own = kernel("test.gpu", operations=("mlp.swiglu",), dtypes=("float32",), priority=200)
    with beside_builtin(own):
        assert detect_device().platform == "cpu"
        plan = lz.select(SelectionContext(operation="mlp.swiglu", dtype="float32", rows=4, hidden_size=8))
        assert (plan.kernel_id, plan.available) == ("torch.swiglu", True)
        assert "PLATFORM_NOT_ONE_OF: platform is 'cpu', required one of 'cuda'" in refusal("test.gpu")
        serve_rightly()
    with pytest.raises(DeviceError, match=r"there is no device cuda: .*use device cpu"):
        detect_device("cuda")


@pytest.mark.scenario("FS-035")
def test_without_triton_its_kernels_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it raises ImportError

    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        import triton  # type: ignore[import-not-found, unused-ignore]

        function: KernelFunction = triton.jit
        return function

    fallbacks = count_of("fallbacks")
    with beside_builtin(Kernel(swiglu_spec("test.triton_swiglu"), load)):
        for _ in range(3):
            serve_rightly()
        assert count_of("fallbacks") == fallbacks + 1
        assert "test.triton_swiglu failed to load" in refusal("test.triton_swiglu")
    assert caplog.text.count("test.triton_swiglu failed to load") == 1


@pytest.mark.scenario("FS-035")
def test_a_tool_that_is_not_installed_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out without importing anything, before the kernel is chosen."""
    from layerzero_runtime.libraries import missing_requirement

    monkeypatch.setenv("CXX", "no-such-compiler")
    missing_requirement.cache_clear()
    try:
        body = Body()
        with beside_builtin(swiglu_kernel("test.compiled", body, requires=("cxx_compiler",))):
            serve_rightly()
            assert lz.select(swiglu_context()).kernel_id == "torch.swiglu"
            assert "the C++ compiler 'no-such-compiler' is not on PATH: install it" in refusal("test.compiled")
            assert lz.stats().broken == ()
        assert body.calls == 0
    finally:
        missing_requirement.cache_clear()

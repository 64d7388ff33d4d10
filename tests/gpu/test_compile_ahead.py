"""What was compiled without the GPU is what a process that has it needs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_tune.worker.compile_job import CompileJob
from layerzero_tune.worker.compilers import Compilers
from layerzero_tune.worker.library_compilers import KEPT_ON_DISK
from tests.tune.command import ROOT
from tests.tune.test_compilers import triton_jobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ON_THE_GPU = """
from triton import knobs
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernels import builtin_kernels
from tests.tune.test_compilers import triton_jobs

hits = []
knobs.compilation.listener = lambda *, cache_hit, **others: hits.append(cache_hit)
for job in triton_jobs(detect_device("cuda:0")):
    {kernel.kernel_id: kernel for kernel in builtin_kernels()}[job.kernel_id].load(job.context, job.configuration)
print(len(hits), sum(hits))
"""


def test_kernels_that_were_compiled_ahead_are_loaded_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device: DeviceSpec = detect_device("cuda:0")
    with Compilers((), 2) as compilers:
        assert compilers.finish(triton_jobs(device)) == {}
        assert compilers.faults == {}
    loaded = subprocess.run([sys.executable, "-c", ON_THE_GPU], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    compiled, hits = map(int, loaded.stdout.split())
    assert hits == compiled > 10


LOADED = """
from layerzero_runtime.kernels import builtin_kernels
from tests.gpu.test_compile_ahead import attention_jobs

for job in attention_jobs():
    {kernel.kernel_id: kernel for kernel in builtin_kernels()}[job.kernel_id].load(job.context, job.configuration)
"""


def attention_jobs() -> list[CompileJob]:
    device = detect_device("cuda:0")
    square = SelectionContext(
        operation="attention.causal",
        dtype="bfloat16",
        batch_size=1,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        seq_len_q=64,
        seq_len_k=64,
        device=device,
    )
    return [
        CompileJob(replace(square, operation=operation, num_kv_heads=heads), "flash_attn_4.forward", {})
        for operation in ("attention.causal", "attention.full")
        for heads in (2, 8)
    ]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn-4")
def test_flash_attention_that_was_compiled_ahead_is_read_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(tmp_path))
    jobs = attention_jobs()
    with Compilers((), 2) as compilers:
        assert compilers.finish(jobs) == {}
        assert compilers.faults == {}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}
    assert len(before) == len(jobs)
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED], env={**os.environ, **KEPT_ON_DISK}, capture_output=True, text=True, cwd=ROOT
    )
    assert loaded.returncode == 0, loaded.stderr
    assert "plain" not in loaded.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")} == before

"""What was compiled without the GPU is what a process that has it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_tune.worker.compilers import Compilers
from tests.tune.command import ROOT
from tests.tune.test_compilers import triton_jobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ON_THE_GPU = """
from triton import knobs
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

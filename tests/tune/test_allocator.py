"""The worker's allocator keeps what it frees: no call pays for fresh pages after the first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layerzero_tune.worker import allocator
from layerzero_tune.worker.allocator import available_bytes, kept_limit

_PAGE_FAULTS = """
import resource, sys
from layerzero_tune.worker.allocator import retain_memory
retained = retain_memory() if sys.argv[1] == "retained" else False
import torch
large, small = torch.ones(20_000_000), torch.ones(400_000)
for _ in range(20):
    large + large, small + small
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    large + large, small + small
print(retained, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> tuple[str, int]:
    """Whether the settings were taken, and the page faults of ten calls with outputs of 80 and 1.6 MB."""
    found = subprocess.run([sys.executable, "-c", _PAGE_FAULTS, mode], capture_output=True, text=True, check=True)
    retained, faults = found.stdout.split()
    return retained, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_used_again_without_fresh_pages() -> None:
    retained, faults = page_faults("retained")
    assert retained == "True"
    assert faults < 1000
    assert page_faults("left alone")[1] > 50_000


def test_workers_of_gpus_keep_more_and_together_no_more_than_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    gibibyte = 2**30
    available = available_bytes()
    assert available is None or available > gibibyte
    monkeypatch.setattr(allocator, "available_bytes", lambda: 128 * gibibyte)
    assert kept_limit(0) == gibibyte
    assert kept_limit(1) == 32 * gibibyte
    assert kept_limit(8) == 4 * gibibyte
    assert kept_limit(64) == gibibyte
    monkeypatch.setattr(allocator, "available_bytes", lambda: None)
    assert kept_limit(1) == gibibyte

"""NVML through ctypes, against a compiled stand-in for the driver's library."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from layerzero_runtime.devices.nvml import Gpu, load_library, read_inventory

H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    uuid="GPU-4d8a22f6-e8e8-86e5-4b1a-d8fc31360a40",
    memory_bytes=85520809984,
    compute_capability=(9, 0),
    multiprocessors=132,
    bandwidth_bytes_per_s=3.35232e12,
    max_clock_mhz=1980,
)
A100 = Gpu(
    name="NVIDIA A100-SXM4-80GB",
    uuid="GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6",
    memory_bytes=85899345920,
    compute_capability=(8, 0),
    multiprocessors=108,
    bandwidth_bytes_per_s=2.03904e12,
    max_clock_mhz=1410,
)


def test_gpus_are_described_in_pci_order(nvml_library: Path) -> None:
    inventory = read_inventory(ctypes.CDLL(str(nvml_library)))
    assert inventory.gpus == (H100, A100)
    assert inventory.problem == ""


def test_the_session_is_closed(nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(str(nvml_library))
    for mode in ("", "no-gpu", "lost", "mismatch"):
        monkeypatch.setenv("FAKE_NVML", mode)
        read_inventory(library)
        assert library.fake_open_sessions() == 0, mode


def test_an_old_driver_leaves_gaps(old_nvml_library: Path) -> None:
    h100, a100 = read_inventory(ctypes.CDLL(str(old_nvml_library))).gpus
    assert (h100.name, a100.name) == (H100.name, A100.name)
    assert h100.multiprocessors is None
    assert h100.bandwidth_bytes_per_s is None
    assert h100.memory_bytes == H100.memory_bytes


def test_multiprocessors_of_an_unknown_architecture_are_unknown(
    nvml_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", "unknown-architecture")
    gpu = read_inventory(ctypes.CDLL(str(nvml_library))).gpus[0]
    assert (gpu.compute_capability, gpu.multiprocessors) == ((99, 0), None)


def test_mig(nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", "mig")
    h100, a100 = read_inventory(ctypes.CDLL(str(nvml_library))).gpus
    assert (a100.mig_enabled, a100.mig_devices) == (False, ())
    assert h100.mig_enabled
    assert h100.mig_devices == (
        Gpu(
            name="NVIDIA H100 80GB HBM3 MIG 3g.40gb",
            uuid="MIG-1d11a5f4-0000-5c1d-9a0d-1e4b7f0c1a01",
            memory_bytes=40448 * 2**20,
            compute_capability=(9, 0),
            multiprocessors=60,
        ),
    )


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("mismatch", "nvmlInit_v2 failed: Driver/library version mismatch (NVML status 18)"),
        ("lost", "GPU 1 does not answer: GPU is lost (NVML status 15)"),
        ("no-gpu", "the NVIDIA driver finds no GPU"),
    ],
)
def test_a_driver_that_does_not_answer(
    nvml_library: Path, monkeypatch: pytest.MonkeyPatch, mode: str, problem: str
) -> None:
    monkeypatch.setenv("FAKE_NVML", mode)
    inventory = read_inventory(ctypes.CDLL(str(nvml_library)))
    assert inventory.gpus == ()
    assert inventory.problem == problem


def test_a_lost_gpu_leaves_the_others(nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", "one-lost")
    assert read_inventory(ctypes.CDLL(str(nvml_library))).gpus == (H100,)


def test_no_driver() -> None:
    inventory = read_inventory(None)
    assert inventory.gpus == ()
    assert "no NVIDIA driver" in inventory.problem


def test_a_library_of_that_name_without_nvml() -> None:
    inventory = read_inventory(ctypes.CDLL(None))
    assert inventory.gpus == ()
    assert inventory.problem == "nvmlInit_v2 failed: NVML status 13"


def test_looking_for_the_driver_raises_nothing() -> None:
    load_library()

"""Detecting this machine's devices; a CUDA device through a stand-in for the driver's library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerzero_runtime.device import detect_device, forget_devices
from layerzero_runtime.errors import ContextError, ContextTypeError, DeviceError


def test_the_cpu_follows_torchs_threads() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = detect_device("cpu")
        torch.set_num_threads(2)
        two = detect_device("cpu")
    finally:
        torch.set_num_threads(before)
    assert (one.threads, two.threads) == (1, 2)
    assert one.physical_cores == two.physical_cores
    assert detect_device("cpu") is detect_device("cpu")


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu:0", "mps", "all", "cuda:99999"]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ContextError, match="allowed: auto, cpu, cuda, cuda:N"):
        detect_device(name)


def test_a_name_that_is_no_string() -> None:
    with pytest.raises(ContextTypeError, match="allowed: auto, cpu, cuda, cuda:N"):
        detect_device(0)  # type: ignore[arg-type]


SHOW = """
import sys
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import DeviceError
for name in sys.argv[1:]:
    try:
        device = detect_device(name)
        print(device.slug, device.index)
    except DeviceError as error:
        print(error)
assert "torch" not in sys.modules
"""


def detected(library: Path, *names: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    completed = subprocess.run(
        [sys.executable, "-c", SHOW, *names],
        env={**inherited, "LD_LIBRARY_PATH": str(library.parent), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return completed.stdout.splitlines()


def test_cuda_devices_are_detected(nvml_library: Path) -> None:
    h100, a100 = "nvidia_h100_80gb_hbm3", "nvidia_a100_sxm4_80gb"
    names = ("auto", "cuda", "cuda:0", "cuda:1")
    assert detected(nvml_library, *names) == [f"{h100} 0", f"{h100} 0", f"{h100} 0", f"{a100} 1"]
    assert detected(nvml_library, *names[:3], CUDA_VISIBLE_DEVICES="1") == [f"{a100} 0"] * 3
    assert detected(nvml_library, "auto", FAKE_NVML="mig") == ["nvidia_h100_80gb_hbm3_mig_3g_40gb 0"]


def test_a_cuda_device_that_is_not_there(nvml_library: Path) -> None:
    assert detected(nvml_library, "cuda:2") == [
        "there is no device cuda:2: CUDA shows 2 of this machine's 2 GPUs; use cuda:N with N below 2"
    ]
    [one] = detected(nvml_library, "cuda:1", CUDA_VISIBLE_DEVICES="1")
    assert one.endswith("1 of this machine's 2 GPUs under CUDA_VISIBLE_DEVICES='1'; use cuda:N with N below 1")
    [hidden] = detected(nvml_library, "cuda:0", CUDA_VISIBLE_DEVICES="")
    assert hidden.endswith("under CUDA_VISIBLE_DEVICES=''; change CUDA_VISIBLE_DEVICES or use device cpu")
    [mismatch] = detected(nvml_library, "cuda:0", FAKE_NVML="mismatch")
    assert mismatch == (
        "there is no device cuda:0: nvmlInit_v2 failed: Driver/library version mismatch (NVML status 18); "
        "use device cpu, or check the driver with nvidia-smi"
    )


def test_auto_is_the_cpu_where_cuda_shows_nothing(nvml_library: Path) -> None:
    for environment in ({"CUDA_VISIBLE_DEVICES": "-1"}, {"FAKE_NVML": "no-gpu"}):
        assert detected(nvml_library, "auto", **environment)[0].startswith("cpu_")


def test_detection_is_kept_until_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_devices()
    try:
        monkeypatch.setattr("layerzero_runtime.devices.nvml.LIBRARIES", ("libnot-there.so",))
        with pytest.raises(DeviceError, match=r"none of libnot-there\.so can be loaded"):
            detect_device("cuda")
        monkeypatch.setattr("layerzero_runtime.devices.nvml.LIBRARIES", ("libneither.so",))
        with pytest.raises(DeviceError, match="libnot-there"):
            detect_device("cuda")
        forget_devices()
        with pytest.raises(DeviceError, match="libneither"):
            detect_device("cuda")
    finally:
        forget_devices()


def test_importing_and_detecting_the_cpu_stay_light() -> None:
    code = (
        "import sys; from layerzero_runtime.device import detect_device; heavy = ('ctypes', 'platform', 'subprocess', "
        "'torch', 'json', 'logging'); print([name for name in heavy if name in sys.modules]); "
        "detect_device('cpu'); print([name for name in heavy if name in sys.modules])"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.splitlines() == ["[]", "[]"]

"""Throttled GPUs: read from NVML, and shown in `stats` where CUDA devices are in use."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerzero_runtime as lz
from layerzero_runtime.device import detect_device, forget_devices
from layerzero_runtime.devices import nvml, throttling
from layerzero_runtime.devices.throttling import throttled_gpus


@pytest.fixture
def two_gpus(nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has found the stand-in's GPUs."""
    monkeypatch.setattr(nvml, "LIBRARIES", (str(nvml_library),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    forget_devices()
    yield
    monkeypatch.undo()
    forget_devices()


@pytest.mark.scenario("FS-007", "PS-019")
def test_a_gpu_that_is_too_hot_shows_in_stats(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lz.stats().throttled == {}, "nothing has asked for a CUDA device yet"
    detect_device("cuda")
    assert lz.stats().throttled == {}, "idle clocks are no throttling"
    monkeypatch.setenv("FAKE_NVML", "hot")
    found = lz.stats()
    assert found.throttled == {1: ("power cap", "software thermal slowdown")}
    assert 'layerzero_gpu_throttled{gpu="1",reason="power cap"} 1' in found.prometheus()


def test_an_older_driver_is_asked_by_the_older_name(old_nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(str(old_nvml_library))
    assert throttled_gpus(library) == {}
    monkeypatch.setenv("FAKE_NVML", "hot")
    assert throttled_gpus(library) == {1: ("power cap", "software thermal slowdown")}
    assert library.fake_open_sessions() == 0


@pytest.mark.parametrize("failure", ["mismatch", "no-gpu", "lost"])
def test_what_does_not_answer_shows_nothing(failure: str, nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", failure)
    library = ctypes.CDLL(str(nvml_library))
    assert throttled_gpus(library) == {}
    assert library.fake_open_sessions() == 0


def test_without_a_driver_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "load_library", lambda: None)
    assert throttled_gpus() == {}

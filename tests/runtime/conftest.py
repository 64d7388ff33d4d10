"""Fixtures of the runtime's tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "fake_nvml.cpp"


def _compile(folder: Path, *options: str) -> Path:
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", "-O0", *options, "-o", str(library), str(SOURCE)], check=True)
    return library


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for NVML with an H100 and an A100; the variable FAKE_NVML makes it fail in several ways."""
    return _compile(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of a driver that does not know all functions."""
    return _compile(tmp_path_factory.mktemp("old_nvml"), "-DOLD")

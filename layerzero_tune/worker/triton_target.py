"""Triton's compiler for a GPU that is described and not touched: the code lands in Triton's cache on disk."""

from __future__ import annotations

from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels.triton_launch import Launch, TritonForm

_WARP_SIZE = 32


class DescribedDriver:
    """In place of Triton's driver: what its compiler asks of one. Nothing can be started with it."""

    def __init__(self, device: DeviceSpec) -> None:
        assert device.compute_capability is not None
        major, minor = device.compute_capability
        self._capability = 10 * major + minor

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, _WARP_SIZE)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(device: DeviceSpec) -> None:
    """From now on Triton compiles for this GPU in this process, and loads of kernels that are made of `TritonForm`
    compile alone, without making anything ready on a device.

    Raises:
        ImportError: Triton is not installed.
    """
    from triton.runtime.driver import driver

    driver.set_active(DescribedDriver(device))
    TritonForm.launcher = _compile_alone  # type: ignore[assignment,method-assign]


def _compile_alone(form: TritonForm, context: SelectionContext) -> Launch:
    for aligned in (True, False):
        form.compile(aligned=aligned)
    return form.launch

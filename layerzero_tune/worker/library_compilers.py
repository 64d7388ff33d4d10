"""Environment variables that the compilers of kernel libraries go by."""

from __future__ import annotations

from collections.abc import Mapping

from layerzero_runtime.device import DeviceSpec

# Libraries that keep compiled code on disk only where they are told to. Without it, each new worker compiles again what
# the last one had compiled. (flash_attn/cute/cache_utils.py)
KEPT_ON_DISK: Mapping[str, str] = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}
# From here on, instructions of one architecture alone are used, which the name of its target ends in "a" for.
_OWN_INSTRUCTIONS_MAJOR = 9


def described_gpu(device: DeviceSpec) -> Mapping[str, str]:
    """What has libraries compile for the GPU in a process that sees none.

    Those are of the CuTe DSL (`CUTE_DSL_ARCH`), FlashAttention-4 (`FLASH_ATTENTION_ARCH` and `_NUM_SMS`, in
    flash_attn/cute/interface.py) and FlashInfer (`FLASHINFER_CUDA_ARCH_LIST`, in flashinfer/compilation_context.py).
    """
    assert device.compute_capability is not None
    major, minor = device.compute_capability
    suffix = "a" if major >= _OWN_INSTRUCTIONS_MAJOR else ""
    return {
        "CUTE_DSL_ARCH": f"sm_{major}{minor}{suffix}",
        "FLASH_ATTENTION_ARCH": f"sm_{major}{minor}",
        "FLASHINFER_CUDA_ARCH_LIST": f"{major}.{minor}{suffix}",
        **({} if device.multiprocessors is None else {"FLASH_ATTENTION_NUM_SMS": str(device.multiprocessors)}),
    }

"""Staleness: whether an entry's kernel is still the one that was measured."""

from __future__ import annotations

from functools import cache

from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import library_version
from layerzero_runtime.table import Table


def version_that_matters(kernel: Kernel) -> str:
    """The leading digits of the library's version that the adapter declares to matter; "" if it is not installed."""
    version = library_version(kernel.spec.library)
    return "" if version is None else ".".join(version.split("+")[0].split(".")[: kernel.spec.version_digits])


def kernel_source_hash(kernel: Kernel) -> str:
    """A hash over the source file of the kernel's adapter, 32 hexadecimal digits; "" where no source is at hand."""
    return _file_hash(kernel.load.__code__.co_filename) if hasattr(kernel.load, "__code__") else ""


@cache
def _file_hash(path: str) -> str:
    import hashlib

    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:32]
    except OSError:
        return ""


def stale_reason(table: Table, kernel: Kernel) -> str | None:
    """Why entries of this kernel no longer hold, None if they do.

    A kernel whose library is not installed is not stale but unavailable, which its plan says.
    """
    measured = table.kernels.get(kernel.kernel_id)
    if measured is None:
        return f"{kernel.kernel_id} is not described by table {table.name}"
    version = version_that_matters(kernel)
    if version and measured["version"] != version:
        return (
            f"{kernel.kernel_id} was measured with {kernel.spec.library} {measured['version']}, installed is {version}"
        )
    source = kernel_source_hash(kernel)
    if measured["source"] != source:
        return f"the source of {kernel.kernel_id} has changed since it was measured"
    return None

"""Staleness: whether an entry's kernel is still the one that was measured."""

from __future__ import annotations

from functools import cache

from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import library_version
from layerzero_runtime.tables.table import Table

# What an adapter's file calls to declare its kernels.
_DECLARATIONS = ("Kernel", "KernelSpec")


def version_that_matters(kernel: Kernel) -> str:
    """The leading digits of the library's version that the adapter declares to matter; "" if it is not installed."""
    version = library_version(kernel.spec.library)
    return "" if version is None else ".".join(version.split("+")[0].split(".")[: kernel.spec.version_digits])


def kernel_source_hash(kernel: Kernel) -> str:
    """A hash over the code of the kernel's adapter, 32 hexadecimal digits; "" where no source is at hand.

    What the adapter's file declares (specs and the list of its kernels), imports, comments between statements and its
    docstring are left out: none of these changes how long a call takes. A limit that has changed is not stale: it is
    checked again whenever a snapshot is built.
    """
    return _code_hash(kernel.load.__code__.co_filename) if hasattr(kernel.load, "__code__") else ""


@cache
def _code_hash(path: str) -> str:
    import hashlib

    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except OSError:
        return ""
    return hashlib.sha256(_timed_code(source).encode()).hexdigest()[:32]


def _timed_code(source: str) -> str:
    """The statements of a module that decide how long its functions take."""
    import ast
    import re

    # To walk through all nodes of every function takes longer than all else here, and most name no declaration.
    declaration = re.compile(rf"\b(?:{'|'.join(_DECLARATIONS)})\b")
    lines = source.splitlines()
    kept: list[str] = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        decorators = getattr(statement, "decorator_list", ())
        first = min((statement.lineno, *(decorator.lineno for decorator in decorators)))
        text = "\n".join(lines[first - 1 : statement.end_lineno])
        if declaration.search(text):
            calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
            if any(isinstance(function, ast.Name) and function.id in _DECLARATIONS for function in calls):
                continue
        kept.append(text)
    return "\n".join(kept)


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

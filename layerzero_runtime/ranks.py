"""Whether the process is one of several ranks that must select alike."""

from __future__ import annotations

from typing import Any

_group: Any = None


def attached() -> bool:
    """Whether `layerzero_runtime.distributed.attach` was called: then no kernel is replaced on one rank alone."""
    return _group is not None


def set_group(group: Any) -> None:
    global _group
    _group = group


def group() -> Any:
    return _group

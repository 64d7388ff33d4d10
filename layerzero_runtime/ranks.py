"""Whether the process is one of several ranks that must select alike."""

from __future__ import annotations

_group: object | None = None


def attached() -> bool:
    """Whether `layerzero_runtime.distributed.attach` was called: then no kernel is replaced on one rank alone."""
    return _group is not None


def set_group(group: object | None) -> None:
    global _group
    _group = group


def group() -> object | None:
    return _group

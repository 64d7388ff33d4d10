"""Checks of the values that describe a call, by the names of their fields.

All raise `ContextTypeError` for a wrong type and `ContextError` for a value that is not allowed.
"""

from __future__ import annotations

import sys

from layerzero_runtime.errors import ContextError, ContextTypeError


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise ContextTypeError(f"{name} must be a string, not {value!r}")
    if value not in allowed:
        raise ContextError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")


def checked_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ContextTypeError(f"{name} must be a number, not {value!r}")
    if not abs(value) <= sys.float_info.max:
        raise ContextError(f"{name} is {value}, required a finite number")
    return float(value)


def check_bytes(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ContextTypeError(f"{name} must be an integer, not {value!r}")
    if value < 0:
        raise ContextError(f"{name} is {value}, required at least 0 bytes")


def is_integer(value: object) -> bool:
    """Also of a size that `torch.compile` keeps symbolic while it traces a call."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.SymInt)


def check_size(name: str, value: object) -> None:
    if value is None:
        return
    if not is_integer(value):
        raise ContextTypeError(f"{name} must be an integer, not {value!r}")
    if value < 1:  # type: ignore[operator]
        raise ContextError(f"{name} is {value}, a size must be at least 1")

"""The error of a wheel that cannot be made."""

from __future__ import annotations

from layerzero_runtime.errors import LayerZeroError


class WheelError(LayerZeroError, ValueError):
    """A name, a version or a place that a wheel cannot have; the message says what is allowed."""

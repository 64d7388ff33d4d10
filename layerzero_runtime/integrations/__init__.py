"""How other software calls LayerZero: torch.compile. What it needs is imported where it is at work, not before."""

from __future__ import annotations

from typing import Any


def traced(operation: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Serve a call that Dynamo is tracing (`integrations.tracing.serve_traced`)."""
    from layerzero_runtime.integrations.tracing import serve_traced

    return serve_traced(operation, arguments, options)

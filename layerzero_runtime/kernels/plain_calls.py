"""What is said where a library's compiled code cannot be started past its public function."""

from __future__ import annotations

from layerzero_runtime.counters import log_warning

_warned: set[str] = set()


def warn_of_plain_calls(library: str, reason: str, known: str) -> None:
    """Counted for each kernel that is loaded (`stats()["<library>_plain_calls"]`), logged once per library."""
    from layerzero_runtime.dispatch import count

    count(f"{library.replace('-', '_')}_plain_calls")
    if library not in _warned:
        _warned.add(library)
        log_warning(
            f"{library} is called by its public function, which costs tens of microseconds per call: {reason}; "
            f"use {known}, or leave it to graphs, where the host's time does not count"
        )

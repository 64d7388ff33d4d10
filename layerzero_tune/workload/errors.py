"""The error of a workload that cannot be read or made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from layerzero_runtime.errors import LayerZeroError


class WorkloadError(LayerZeroError, ValueError):
    """A workload or the model it is made from is malformed; the message names file, line and what is allowed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name most like `word`, as a remark to append to a message; empty if none is like it."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

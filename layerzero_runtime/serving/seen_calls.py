"""What the public functions have served, so that calls alike are served without being described."""

from __future__ import annotations

from typing import Any

# Kinds of calls that a function keeps: each is asked in turn, and a call of none of them is described.
MAX_SEEN = 8
# So often the shapes of a call repeat before they are kept as a whole, which costs as much as a few calls.
REPEATS = 8


class SeenCalls:
    """The kinds of plain calls that were served under one snapshot, by public function, the newest first.

    A kind is a tuple that begins with its guard (`calls.guards`), and ends with the parts of its route that a call
    needs; the function that reads it says what lies between. `last_attention` is the one kind with all its sizes
    fixed: a layer of a model repeats the shapes of the one before it. `key_shape` is that of the last call beside it,
    and `repeats` says how often it came again.
    """

    __slots__ = (
        "add_rms_norm",
        "attention",
        "geglu",
        "key_shape",
        "last_attention",
        "layer_norm",
        "linear_fp8",
        "linear_int8",
        "repeats",
        "rms_norm",
        "swiglu",
    )

    def __init__(self) -> None:
        nothing: tuple[tuple[Any, ...], ...] = ()
        self.attention = self.rms_norm = self.add_rms_norm = self.layer_norm = self.swiglu = self.geglu = nothing
        self.linear_fp8 = self.linear_int8 = nothing
        self.last_attention: tuple[Any, ...] = (_no_call, *[None] * 7)
        self.key_shape: tuple[int, ...] | None = None
        self.repeats = 0

    def keep(self, function: str, kind: tuple[Any, ...]) -> None:
        """Put a kind of the public function of that name first; the oldest beyond MAX_SEEN goes."""
        setattr(self, function, (kind, *getattr(self, function)[: MAX_SEEN - 1]))


def _no_call(*tensors: object) -> bool:
    return False

"""What the public functions have served, so that calls alike are served without being described."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

# Kinds of calls that a function keeps: each is asked in turn, and a call of none of them is described.
MAX_SEEN = 8
# So often the shapes of a call repeat before they are kept as a whole, which costs as much as a few calls.
REPEATS = 8
# Calls of no kind are kept whole: so many, then all are forgotten. Those of the layers of a model repeat each other's.
MAX_WHOLE = 1024

# What serves a call, what counts it, and what judges an error of the first.
Served = tuple[Callable[..., Any], Callable[[], Any], Callable[[Exception, tuple[Any, ...]], Any]]


class SeenCalls:
    """The kinds of plain calls that were served under one snapshot, by public function, the newest first.

    A kind is a tuple that begins with its guard (`calls.guards`), and ends with the parts of its route that a call
    needs; the function that reads it says what lies between. `last_attention` is the one kind with all its sizes
    fixed: a layer of a model repeats the shapes of the one before it. `key_shape` is that of the last call beside it,
    and `repeats` says how often it came again. `whole` are calls that are of no kind (of attention with a mask, dropout
    or layout "bshd", those that autograd records), by all that their contexts can depend on.
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
        "whole",
    )

    def __init__(self) -> None:
        nothing: tuple[tuple[Any, ...], ...] = ()
        self.attention = self.rms_norm = self.add_rms_norm = self.layer_norm = self.swiglu = self.geglu = nothing
        self.linear_fp8 = self.linear_int8 = nothing
        self.last_attention: tuple[Any, ...] = (_no_call, *[None] * 7)
        self.whole: dict[Hashable, Served] = {}
        self.key_shape: tuple[int, ...] | None = None
        self.repeats = 0

    def keep(self, function: str, kind: tuple[Any, ...]) -> None:
        """Put a kind of the public function of that name first; the oldest beyond MAX_SEEN goes."""
        setattr(self, function, (kind, *getattr(self, function)[: MAX_SEEN - 1]))

    def keep_whole(self, call: Hashable, served: Served) -> None:
        """Keep one call."""
        if len(self.whole) >= MAX_WHOLE:
            self.whole = {}
        self.whole[call] = served


def _no_call(*tensors: object) -> bool:
    return False

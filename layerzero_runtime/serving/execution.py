"""Eager or graph, prepared or not: which table serves a call, and whether a kernel may compile inside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from layerzero_runtime.context import MODES
from layerzero_runtime.errors import ContextError
from layerzero_runtime.serving.published import PUBLISHED

PREPARATIONS = ("warmup", "on_first_use")

_mode: ContextVar[str] = ContextVar("layerzero_execution_mode", default="eager")


class ExecutionState:
    """What holds for the whole process.

    Attributes:
        preparation: "warmup": a kernel that compiles serves no call before `warmup` has prepared it; "on_first_use": it
            compiles in its first call.
    """

    __slots__ = ("preparation", "watches_captures")

    def __init__(self) -> None:
        self.preparation = "warmup"
        self.watches_captures = False


STATE = ExecutionState()


@contextmanager
def execution_mode(mode: str) -> Iterator[None]:
    """Calls inside the block use the tables of this mode: "graph" for warm-up calls before a capture.

    Raises:
        ContextError: the mode is unknown.
    """
    if mode not in MODES:
        raise ContextError(f"mode is {mode!r}, allowed: {', '.join(MODES)}")
    token = _mode.set(mode)
    PUBLISHED.enter_special()
    try:
        yield
    finally:
        PUBLISHED.leave_special()
        _mode.reset(token)


def preparation(when: str) -> None:
    """When kernels that compile are prepared: "warmup" (the default), or "on_first_use" for scripts.

    Raises:
        ContextError: `when` is neither.
    """
    if when not in PREPARATIONS:
        raise ContextError(f"preparation is {when!r}, allowed: {', '.join(PREPARATIONS)}")
    STATE.preparation = when


def is_capturing() -> bool:
    """Whether the current CUDA stream is being captured into a graph. Costs half a microsecond where CUDA is in use."""
    torch = sys.modules.get("torch")
    return bool(
        torch is not None
        and torch.cuda.is_available()
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    )


def current_mode() -> str:
    """The mode of a call made here and now."""
    if not PUBLISHED.special:
        return "eager"
    return "graph" if _mode.get() == "graph" or is_capturing() else "eager"


def watch_captures() -> None:
    """Have captures through `torch.cuda.CUDAGraph` counted as special, so that eager calls need not ask.

    The class's two methods are wrapped once; torch's own `torch.cuda.graph` and frameworks go through them.
    """
    torch: Any = sys.modules["torch"]
    if STATE.watches_captures or not torch.cuda.is_available():
        return
    STATE.watches_captures = True
    graph = torch.cuda.CUDAGraph
    begin, end = graph.capture_begin, graph.capture_end

    def capture_begin(self: Any, *arguments: Any, **options: Any) -> Any:
        PUBLISHED.enter_special()
        try:
            return begin(self, *arguments, **options)
        except BaseException:
            PUBLISHED.leave_special()
            raise

    def capture_end(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return end(self, *arguments, **options)
        finally:
            PUBLISHED.leave_special()

    graph.capture_begin, graph.capture_end = capture_begin, capture_end
    if is_capturing():
        # The capture that is under way here began before anybody counted; its end will be counted.
        PUBLISHED.enter_special()

"""Eager or graph, prepared or not: which table serves a call, and whether a kernel may compile inside it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from layerzero_runtime.context import MODES
from layerzero_runtime.errors import ContextError

PREPARATIONS = ("warmup", "on_first_use")

_mode: ContextVar[str] = ContextVar("layerzero_execution_mode", default="eager")


class ExecutionState:
    """What the fast paths ask before anything else, by one attribute: whether any thread may be in graph mode.

    Attributes:
        special: number of `execution_mode("graph")` blocks and of CUDA graph captures under way in this process; while
            it is 0, every call is eager.
        preparation: "warmup": a kernel that compiles serves no call before `warmup` has prepared it; "on_first_use": it
            compiles in its first call.
    """

    __slots__ = ("_lock", "preparation", "special", "watches_captures")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.special = 0
        self.preparation = "warmup"
        self.watches_captures = False

    def enter(self) -> None:
        with self._lock:
            self.special += 1

    def leave(self) -> None:
        with self._lock:
            self.special -= 1


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
    STATE.enter()
    try:
        yield
    finally:
        STATE.leave()
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
    if not STATE.special:
        return "eager"
    return "graph" if _mode.get() == "graph" or is_capturing() else "eager"


def watch_captures() -> None:
    """Have captures through `torch.cuda.CUDAGraph` counted in `STATE.special`, so that eager calls need not ask.

    The class's two methods are wrapped once; torch's own `torch.cuda.graph` and frameworks go through them.
    """
    torch: Any = sys.modules["torch"]
    if STATE.watches_captures or not torch.cuda.is_available():
        return
    STATE.watches_captures = True
    graph = torch.cuda.CUDAGraph
    begin, end = graph.capture_begin, graph.capture_end

    def capture_begin(self: Any, *arguments: Any, **options: Any) -> Any:
        STATE.enter()
        try:
            return begin(self, *arguments, **options)
        except BaseException:
            STATE.leave()
            raise

    def capture_end(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return end(self, *arguments, **options)
        finally:
            STATE.leave()

    graph.capture_begin, graph.capture_end = capture_begin, capture_end

"""Clocks of a CUDA device: wall time of calls back to back, and device time of calls in a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.kernel import KernelFunction
from layerzero_tune.measure.clock import Rotation, TimedCalls, collector_off
from layerzero_tune.measure.inputs import Arguments

if TYPE_CHECKING:
    import torch

# A graph holds calls of about this time: so many that what a replay takes beside them (some us) is lost in it.
GRAPH_MS = 1.0
# More calls take long to capture: 10 to 100 us each, on the host.
MAX_GRAPH_CALLS = 256
# Libraries allocate workspaces and choose algorithms in their first calls, which a capture must not see.
_CALLS_BEFORE_CAPTURE = 3


class CaptureError(LayerZeroError):
    """A call cannot be captured in a CUDA graph."""


@dataclass(frozen=True)
class EagerClock:
    """The wall time of calls back to back with one synchronisation at the end: what a loop in Python sees of a kernel
    and of its launch, whichever takes longer. `index` is the device's."""

    index: int

    def timed(self, function: KernelFunction, rotation: Rotation) -> TimedCalls:
        import torch

        synchronize = torch.cuda.synchronize

        def time_calls(calls: int) -> float:
            arguments = rotation.take(calls)
            with collector_off():
                synchronize(self.index)
                start = perf_counter_ns()
                for call in arguments:
                    function(*call)
                synchronize(self.index)
                end = perf_counter_ns()
            return (end - start) / calls

        return time_calls


@dataclass(frozen=True)
class GraphClock:
    """The device time of calls in a CUDA graph, by events before and after its replays. `index` is the device's."""

    index: int

    def timed(self, function: KernelFunction, rotation: Rotation) -> TimedCalls:
        """As in `Clock`; a graph holds calls on arguments that rotate, and is replayed whole.

        Raises:
            CaptureError: the calls cannot be captured.
        """
        import torch

        with torch.cuda.device(self.index):
            stream = torch.cuda.Stream(self.index)  # type: ignore[no-untyped-call]
            held = self._held_calls(function, rotation, stream)
            graph = _captured(function, rotation.take(held), stream)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def time_replays(calls: int) -> float:
            replays = -(-calls // held)
            with torch.cuda.device(self.index):
                before.record()
                for _ in range(replays):
                    graph.replay()
                after.record()
                after.synchronize()
            return float(before.elapsed_time(after)) * 1e6 / (replays * held)

        return time_replays

    def _held_calls(self, function: KernelFunction, rotation: Rotation, stream: object) -> int:
        """How many calls a graph should hold, after some that are not captured."""
        import torch

        stream.wait_stream(torch.cuda.current_stream())  # type: ignore[attr-defined]
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            for call in rotation.take(_CALLS_BEFORE_CAPTURE):
                before.record()
                function(*call)
                after.record()
        torch.cuda.synchronize(self.index)
        call_ms = max(float(before.elapsed_time(after)), 1e-3)
        return max(1, min(MAX_GRAPH_CALLS, math.ceil(GRAPH_MS / call_ms)))


def _captured(
    function: KernelFunction, arguments: Sequence[Arguments], stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """The calls as a graph.

    By the methods that `torch.cuda.graph` is made of: it collects all garbage and gives all memory back before each
    capture, which takes longer than most contests. What other threads do is no reason to fail.

    Raises:
        CaptureError: the calls cannot be captured; says what failed first.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(stream.device)
    try:
        with torch.cuda.stream(stream), collector_off():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in arguments:
                    function(*call)
            except BaseException:
                with suppress(RuntimeError):  # it was invalidated by what failed
                    graph.capture_end()
                raise
            graph.capture_end()
    except RuntimeError as error:
        raise CaptureError(f"cannot be captured in a CUDA graph: {error}") from error
    return graph

"""Kernels of `mlp.swiglu` on the CPU that fail as a test asks, a clock to move by hand, and threads to watch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import Counter
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelSpec

# Longer than any of these tests takes: what waits for so long hangs.
TIMEOUT_S = 60.0
# Above every built-in kernel.
PREFERRED = 200

_Result = TypeVar("_Result")


def right(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def raising(error: Exception) -> Callable[..., Tensor]:
    def act(*arguments: Any) -> Tensor:
        raise type(error)(*error.args)

    return act


class Body:
    """A kernel's function that counts its calls and does what `act` says, which a test may change."""

    def __init__(self, act: Callable[..., Any] = right) -> None:
        self.act = act
        self._calls = Counter()

    @property
    def calls(self) -> int:
        return self._calls.value

    def __call__(self, *arguments: Any) -> Any:
        self._calls.raise_by_one()
        return self.act(*arguments)


def swiglu_spec(kernel_id: str, **changes: Any) -> KernelSpec:
    """The declaration of a kernel that goes before every built-in one, unless changed."""
    fields: dict[str, Any] = {
        "kernel_id": kernel_id,
        "operations": ("mlp.swiglu",),
        "platforms": ("cpu",),
        "dtypes": ("float32", "bfloat16"),
        "library": kernel_id.split(".")[0],
        "requires": (),
        "priority": PREFERRED,
    }
    return KernelSpec(**(fields | changes))


def swiglu_kernel(kernel_id: str, function: Callable[..., Any], **changes: Any) -> Kernel:
    return Kernel(swiglu_spec(kernel_id, **changes), FunctionLoader(function))


def swiglu_context(rows: int = 4, hidden_size: int = 8, **changes: Any) -> SelectionContext:
    """The context of `serve_rightly`'s call, unless changed."""
    fields: dict[str, Any] = {"operation": "mlp.swiglu", "dtype": "float32", "device": detect_device("cpu")}
    return SelectionContext(**(fields | {"rows": rows, "hidden_size": hidden_size} | changes))


def serve_rightly(rows: int = 4, hidden_size: int = 8) -> None:
    """Call, and check the values that the caller gets."""
    gate, up = torch.randn(rows, hidden_size), torch.randn(rows, hidden_size)
    torch.testing.assert_close(lz.swiglu(gate, up), right(gate, up))


def count_of(name: str) -> int:
    return lz.stats().get(name, 0)


def refusal(kernel_id: str) -> str:
    """Why `explain` says that the kernel does not serve the call of `serve_rightly`; "" if it could."""
    return "; ".join(lz.explain(swiglu_context()).refused.get(kernel_id, ()))


class Clock:
    """The clock of the breakers: it stands until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def move(self, seconds: float) -> None:
        self.now_s += seconds
        dispatch.health().reopen_due()


@contextmanager
def clock_by_hand() -> Iterator[Clock]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.health(), "_clock", clock)
        yield clock
        dispatch.health().reset()


class Stop:
    """Holds the first thread that comes by until it is let go."""

    def __init__(self) -> None:
        self._first = threading.Lock()
        self._reached = threading.Event()
        self._let_go = threading.Event()

    def come_by(self) -> None:
        if self._first.acquire(blocking=False):
            self._reached.set()
            assert self._let_go.wait(TIMEOUT_S)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(TIMEOUT_S)

    def let_go(self) -> None:
        self._let_go.set()


class Background:
    """A function running in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        """What the function gave, or raised."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "a thread hangs"
        if self._error is not None:
            raise self._error
        return self._result


def in_threads(work: Callable[[int], _Result], count: int) -> list[_Result]:
    """The results of threads that begin together, by their numbers; what one of them raises is raised here."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> _Result:
        barrier.wait(TIMEOUT_S)
        return work(number)

    threads = [Background(partial(begin, number)) for number in range(count)]
    return [thread.result() for thread in threads]

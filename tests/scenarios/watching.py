"""Looking at a call from outside: which functions it enters, which locks there are, how kernels are judged."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.selection import live_selector
from layerzero_runtime.selection.limits import Limit, Rejection, rejections
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.measure.clock import collector_off
from tests.runtime.conftest import tables_in_force
from tests.runtime.synthetic_table import write_table

PACKAGE = "layerzero_runtime"
_Result = TypeVar("_Result")
Entered = tuple[str, str]  # (module, function); of a function written in C the module is ""


def entered(call: Callable[[], object]) -> list[Entered]:
    """Every function that a call enters, in order, but those of torch that are written in C.

    The garbage collector is off meanwhile: it would enter finalizers of whatever was left before.
    """
    seen: list[Entered] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen.append((str(frame.f_globals.get("__name__")), frame.f_code.co_name))
        elif event == "c_call":
            seen.append(("", argument.__name__))

    with collector_off():
        sys.setprofile(watch)
        try:
            call()
        finally:
            sys.setprofile(None)
    # The watched function itself, and the end of the watching.
    return [entry for entry in seen[1:] if entry != ("", "setprofile")]


def of_the_package(functions: Sequence[Entered]) -> list[Entered]:
    return [(module, name) for module, name in functions if module.split(".")[0] == PACKAGE]


def locks() -> list[Any]:
    """Every lock that the package's modules and living objects hold by name."""
    kinds = (type(threading.Lock()), type(threading.RLock()))
    owners: list[dict[str, Any]] = [
        dict(vars(module)) for name, module in tuple(sys.modules.items()) if name.split(".")[0] == PACKAGE
    ]
    for found in gc.get_objects():
        # Of classes of classes it is no text.
        if str(type(found).__module__).split(".")[0] == PACKAGE:
            names = (*getattr(type(found), "__slots__", ()), *getattr(found, "__dict__", ()))
            owners.append({name: getattr(found, name, None) for name in names})
    return list({id(value): value for owner in owners for value in owner.values() if isinstance(value, kinds)}.values())


@contextmanager
def all_locks_held() -> Iterator[int]:
    """Hold every lock of the package; gives their number. Whoever wants one waits."""
    with ExitStack() as held:
        found = locks()
        for lock in found:
            assert lock.acquire(timeout=10)
            held.callback(lock.release)
        yield len(found)


def judgements(patch: pytest.MonkeyPatch, kernels: Sequence[Kernel]) -> Counter[str]:
    """Counts, from now on, how often each kernel's limits are checked against a call."""
    counted: Counter[str] = Counter()
    names = {id(kernel.spec.limits): kernel.kernel_id for kernel in kernels}

    def counting(limits: Sequence[Limit], context: SelectionContext) -> tuple[Rejection, ...]:
        counted[names.get(id(limits), "another")] += 1
        return rejections(limits, context)

    patch.setattr(live_selector, "rejections", counting)
    return counted


def promptly(work: Callable[[], _Result], seconds: float = 30.0) -> _Result:
    """What the work gives, in a thread of its own; fails where that waits for something which does not come."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


@contextmanager
def measured_tables(folder: Path) -> Iterator[Snapshot]:
    """A published snapshot with a table of this machine's CPU, from invented times."""
    write_table(folder, detect_device("cpu"))
    with tables_in_force(folder) as snapshot:
        yield snapshot

"""Processes that belong to a tuner: started in a group of their own, and never left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from layerzero_tune.measure.process_tree import processes_below
from layerzero_tune.worker.library_compilers import KEPT_ON_DISK


@dataclass(frozen=True)
class Child:
    """A process that was started with a connection to it; it dies once `lifeline` is closed."""

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    lifeline: int

    @classmethod
    def start(
        cls,
        module: str,
        arguments: Sequence[str],
        *,
        shared: Sequence[int] = (),
        output: int | IO[bytes] = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """`python -m MODULE SOCKET SHARED... LIFELINE ARGUMENTS...`, in a process group of its own: Ctrl-C does not
        reach it. `shared` are descriptors that it gets beside the two of the connection and the lifeline."""
        here, there = Pipe(duplex=True)
        lifeline_there, lifeline_here = os.pipe()
        descriptors = (there.fileno(), *shared, lifeline_there)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, descriptors), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=descriptors,
            start_new_session=True,
            # What can be imported here can be imported there, as with multiprocessing's spawn.
            env={**KEPT_ON_DISK, **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        )
        there.close()
        os.close(lifeline_there)
        return cls(process, here, lifeline_here)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it started, those in groups of their own included: ninja has each
        compiler in one. What has ended gets none."""
        below = processes_below(self.process.pid)
        # Who is stopped before being asked for those that it has started starts nobody more.
        if number == signal.SIGKILL:
            self.signal(signal.SIGSTOP)
        if number != signal.SIGSTOP:
            below = iter(list(below))
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:  # all of them have ended
            self.process.poll()
        for process in below:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """End the process and all that it started."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        os.close(self.lifeline)


def die_with_tuner(lifeline: int) -> None:
    """Have this process killed once the other end of the pipe `lifeline` closes, whatever it is doing then.

    The kernel of the system sends the signal, so that even a call that never gives the interpreter back ends. (Linux's
    parent-death signal would do so too, but it fires when the thread that started this process ends.) Elsewhere than on
    Linux an orphan ends when it has finished its contest.
    """
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        closed_before, _, _ = select.select([lifeline], [], [], 0)
        if closed_before:
            os.kill(os.getpid(), signal.SIGKILL)

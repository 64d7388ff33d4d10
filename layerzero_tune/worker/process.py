"""`WorkerProcess`: contests in a process that may die."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import IO

from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.serving.recovery import says_out_of_memory
from layerzero_tune.measure.contest import Contest, ContestOutcome, JobOutcome
from layerzero_tune.results.measurement import Status
from layerzero_tune.worker.child import Child
from layerzero_tune.worker.progress_board import ProgressBoard, Step
from layerzero_tune.worker.protocol import Finished, Loss, Ready, Refusal, Reply, Request
from layerzero_tune.worker.time_limits import TimeLimits

# Importing torch takes 1 to 10 s, and a minute from a cold network disk.
START_TIMEOUT_S = 120.0
# How often the tuner looks whether a silent worker still makes steps.
_LOOK_S = 0.25
_MESSAGE_LENGTH = 160
_VMSTAT = "/proc/vmstat"
# A candidate's first loss may be the machine's fault, or an earlier kernel's in the same process.
_CHANCES = 2
DEFAULT_LIMITS = TimeLimits()
_logger = logging.getLogger(__name__)
_LEFT_OUT = JobOutcome("refused", "left out while another candidate is measured alone")


class GivenUpError(BaseException):
    """Another thread has given up what this one measures. Like Ctrl-C no `Exception`: it is no kernel's failure."""


@dataclass(frozen=True)
class _Child:
    """A running worker with all that is to be released after it."""

    child: Child
    board: ProgressBoard
    output: IO[bytes]
    oom_kills: int

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.child.process

    @property
    def connection(self) -> Connection[Request, Reply]:
        return self.child.connection

    def wait_for_reply(self, limit_s: Callable[[Step], float], check: Callable[[], None]) -> Reply:
        """The next reply, or what became of the worker that gives none; `limit_s` says how long a step may take, and
        `check`, which is called at every look, may raise."""
        step, now, watched_s = self.board.read(), time.monotonic(), 0.0
        before = step.number
        while True:
            check()
            closed = False
            try:
                if self.connection.poll(_LOOK_S):
                    return self.connection.recv()
            except (EOFError, ConnectionError):
                closed = True
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(_LOOK_S)
            if self.process.poll() is not None and (closed or not self.connection.poll()):
                return self._died(before)
            # While this process was stopped, the worker may have been as well: such a time counts as one look.
            passed_s, now = time.monotonic() - now, time.monotonic()
            watched_s += min(passed_s, 2 * _LOOK_S)
            if self.board.read() != step:
                step, watched_s = self.board.read(), 0.0
            elif watched_s > limit_s(step):
                silence = f"no progress for {limit_s(step):g} s"
                loss = self._lost("timeout", silence, self._last_words(), before)
                outcome = replace(loss.outcome, hung_compiling=step.may_compile)
                return replace(loss, outcome=outcome, is_final=step.may_compile)

    def _died(self, before: int) -> Loss:
        end, words = _end_of(self.process.returncode), self._last_words()
        if self.process.returncode == -signal.SIGKILL and oom_kills() > self.oom_kills:
            return self._lost("out_of_memory", f"{end}, the system being out of memory,", words, before)
        # A library that cannot go on without memory says so and aborts.
        refused = self.process.returncode < 0 and says_out_of_memory(words)
        return self._lost("out_of_memory" if refused else "died", end, words, before)

    def _lost(self, status: Status, reason: str, words: str, before: int) -> Loss:
        step = self.board.read()
        if step.number == before:
            return Loss(None, JobOutcome(status, f"{reason}{words}"))
        return Loss(step.candidate, JobOutcome(status, f"{reason} at {step.name}{words}"))

    def _last_words(self) -> str:
        """The last line that the worker printed, such as the C library's reason for an abort."""
        end = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, end - 4096))
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return f"; last output: {lines[-1].strip()[:_MESSAGE_LENGTH]}" if lines else ""

    def forget_output(self) -> None:
        self.output.seek(0)  # the worker writes at the same offset, which it shares
        self.output.truncate()

    def kill(self) -> None:
        """End the worker and the processes that its kernels started (its process group)."""
        self.child.kill()
        self.board.close()
        self.output.close()


class WorkerProcess(AbstractContextManager["WorkerProcess"]):
    """A subprocess that measures contests one after the other and is replaced when one of them kills it.

    It is started when it is first needed, or before by `start`. It runs in a process group of its own: Ctrl-C reaches
    the tuner alone, which ends it, and it dies with the tuner however that ends. Not for several threads at once, but
    for `give_up`.

    Args:
        kernel_modules: importable modules with an attribute `KERNELS`, measured beside the built-in kernels.
        device: torch's name of the device on which it measures.
    """

    def __init__(self, kernel_modules: tuple[str, ...] = (), device: str = "cpu") -> None:
        self._kernel_modules = kernel_modules
        self._device = device
        self._child: _Child | None = None
        self._ready = False
        self._is_given_up = Event()

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The id of the process, None while there is none."""
        return None if self._child is None else self._child.process.pid

    def start(self) -> None:
        """Start the process, if it does not run, without waiting until it is ready."""
        if self._child is not None and self._child.process.poll() is not None:
            self.close()
        if self._child is None:
            self._child = _spawn(self._device, self._kernel_modules)
            self._ready = False

    def close(self) -> None:
        """End the process; a later `run` starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def give_up(self) -> None:
        """From another thread: have the one that measures end the process and raise `GivenUpError`, now and later."""
        self._is_given_up.set()

    def check(self) -> None:
        """Whether to go on.

        Raises:
            GivenUpError: another thread has given up.
        """
        if self._is_given_up.is_set():
            raise GivenUpError

    def run(
        self,
        contest: Contest,
        limits: TimeLimits | None = None,
        known: Mapping[int, JobOutcome] = MappingProxyType({}),
    ) -> ContestOutcome:
        """Measure a contest, whatever its kernels do to the process.

        Candidates whose outcomes are `known`, by index, are not touched. `limits` (default: `DEFAULT_LIMITS`) are those
        of each step of a candidate (loading it, its first call, warming up, one sample), not of the contest. The
        candidate at whose step the process is lost (it dies, falls silent, leaks memory, or its device is lost to it)
        is measured again alone, in a fresh process: where it comes through, the whole contest is begun again with it.
        Its second loss, alone or not, is final: it gets the outcome, and the contest is begun again without it.

        A silence is given the same second chance as a death: a machine that stood still looks like a kernel that hangs,
        and to be sure costs seconds. Where code may be compiled it would cost minutes, and is final at once.

        Raises:
            LayerZeroError: the worker cannot start, or the contest cannot be measured at all (its own subclasses).
        """
        limits = limits or DEFAULT_LIMITS
        settled = dict(known)
        losses: Counter[int | None] = Counter()
        alone: int | None = None
        while True:
            others = () if alone is None else range(len(contest.candidates))
            left_out = {index: _LEFT_OUT for index in others if index != alone}
            try:
                reply = self._ask(contest, left_out | settled, limits)
            except BaseException:  # Ctrl-C, mostly: a worker in the middle of a contest is of no use to the next
                self.close()
                raise
            if isinstance(reply, Refusal):
                raise reply.error
            if isinstance(reply, Finished):
                if reply.is_last:
                    _logger.info("the worker is replaced: its kernels keep more memory than they may")
                    self.close()
                if alone is None:
                    return reply.outcome
                alone = None
                continue
            assert isinstance(reply, Loss)
            self.close()
            lost = reply.candidate
            losses[lost] += 1
            if losses[lost] < _CHANCES and not reply.is_final:
                alone = lost  # at no candidate's step the damage may be an earlier contest's: all of it again
            elif lost is not None:
                settled[lost] = reply.outcome
                alone = None
            else:
                outcomes = tuple(settled.get(index, reply.outcome) for index in range(len(contest.candidates)))
                return ContestOutcome(outcomes, datetime.now(UTC).isoformat(timespec="seconds"))

    def _start_ready(self) -> Refusal | None:
        """Have a process that takes requests; why not, where it says so. One that is lost while it starts is replaced.

        Raises:
            LayerZeroError: it was lost again.
        """
        for _ in range(_CHANCES):
            self.start()
            assert self._child is not None
            if self._ready:
                return None
            greeting = self._child.wait_for_reply(lambda step: START_TIMEOUT_S, self.check)
            if isinstance(greeting, Ready):
                self._ready = True
                return None
            self.close()  # it has ended, or is about to
            if isinstance(greeting, Refusal):
                return greeting
        reason = greeting.outcome.message if isinstance(greeting, Loss) else greeting
        raise LayerZeroError(f"the worker process did not start: {reason}")

    def _ask(self, contest: Contest, settled: Mapping[int, JobOutcome], limits: TimeLimits) -> Reply:
        refusal = self._start_ready()
        if refusal is not None:
            return refusal
        child = self._child
        assert child is not None
        child.forget_output()
        try:
            child.connection.send(Request(contest, settled))
        except ConnectionError:
            return Loss(None, JobOutcome("died", "ended before the contest began"))
        return child.wait_for_reply(lambda step: limits.of(step, contest.context), self.check)


def _spawn(device: str, kernel_modules: tuple[str, ...]) -> _Child:
    board = ProgressBoard.create()
    output = tempfile.TemporaryFile()  # noqa: SIM115 - `_Child.kill` closes it
    killed_before = oom_kills()
    child = Child.start(
        "layerzero_tune.worker.main", (device, *kernel_modules), shared=(board.descriptor,), output=output
    )
    return _Child(child, board, output, killed_before)


def oom_kills() -> int:
    """How many processes the system has killed since boot because its memory, or a container's, was used up; 0 where it
    does not tell (Linux does: proc(5), /proc/vmstat)."""
    try:
        lines = Path(_VMSTAT).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _end_of(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"

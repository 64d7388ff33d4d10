"""`Compilers`: processes that compile kernels before their contests, in parallel, so that the worker finds the code in
the caches on disk."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from typing import Any

from layerzero_runtime.devices.cpu import usable_processors
from layerzero_runtime.errors import LayerZeroError
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.contest import JobOutcome
from layerzero_tune.worker.child import Child
from layerzero_tune.worker.compile_job import CompileJob
from layerzero_tune.worker.import_times import ImportTimes
from layerzero_tune.worker.process import START_TIMEOUT_S
from layerzero_tune.worker.protocol import Ready, Refusal
from layerzero_tune.worker.time_limits import TimeLimits

# As many as a search measures configurations together; each takes some hundred MB.
MAX_COMPILERS = 8
# The worker and the tuner.
_BUSY_PROCESSORS = 2
_LOOK_S = 0.25
_MODULE = "layerzero_tune.worker.compiler_main"
# They compile for a GPU that is described to them.
_WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
_logger = logging.getLogger(__name__)


def compiler_count(processors: int | None = None) -> int:
    """How many processes should compile beside a worker: by default on the processors that this process may use."""
    if processors is None:
        processors = len(usable_processors() or ()) or os.cpu_count() or 1
    return max(1, min(MAX_COMPILERS, processors - _BUSY_PROCESSORS))


class Compilers(AbstractContextManager["Compilers"]):
    """A pool of processes, each started when it is first needed.

    What compiles without its device is compiled here: the loads of kernels, not their first calls. What fails here, or
    kills its process, is left to the worker, which has the device and records what comes of it. Only a compilation that
    exceeds its limit is an outcome: to try it again would cost the same again.

    Args:
        kernel_modules: as for `WorkerProcess`.
        count: how many processes.
        limit_s: how long one compilation may take.
    """

    def __init__(
        self, kernel_modules: tuple[str, ...] = (), count: int | None = None, limit_s: float = TimeLimits().compile_s
    ) -> None:
        self._limit_s = limit_s
        count = compiler_count() if count is None else count
        self._idle = [_Compiler(kernel_modules) for _ in range(count)]
        self._all = tuple(self._idle)
        self._returned = threading.Condition()
        self._waiting: Counter[str] = Counter()
        self._times = ImportTimes()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="compiling")
        self._found: dict[str, Future[JobOutcome | None]] = {}
        self._hanging: dict[tuple[str, str], JobOutcome] = {}
        self._faults: Counter[str] = Counter()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for compiler in self._all:
            compiler.end()
        self._threads.shutdown()
        for compiler in self._all:
            compiler.lose()

    def finish(self, jobs: Iterable[CompileJob]) -> dict[str, JobOutcome]:
        """Compile these before all others; by their keys the outcomes of those that hang."""
        wanted = {job.key: job for job in jobs}
        for key, future in tuple(self._found.items()):
            if key not in wanted and future.cancel():
                del self._found[key]
        self.expect(wanted.values())
        outcomes = {key: self._found[key].result() for key in wanted}
        return {key: outcome for key, outcome in outcomes.items() if outcome is not None}

    def expect(self, jobs: Iterable[CompileJob]) -> None:
        """Compile these when nothing else is to be compiled, each once."""
        for job in jobs:
            if job.key not in self._found:
                self._found[job.key] = self._threads.submit(self._compile, job)

    def have(self, jobs: Iterable[CompileJob]) -> bool:
        """Whether all of these were compiled, or it was tried."""
        return all(job.key in self._found and self._found[job.key].done() for job in jobs)

    @property
    def faults(self) -> Mapping[str, int]:
        """How many compilations were left to the worker, by kernel."""
        return self._faults

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no compiler takes any processor time: what they compile goes on afterwards."""
        for compiler in self._all:
            compiler.stop()
        try:
            yield
        finally:
            for compiler in self._all:
                compiler.go_on()

    def _compile(self, job: CompileJob) -> JobOutcome | None:
        choice = choice_of(job.kernel_id, job.configuration)
        if choice in self._hanging:
            return self._hanging[choice]
        compiler = self._take(job)
        has_imported, start = job.library in compiler.imported, monotonic()
        try:
            fault = compiler.compile(job, self._limit_s)
        except _HangsError:
            silence = f"no end of compiling within {self._limit_s:g} s"
            return self._hanging.setdefault(choice, JobOutcome("timeout", silence, hung_compiling=True))
        finally:
            taken_s = monotonic() - start
            beside = "" if has_imported else ", the import of its library included"
            _logger.debug("%s was compiled ahead in %.1f s%s", job.kernel_id, taken_s, beside)
            with self._returned:
                self._times.learn(job.library, taken_s, has_imported=has_imported)
                self._idle.append(compiler)
                self._returned.notify_all()
        if fault:
            self._faults[job.kernel_id] += 1
            if self._faults[job.kernel_id] == 1:
                _logger.info("%s is left to the worker to compile, such as here: %s", job.kernel_id, fault)
        return None

    def _take(self, job: CompileJob) -> _Compiler:
        """One that has imported the kernel's library, as soon as it is idle, or another one where that is sooner. Of
        those at least one is idle for each that waits: no more threads are here than processes."""
        with self._returned:
            self._waiting[job.library] += 1
            while True:
                owners = [compiler for compiler in self._all if job.library in compiler.imported]
                compiler = next((idle for idle in reversed(self._idle) if idle in owners), None)
                ahead = (len(owners) + self._waiting[job.library] - 1) / max(1, len(owners))
                if compiler is None and not (owners and self._times.is_worth_waiting(job.library, ahead)):
                    compiler = self._idle[-1]
                if compiler is not None:
                    break
                self._returned.wait()
            self._waiting[job.library] -= 1
            self._idle.remove(compiler)
        return compiler


class _HangsError(Exception):
    """A compilation takes longer than it may."""


class _Compiler:
    """One process, which is replaced where it is lost.

    Attributes:
        imported: libraries of the kernels that it has compiled; to import another takes longer than most compilations.
    """

    def __init__(self, kernel_modules: Sequence[str]) -> None:
        self.imported: set[str] = set()
        self._kernel_modules = kernel_modules
        self._child: Child | None = None
        self._lock = threading.Lock()
        self._is_stopped = False
        self._has_ended = False
        self._refused = ""

    def compile(self, job: CompileJob, limit_s: float) -> str:
        """Why the job was not done, empty if it was.

        Raises:
            _HangsError: it takes longer.
        """
        if self._refused:
            return self._refused
        try:
            child = self._started()
            if child is None:
                return self._refused
            child.connection.send(job)
            self.imported.add(job.library)
            return str(self._reply(child, limit_s))
        except _HangsError:
            self.lose()
            raise
        except (EOFError, OSError) as error:  # the process has ended, or was ended
            self.lose()
            return f"the process was lost: {type(error).__name__}"

    def _started(self) -> Child | None:
        """The process, ready for a job; None where none can be had, which is said once.

        Raises:
            EOFError, OSError: it was lost at once.
        """
        with self._lock:
            if self._has_ended:
                raise EOFError
            if self._child is not None:
                return self._child
            child = self._child = Child.start(_MODULE, tuple(self._kernel_modules), environment=_WITHOUT_GPU)
            if self._is_stopped:
                child.signal(signal.SIGSTOP)
        greeting: Ready | Refusal | str
        try:
            greeting = self._reply(child, START_TIMEOUT_S)
        except _HangsError:
            greeting = Refusal(LayerZeroError(f"it was not ready within {START_TIMEOUT_S:g} s"))
        if isinstance(greeting, Refusal):
            self.lose()
            self._refused = str(greeting.error)
            _logger.warning("nothing is compiled ahead by one of the processes for it: %s", self._refused)
            return None
        return child

    def _reply(self, child: Child, limit_s: float) -> Any:
        """What the process says, unless it takes longer. While it is stopped no time passes for it; while this process
        was stopped, it may have been as well: such a time counts as one look."""
        now, watched_s = monotonic(), 0.0
        while not child.connection.poll(_LOOK_S):
            passed_s, now = monotonic() - now, monotonic()
            if not self._is_stopped:
                watched_s += min(passed_s, 2 * _LOOK_S)
            if watched_s > limit_s:
                raise _HangsError
        return child.connection.recv()

    def stop(self) -> None:
        """Let it have no processor time, from now on or as soon as it runs."""
        with self._lock:
            self._is_stopped = True
            if self._child is not None:
                self._child.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it have its time again."""
        with self._lock:
            self._is_stopped = False
            if self._child is not None:
                self._child.signal(signal.SIGCONT)

    def end(self) -> None:
        """End the process, for good."""
        with self._lock:
            self._has_ended = True
            if self._child is not None:
                self._child.signal(signal.SIGKILL)

    def lose(self) -> None:
        """End the process and let go of it; the next job starts another."""
        with self._lock:
            self.imported.clear()
            if self._child is not None:
                self._child.kill()
                self._child = None

"""Recording what production asks for: shapes of calls as a workload file, bounded, and never in the way of a call."""

from __future__ import annotations

import atexit
import json
import os
import threading

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup, log_warning
from layerzero_runtime.errors import ContextError

MAX_CONTEXTS = 10_000
FLUSH_SECONDS = 10.0


class WorkloadRecorder:
    """Counts calls by their context, and writes them as workload lines whose weight is the count.

    A call that would have to wait for another thread's is not recorded, nor is a new shape beyond `max_contexts`; both
    are counted (`workload_dropped`). The file is replaced as a whole every `flush_s` seconds while something is new,
    and when the recorder is closed or the process ends; what it held before goes at the first of these. Each process
    needs a file of its own (`layerzero-tune workload merge` joins them); what a forked one does is not written until it
    calls `record_workload` itself.

    Raises:
        ContextError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        records_hits: bool = False,
        counters: CounterGroup,
        max_contexts: int = MAX_CONTEXTS,
        flush_s: float = FLUSH_SECONDS,
    ) -> None:
        self.path = os.fspath(path)
        self.records_hits = records_hits
        self._counters = counters
        self._max_contexts = max_contexts
        self._flush_s = flush_s
        self._process = os.getpid()
        self._temporary = f"{self.path}.{self._process}.{id(self):x}.tmp"
        self._counts: dict[SelectionContext, int] = {}
        self._has_news = False
        # Guards the counts; a call never waits for it.
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        try:
            self._check_writable()
        except OSError as error:
            raise ContextError(
                f"cannot write the workload to {self.path}: {error.strerror or error}; choose another path"
            ) from error
        atexit.register(self.close)
        threading.Thread(target=self._flush_regularly, name="layerzero-workload", daemon=True).start()

    def record(self, context: SelectionContext) -> None:
        """Count a call."""
        if not self._lock.acquire(blocking=False):
            self._counters.raise_by_one("workload_dropped")
            return
        try:
            if self._closed:
                return
            count = self._counts.get(context)
            if count is None and len(self._counts) >= self._max_contexts:
                self._counters.raise_by_one("workload_dropped")
                return
            self._counts[context] = (count or 0) + 1
            self._has_news = True
        finally:
            self._lock.release()

    def close(self) -> None:
        """Write what is left; nothing is recorded any more."""
        if os.getpid() != self._process:
            return  # the file is the parent's, and its locks may have been held
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._wake.set()
        self._write_news()

    def _flush_regularly(self) -> None:
        while not self._wake.wait(self._flush_s):
            self._write_news()

    def _write_news(self) -> None:
        # Counted inside the lock, so that older counts never replace newer ones.
        with self._writing:
            if not self._has_news:
                return
            self._has_news = False
            try:
                self._write()
            except OSError as error:
                self._has_news = True
                if self._counters.raise_by_one("workload_unwritten") == 0:
                    log_warning(f"cannot write the workload to {self.path}: {error.strerror or error}")

    def _write(self) -> None:
        weights: dict[str, int] = {}
        # A copy of a dictionary is one step under the GIL: no call is dropped because of it.
        for context, count in self._counts.copy().items():
            text = _line(context)
            weights[text] = weights.get(text, 0) + count
        lines = sorted(weights.items(), key=lambda line: (-line[1], line[0]))
        try:
            with open(self._temporary, "w", encoding="utf-8") as file:
                file.writelines(f'{text[:-1]}, "weight": {count}}}\n' for text, count in lines)
            os.replace(self._temporary, self.path)
        except OSError:
            if os.path.exists(self._temporary):
                os.remove(self._temporary)
            raise

    def _check_writable(self) -> None:
        """Both the file and its folder are written to; what is in the file stays."""
        with open(self._temporary, "w", encoding="utf-8"):
            pass
        os.remove(self._temporary)
        with open(self.path, "a", encoding="utf-8"):
            pass


def _line(context: SelectionContext) -> str:
    """A workload line without its weight. A captured call is one of mode "graph"; that it was under capture is no
    feature to measure."""
    given = context.to_dict()
    given.pop("is_cuda_graph_capturing", None)
    return json.dumps(given)

"""What a person sees of a run while it measures: where it is, the best so far, the budget left, crashes."""

from __future__ import annotations

import math
from collections import Counter
from types import TracebackType
from typing import Self

from layerzero_tune.command_line.output import duration_text, progress_bar, shape_text
from layerzero_tune.compile.judge import judge
from layerzero_tune.results.measurement import LOSSES
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.key_agenda import Kind, Planned
from layerzero_tune.search.tuning import FinishedContest


class RunProgress:
    """A watcher that draws a line with a bar, and keeps the figures of the run."""

    def __init__(self, deadline: Deadline | None, left: int) -> None:
        self.measured = 0
        self.preparing_s = 0.0
        self.crashes = 0
        self.kinds: Counter[Kind] = Counter()
        self._deadline = deadline
        self._best = ""
        self._bar = progress_bar()
        self._task = self._bar.add_task("measuring", total=left)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begins(self, planned: Planned) -> None:
        self._bar.update(self._task, description=self.line(planned))

    def line(self, planned: Planned) -> str:
        """What is being measured, what the contest before gave, the budget left, and crashes so far."""
        context = planned.contest.context
        parts = [f"{planned.kind} {context.operation} {context.dtype} {shape_text(context)}"]
        if self._best:
            parts.append(f"last: {self._best}")
        if self._deadline is not None:
            parts.append(f"budget left {duration_text(max(0.0, self._deadline.left_s()))}")
        if self.crashes:
            parts.append(f"crashes {self.crashes}")
        return ", ".join(parts)

    def finished(self, finished: FinishedContest) -> None:
        self.measured += 1
        self.preparing_s += finished.preparation_s
        self.kinds[finished.planned.kind] += 1
        self.crashes += sum(row.status in LOSSES for row in finished.rows)
        self._best = best_text(finished)
        self._bar.update(self._task, completed=self.measured, total=self.measured + finished.left)


def best_text(finished: FinishedContest) -> str:
    """The fastest kernel of the contest and its gain over the default."""
    for verdicts in judge(finished.rows).values():
        for verdict in verdicts:
            gain = math.exp(-verdict.standings[verdict.best].log_ratio)
            return f"{verdict.best[0]} {gain:.2f}x" if verdict.best != verdict.reference else verdict.best[0]
    return "no kernel has a time"

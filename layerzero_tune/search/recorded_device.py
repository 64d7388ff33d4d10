"""A recorded device, which replays results through the same pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ResultsError
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.configurations.searches import Searches
from layerzero_tune.search.device import Held
from layerzero_tune.search.jobs import contest_of_rows


class RecordedDevice:
    """Recorded results in place of a clock: it offers the contests that it holds, and gives their rows unchanged.

    Raises:
        ResultsError: there are no rows, or they come from several devices.
    """

    def __init__(self, rows: Sequence[Measurement]) -> None:
        devices = {DeviceSpec.from_dict(row.device) for row in rows}
        if len(devices) != 1:
            raise ResultsError(f"a recorded device needs results of one device, these hold {len(devices)}")
        self.spec = next(iter(devices))
        self._contests: dict[str, list[Measurement]] = {}
        for row in sorted(rows, key=lambda row: (row.contest_id, not row.is_default, row.kernel_id, row.job_id)):
            self._contests.setdefault(row.contest_id, []).append(row)
        self._by_context: dict[SelectionContext, list[str]] = {}
        for contest_id, found in self._contests.items():
            self._by_context.setdefault(found[0].context, []).append(contest_id)

    @property
    def contexts(self) -> tuple[SelectionContext, ...]:
        """The recorded points."""
        return tuple(self._by_context)

    searches: Searches | None = None

    def contests(self, context: SelectionContext, held: Held = MappingProxyType({})) -> tuple[Contest, ...]:
        return tuple(contest_of_rows(self._contests[contest_id]) for contest_id in self._by_context.get(context, ()))

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        rows = tuple(self._contests[contest.contest_id])
        return rows, ContestOutcome((), rows[0].measured_at)

    def again(self, contest: Contest) -> Contest | None:
        return None

    def current(self, rows: Sequence[Measurement]) -> Sequence[Measurement]:
        return rows

    def recalled(self, rows: Sequence[Measurement]) -> Contest | None:
        return None

    def expect(self, contests: Iterable[Contest]) -> None:
        """Nothing: replaying compiles nothing."""

    def is_compiling(self, contest: Contest) -> bool:
        return False

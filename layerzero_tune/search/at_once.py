"""Several devices of one product on this host, each with a contest of its own."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

from layerzero_runtime.errors import LayerZeroError
from layerzero_tune.measure.contest import Contest
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.device import LiveDevice, torch_name
from layerzero_tune.search.executor import Measured, measured_on
from layerzero_tune.worker.process import GivenUpError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ended:
    device: LiveDevice
    contest: Contest
    result: Measured | BaseException


class AtOnce(AbstractContextManager["AtOnce"]):
    """An executor over devices of one product: a contest is measured by one of them, in that device's worker process.

    A device that cannot measure any more (its worker does not start again) leaves the run, with a warning, and another
    one measures its contest; a contest that two devices fail at ends the run, and so does the loss of the last device.
    """

    def __init__(self, devices: Sequence[LiveDevice]) -> None:
        # The last one that became free is the next to be used: the contests of a search stay on its device.
        self._free = list(reversed(devices))
        self._busy: dict[str, tuple[LiveDevice, Thread]] = {}
        self._pending: deque[Contest] = deque()
        self._failed: set[str] = set()
        self._ended: SimpleQueue[_Ended] = SimpleQueue()

    def __exit__(self, *error: object) -> None:
        for device, _ in self._busy.values():
            device.give_up()
        for _, thread in self._busy.values():
            thread.join()

    @property
    def slots(self) -> int:
        return len(self._free) + len(self._busy)

    def submit(self, contest: Contest) -> None:
        self._pending.append(contest)
        self._begin()

    def finished(self, within_s: float) -> Measured | None:
        deadline = Deadline.after(within_s)
        while True:
            left_s = max(0.0, deadline.left_s())
            try:
                ended = self._ended.get(timeout=None if math.isinf(left_s) else left_s)
            except Empty:
                return None
            del self._busy[ended.contest.contest_id]
            if isinstance(ended.result, Measured):
                self._free.append(ended.device)
                self._begin()
                return ended.result
            self._leave(ended.device, ended.contest, ended.result)

    def _begin(self) -> None:
        while self._pending and self._free:
            device, contest = self._free.pop(), self._pending.popleft()
            thread = Thread(target=self._measure, args=(device, contest), daemon=True)
            self._busy[contest.contest_id] = (device, thread)
            thread.start()

    def _measure(self, device: LiveDevice, contest: Contest) -> None:
        result: Measured | BaseException
        try:
            result = measured_on(device, contest)
        except GivenUpError:
            return
        except BaseException as error:  # noqa: BLE001 - raised by `finished`, in the thread that can tell the user
            result = error
        self._ended.put(_Ended(device, contest, result))

    def _leave(self, device: LiveDevice, contest: Contest, error: BaseException) -> None:
        is_last = self.slots == 0
        if is_last or contest.contest_id in self._failed or not isinstance(error, LayerZeroError):
            raise error
        self._failed.add(contest.contest_id)
        _logger.warning(
            "%s %s cannot measure any more and leaves the run, %d of its kind are left: %s",
            device.spec.name, torch_name(device.spec), self.slots, error
        )  # fmt: skip
        self._pending.appendleft(contest)
        self._begin()

"""Points that a static key adds between those of the workload, where the regret model is in doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.measure.contest import Contest
from layerzero_tune.search.between import points_between
from layerzero_tune.search.contest_time import CallTimes
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.key_regret import KeyRegret

# Expected regret below which no point is added between those of the workload, and its own come no sooner than added.
ENOUGH = 0.005


@dataclass(frozen=True)
class Added:
    """A point between those of the workload.

    Attributes:
        is_edge: whether different choices win at the measured points around.
        contest: the device's contest there.
        regret: expected regret at the point, log ratio.
        times: what its calls are expected to take.
    """

    sizes: Sizes
    is_edge: bool
    contest: Contest
    regret: float
    times: CallTimes


class PointsBetween:
    """The points that a key may add, worked out once for each regret model: a model estimates one in a millisecond, and
    a key with hundreds of cells has hundreds of them.

    Args:
        device: offers contests.
        operation: the key's operation.
        regret: the regret that is left under the key.
        call_times: what the calls of a contest at some sizes are expected to take.
    """

    def __init__(
        self,
        device: MeasuringDevice,
        operation: Operation,
        regret: KeyRegret,
        call_times: Callable[[Sizes, Contest], CallTimes],
    ) -> None:
        self._device = device
        self._operation = operation
        self._regret = regret
        self._call_times = call_times
        self._model: RegretModel | None = None
        self._found: tuple[Added, ...] = ()
        self._offered: dict[Sizes, Contest | None] = {}

    def found(self) -> Sequence[Added]:
        """Those with at least `ENOUGH` expected regret, measured ones among them until the model knows."""
        model = self._regret.model
        if model is not self._model:
            self._model = model
            self._found = tuple(self._doubtful(model)) if model else ()
        return self._found

    def _doubtful(self, model: RegretModel) -> Iterator[Added]:
        for point in points_between(self._operation, model):
            regret = self._regret.regret(point.sizes)
            contest = self._offered_at(point.sizes, point.context) if regret >= ENOUGH else None
            if contest is not None:
                yield Added(point.sizes, point.is_edge, contest, regret, self._call_times(point.sizes, contest))

    def _offered_at(self, sizes: Sizes, context: SelectionContext) -> Contest | None:
        """The device's first contest at a point that the workload does not have."""
        if sizes not in self._offered:
            self._offered[sizes] = next(iter(self._device.contests(context)), None)
        return self._offered[sizes]

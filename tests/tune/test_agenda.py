"""The agenda: coverage first, then what lowers the regret most per second; nothing twice, nothing forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import cell_of
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.between import CLOSEST
from layerzero_tune.search.device import Held
from layerzero_tune.search.jobs import contest_of_rows
from layerzero_tune.search.key_agenda import Planned
from layerzero_tune.search.key_between import ENOUGH
from layerzero_tune.search.key_regret import KeyRegret
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.workload.lines import WorkloadLine
from tests.tune.synthetic_landscapes import beyond, landscapes
from tests.tune.synthetic_results import ALL_KERNELS, DEVICE, Times, contest_rows, cross, full, grid, norm

NOTHING: dict[str, list[Measurement]] = {}
Model = Callable[[SelectionContext], Times]


class LandscapeDevice:
    """A device that measures any point of a landscape with a known optimum, each once."""

    spec: DeviceSpec = DEVICE

    def __init__(self, times: Model) -> None:
        self._times = times

    def rows(self, context: SelectionContext) -> list[Measurement]:
        return contest_rows(context, self._times(context), noise=0.002)

    current = RecordedDevice.current
    expect = RecordedDevice.expect
    is_compiling = RecordedDevice.is_compiling

    def recalled(self, rows: Sequence[Measurement]) -> Contest | None:
        return contest_of_rows(rows)

    searches = None

    def contests(self, context: SelectionContext, held: Held = MappingProxyType({})) -> tuple[Contest, ...]:
        return RecordedDevice(self.rows(context)).contests(context)

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        return tuple(self.rows(contest.context)), ContestOutcome((), "")

    def again(self, contest: Contest) -> Contest | None:
        return None


def agenda(device: LandscapeDevice, lines: Sequence[WorkloadLine], *, refine: bool = False) -> Agenda:
    offered = {line.context: device.contests(line.context) for line in lines}
    return Agenda(device, lines, offered, NOTHING, refine=refine)


def followed(device: LandscapeDevice, found: Agenda, within_s: float = math.inf) -> Iterator[Planned]:
    """All that the agenda plans, each told what it gave."""
    while (planned := found.next(within_s)) is not None:
        yield planned
        rows, _ = device.measure(planned.contest)
        found.learn(planned, rows)


def crossing(context: SelectionContext) -> Times:
    """A rival that overtakes the default at 20 rows."""
    return {"torch.rms_norm": 1e6, "synthetic.lean": 1e6 * beyond(20, context.rows)}


def flat(context: SelectionContext) -> Times:
    default = "torch.sdpa" if context.rows is None else "torch.rms_norm"
    return {default: 1e6, "synthetic.fused" if context.rows is None else "synthetic.lean": 5e5}


def points_of_several_keys() -> st.SearchStrategy[list[SelectionContext]]:
    size = st.integers(1, 600)
    norms = st.builds(norm, size, st.sampled_from((512, 1024, 4096)))
    fulls = st.builds(full, st.integers(1, 64), size)
    crosses = st.builds(cross, st.integers(1, 64), st.integers(1, 64), st.integers(65, 4000))
    return st.lists(norms | fulls | crosses, min_size=1, max_size=25, unique=True)


@settings(max_examples=40, deadline=None)
@given(points_of_several_keys())
def test_every_point_is_measured_once_and_the_order_is_a_function_of_the_input(points: list[SelectionContext]) -> None:
    device = LandscapeDevice(flat)
    lines = [WorkloadLine(context) for context in points]
    order = [planned.contest.context for planned in followed(device, agenda(device, lines))]
    assert sorted(map(repr, order)) == sorted(map(repr, points))
    assert order == [planned.contest.context for planned in followed(device, agenda(device, lines))]


@settings(max_examples=40, deadline=None)
@given(points_of_several_keys())
def test_each_key_reaches_its_bounds_before_anything_else_and_all_keys_begin_first(
    points: list[SelectionContext],
) -> None:
    device = LandscapeDevice(flat)
    lines = [WorkloadLine(context) for context in points]
    order = [cell_of(planned.contest.context) for planned in followed(device, agenda(device, lines))]
    keys = {key for key, _ in order}
    assert {key for key, _ in order[: len(keys)]} == keys
    for key in keys:
        cells = [sizes for one, sizes in order if one == key]
        bounds = [(min(axis), max(axis)) for axis in zip(*cells, strict=True)]
        reached = next(
            count
            for count in range(1, len(cells) + 1)
            if [(min(axis), max(axis)) for axis in zip(*cells[:count], strict=True)] == bounds
        )
        # Each contest reaches a bound that none has reached, one side of an axis or the largest product.
        assert reached <= 2 * len(bounds) + 1


@settings(max_examples=40, deadline=None)
@given(points_of_several_keys(), st.integers(1, 4))
def test_what_is_likely_to_come_is_none_of_what_is_measured_and_of_other_keys_while_these_have_not_begun(
    points: list[SelectionContext], count: int
) -> None:
    device = LandscapeDevice(flat)
    found = agenda(device, [WorkloadLine(context) for context in points])
    keys, begun, left = {cell_of(point)[0] for point in points}, set(), len(points)
    while (planned := found.next()) is not None:
        coming = [other.contest.context for other in found.coming(count)]
        left -= 1
        assert len(coming) == len(set(coming)) == min(count, left)
        assert planned.contest.context not in coming
        begun.add(cell_of(planned.contest.context)[0])
        fresh = keys - begun
        assert {cell_of(context)[0] for context in coming[: len(fresh)]} <= fresh or not fresh
        rows, _ = device.measure(planned.contest)
        found.learn(planned, rows)


@settings(max_examples=20, deadline=None)
@given(points_of_several_keys())
def test_what_is_in_flight_is_planned_once(points: list[SelectionContext]) -> None:
    device = LandscapeDevice(flat)
    found = agenda(device, [WorkloadLine(context) for context in points])
    flights: list[Planned] = []
    while (planned := found.next()) is not None and len(flights) <= len(points):
        found.begin(planned)
        flights.append(planned)
    assert sorted(repr(planned.contest.context) for planned in flights) == sorted(map(repr, points))
    for planned in reversed(flights):
        found.learn(planned, device.measure(planned.contest)[0])
    assert found.next() is None
    assert found.left == 0


def test_contests_that_begin_together_reach_different_bounds() -> None:
    points = grid(norm, (1, 16, 256, 4096), (512, 1024, 4096))
    found = agenda(LandscapeDevice(flat), [WorkloadLine(context) for context in points])
    begun = []
    for _ in range(4):
        planned = found.next()
        assert planned is not None
        found.begin(planned)
        begun.append((planned.contest.context.rows, planned.contest.context.hidden_size))
    assert sorted(begun[:2]) == [(1, 512), (4096, 4096)]
    assert {rows for rows, _ in begun[2:]} == {16, 256}  # every bound is about to be reached: what lies between


def test_what_another_run_took_in_flight_comes_back() -> None:
    found = agenda(LandscapeDevice(flat), [WorkloadLine(norm(8))])
    planned = found.next()
    assert planned is not None
    found.begin(planned)
    assert found.next() is None
    found.set_aside(planned)
    assert found.next() is None
    assert found.bring_back() == 1
    again = found.next()
    assert again is not None
    assert again.contest == planned.contest


@settings(max_examples=20, deadline=None)
@given(points_of_several_keys(), st.floats(0.2, 3.0))
def test_what_would_not_end_in_time_is_not_begun(points: list[SelectionContext], within_s: float) -> None:
    device = LandscapeDevice(flat)
    found = agenda(device, [WorkloadLine(context) for context in points])
    for planned in followed(device, found, within_s):
        assert planned.seconds <= within_s
    assert all(planned.seconds > within_s for planned in found.waiting())


def test_a_bound_that_would_take_most_of_the_time_left_does_not_go_first() -> None:
    def times(context: SelectionContext) -> Times:
        nanoseconds = 1e9 * (context.seq_len_q or 0) ** 2 / 4096**2
        return {"torch.sdpa": 1e4 + nanoseconds, "synthetic.fused": 5e3 + nanoseconds / 2}

    device = LandscapeDevice(times)
    lines = [WorkloadLine(full(8, length)) for length in (16, 64, 256, 1024, 4096)]

    def lengths(within_s: float) -> list[int | None]:
        found = agenda(device, lines)
        return [planned.contest.context.seq_len_q for planned in followed(device, found, within_s)]

    assert 4096 in lengths(math.inf)[:2]
    assert 4096 in lengths(50.0)[2:]


def test_after_any_number_of_contests_there_is_a_table_for_all_keys_that_were_begun() -> None:
    points = [*grid(norm, (1, 30, 500), (512, 4096)), *grid(full, (4, 32), (16, 300)), cross(8, 1, 100)]
    device = LandscapeDevice(flat)
    rows: list[Measurement] = []
    for planned in followed(device, agenda(device, [WorkloadLine(context) for context in points])):
        rows += device.rows(planned.contest.context)
        assert len(compile_table(rows, ALL_KERNELS).entries) == len({cell_of(row.context)[0] for row in rows})


def test_between_different_winners_comes_before_what_lies_inside_a_bucket() -> None:
    """The ends say that the default serves few rows and the rival many; where it changes is what is left to know."""
    device = LandscapeDevice(crossing)
    points = [norm(rows) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    order = [
        planned.contest.context.rows
        for planned in followed(device, agenda(device, [WorkloadLine(context) for context in points]))
    ]
    assert {*order[:2]} == {1, 512}
    assert {16, 32} <= {*order[:6]}
    assert {*order[-2:]} <= {1, 2, 4, 128, 256, 512}


@pytest.mark.parametrize(("heavy", "light"), [(100, 10), (10, 100)])
def test_of_two_points_alike_the_one_that_counts_for_more_comes_first(heavy: int, light: int) -> None:
    device = LandscapeDevice(flat)
    lines = [WorkloadLine(norm(rows), 50.0 if rows == heavy else 1.0) for rows in (1, 10, 100, 1000)]
    order = [planned.contest.context.rows for planned in followed(device, agenda(device, lines))]
    assert order[2:] == [heavy, light]


def test_a_run_that_refines_closes_in_on_the_crossing_and_ends() -> None:
    device = LandscapeDevice(crossing)
    lines = [WorkloadLine(norm(rows)) for rows in (1, 1000)]
    found = agenda(device, lines, refine=True)
    added = [planned for planned in followed(device, found) if planned.kind != "point"]
    assert {planned.kind for planned in added} <= {"edge", "probe"}
    assert any(abs(math.log2((planned.contest.context.rows or 1) / 20)) < CLOSEST for planned in added)
    assert len(added) < 25
    assert all(planned.regret >= ENOUGH for planned in added)


def test_a_device_is_asked_once_for_the_contests_at_a_point_that_is_added() -> None:
    class Asked(LandscapeDevice):
        def __init__(self, times: Model) -> None:
            super().__init__(times)
            self.contexts: list[SelectionContext] = []

        def contests(self, context: SelectionContext, held: Held = MappingProxyType({})) -> tuple[Contest, ...]:
            self.contexts.append(context)
            return super().contests(context)

    def rough(context: SelectionContext) -> Times:
        return {"torch.rms_norm": 1e6, "synthetic.lean": 7e5 if (context.rows or 0).bit_length() % 2 else 1.4e6}

    device = Asked(rough)
    lines = [WorkloadLine(norm(rows, width)) for rows in (1, 6, 40, 1000) for width in (256, 4096)]
    planned = list(islice(followed(device, agenda(device, lines, refine=True)), 40))
    assert len(planned) == 40
    assert len(set(device.contexts)) == len(device.contexts)


def test_what_the_workload_asks_for_comes_before_what_is_added_however_heavy_the_points_around_are() -> None:
    def times(context: SelectionContext) -> Times:
        rival, default = (
            ("synthetic.fused", "torch.sdpa") if context.rows is None else ("synthetic.lean", "torch.rms_norm")
        )
        return {default: 1e6, rival: 1e6 * beyond(20, context.rows or context.seq_len_q)}

    device = LandscapeDevice(times)
    heavy = [WorkloadLine(norm(rows), 1e6) for rows in (1, 1000)]
    light = [WorkloadLine(full(4, length), 1.0) for length in (1, 4, 12, 16, 24, 32, 128, 1024)]
    planned = list(followed(device, agenda(device, heavy + light, refine=True)))
    kinds = [found.kind for found in planned]
    first_added = next(number for number, kind in enumerate(kinds) if kind != "point")
    assert len(planned) > len(heavy + light)
    assert first_added > len(heavy) + 2  # more than the bounds of both
    assert all(found.regret < ENOUGH for found in planned[first_added:] if found.kind == "point")


def test_what_is_added_comes_before_points_that_hardly_lower_the_regret() -> None:
    device = LandscapeDevice(crossing)
    lines = [WorkloadLine(norm(rows)) for rows in (1, 970, 980, 990, 1000)]
    planned = list(followed(device, agenda(device, lines, refine=True)))
    kinds = [found.kind for found in planned]
    assert kinds.count("point") == len(lines)
    assert {"edge", "probe"} & {*kinds[:3]}
    assert max(found.regret for found in planned[kinds.index("edge") :] if found.kind == "point") < ENOUGH


def test_beside_compilers_what_they_disturb_waits_until_the_rest_hardly_lowers_the_regret() -> None:
    """Eager contests, for which compilers pause, come after points of graphs and before what is added between these."""
    device = LandscapeDevice(crossing)
    graphs = [WorkloadLine(replace(norm(rows), mode="graph")) for rows in (1, 970, 980, 990, 1000)]
    eager = [WorkloadLine(norm(rows)) for rows in (1, 30, 1000)]
    found = agenda(device, eager + graphs, refine=True)
    order: list[tuple[str, str]] = []
    while (planned := found.next(beside_compilers=True)) is not None and len(order) < 12:
        order.append((planned.contest.context.mode, planned.kind))
        found.begin(planned)
        rows, _ = device.measure(planned.contest)
        found.learn(planned, rows)
    assert order[:5] == [("graph", "point")] * 2 + [("eager", "point")] * 3
    assert {mode for mode, _ in order[5:]} == {"graph"}
    assert {"edge", "probe"} & {kind for _, kind in order[5:]}


def test_beside_compilers_only_graphs_are_measured_where_none_of_them_is_left() -> None:
    found = agenda(LandscapeDevice(crossing), [WorkloadLine(norm(rows)) for rows in (1, 1000)])
    assert found.next(beside_compilers=True) is None
    assert found.next() is not None


def test_what_is_measured_beside_a_demanded_point_shares_its_weight() -> None:
    """However heavy a point is, a run does not stay around it."""
    regret = KeyRegret(operation_named("norm.rms"), (0, 1), {(8, 1024): 6.0, (512, 1024): 1.0})
    assert regret.demanded((16, 1024)) == 6.0
    for rows in (12, 16, 16):
        regret.learn((rows, 1024), LandscapeDevice(flat).rows(norm(rows)))
    assert regret.demanded((10, 1024)) == 2.0
    assert regret.demanded((8, 1024)) == 6.0
    assert regret.demanded((400, 1024)) == 1.0


def test_a_run_that_does_not_refine_keeps_to_the_points_asked_for() -> None:
    device = LandscapeDevice(crossing)
    lines = [WorkloadLine(norm(rows)) for rows in (1, 1000)]
    assert {planned.kind for planned in followed(device, agenda(device, lines))} == {"point"}


@pytest.mark.parametrize("landscape", landscapes(), ids=lambda landscape: landscape.name)
def test_the_regret_that_is_expected_falls_to_nothing_over_a_landscape(landscape: object) -> None:
    shape = next(each for each in landscapes() if each is landscape or each.name == getattr(landscape, "name", ""))
    device = LandscapeDevice(shape.times)
    found = agenda(device, [WorkloadLine(context) for context in shape.points])
    before = found.expected_regret()[0]
    assert len(list(followed(device, found))) == len(shape.points)
    assert found.expected_regret()[0] < 0.3 * before


def test_what_is_held_counts_as_if_the_run_had_measured_it(tmp_path: Path) -> None:
    """A run that goes on does not choose otherwise than one that never stopped."""
    device = LandscapeDevice(crossing)
    lines = [WorkloadLine(context) for context in grid(norm, (1, 4, 16, 64, 256), (512, 2048))]
    whole = [planned.contest.contest_id for planned in followed(device, agenda(device, lines))]
    store = ResultsStore(tmp_path)
    for planned, _ in zip(followed(device, agenda(device, lines)), range(6), strict=False):
        store.append(device.rows(planned.contest.context))
    held: dict[str, list[Measurement]] = {}
    for row in store.read().rows:
        held.setdefault(row.contest_id, []).append(row)
    offered = {line.context: device.contests(line.context) for line in lines}
    continued = Agenda(device, lines, offered, held, refine=False)
    assert [planned.contest.contest_id for planned in followed(device, continued)] == whole[6:]


def test_the_forecast_of_a_run_says_how_far_its_time_goes() -> None:
    device = LandscapeDevice(flat)
    lines = [WorkloadLine(context) for context in grid(norm, (1, 4, 16, 64, 256), (512, 2048))]
    everything = agenda(device, lines).forecast()
    assert len(everything) == len(lines)
    half_s = math.fsum(planned.seconds for planned in everything) / 2
    part = agenda(device, lines).forecast(half_s)
    assert 3 <= len(part) < len(everything)
    assert math.fsum(planned.seconds for planned in part) <= half_s


def test_a_forecast_has_no_contest_twice() -> None:
    """Nor what is added between points, of which nothing comes in that would end it."""
    device = LandscapeDevice(crossing)
    found = agenda(device, [WorkloadLine(norm(rows)) for rows in (1, 1000)], refine=True)
    for _ in range(2):
        planned = found.next()
        assert planned is not None
        found.learn(planned, device.rows(planned.contest.context))
    forecast = found.forecast(1000.0)
    assert {planned.kind for planned in forecast} & {"edge", "probe"}
    assert len({planned.contest.contest_id for planned in forecast}) == len(forecast)

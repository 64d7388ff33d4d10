"""Measuring a table on held-out shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ResultsError
from layerzero_runtime.kernel import Configuration
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table import TableEntry
from layerzero_tune.compile.judge import describe_choice
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.evaluate.score import Score, confirms_slower, has_time, score
from layerzero_tune.identity import canonical_json, choice_of
from layerzero_tune.measure.contest import Candidate, Contest
from layerzero_tune.measure.statistics import holm
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import COMING, LiveDevice

# Each shape is measured once, and once more where its choice looks slow; a contest that is of no use is taken so often.
_REPEATS = 2
_TAKES = 3
_OWN_CHOICE = canonical_json({})


@dataclass(frozen=True)
class Unscored:
    """A held-out shape on which the default or what a table chose has no time, and why."""

    context: SelectionContext
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """What the held-out shapes gave.

    Attributes:
        scores: of the table, in the order of the shapes, without the unscored ones.
        beside: of each other table on the same shapes, by the same contests.
        slower: those of the table's scores that a remeasurement confirmed to be slower than the default.
        measured_from, measured_to: the earliest and the latest contest's time, UTC.
        preparation_s: seconds that loading and compiling kernels took, of contests measured in this call.
    """

    scores: tuple[Score, ...]
    beside: tuple[tuple[Score, ...], ...]
    unscored: tuple[Unscored, ...]
    slower: frozenset[Score]
    measured_from: str
    measured_to: str
    preparation_s: float


def evaluate(
    device: LiveDevice,
    snapshot: Snapshot,
    contexts: Sequence[SelectionContext],
    store: ResultsStore,
    beside: Sequence[Snapshot] = (),
    progress: Callable[[SelectionContext], None] = lambda context: None,
) -> Evaluation:
    """Measure every legal kernel, with the configurations that the table ships, and the public call on each shape, and
    score what the snapshot selects; what the others select meets in the same contests.

    Contests that the store holds already are not measured again: of a table that was mended only those are in which
    another plan serves or other configurations take part.

    Raises:
        ResultsError: the store cannot be written.
    """
    held: dict[str, list[Measurement]] = {}
    if store.contest_ids():
        for row in store.read().rows:
            held.setdefault(row.contest_id, []).append(row)

    used: list[Measurement] = []
    preparation_s = 0.0

    def measured(contest: Contest, chosen: Sequence[str]) -> Sequence[Measurement]:
        """Taken again where the GPU was slowed down, or what is chosen has no time; the last one counts if it always
        is so."""
        for take in range(_TAKES):
            rows = measured_once(replace(contest, repeat=contest.repeat + take * _REPEATS))
            if not rows[0].is_slowed and all(has_time(rows, name) for name in chosen):
                break
        used.extend(rows)
        return rows

    def measured_once(contest: Contest) -> Sequence[Measurement]:
        nonlocal preparation_s
        if contest.contest_id not in held:
            rows, outcome = device.measure(contest)
            store.append(rows)
            held[contest.contest_id] = list(rows)
            preparation_s += outcome.preparation_s
        return held[contest.contest_id]

    shapes = _in_order(_shape(device, context, (snapshot, *beside)) for context in contexts)
    scores: dict[SelectionContext, tuple[Score, ...]] = {}
    unscored = []
    for number, shape in enumerate(shapes, 1):
        device.expect(following.contest for following in shapes[number : number + COMING])
        rows = measured(shape.contest, shape.chosen)
        try:
            pairs = zip(shape.chosen, shape.plans, strict=True)
            scores[shape.context] = tuple(score(rows, name, hit=plan.source == "table") for name, plan in pairs)
        except ResultsError as error:
            unscored.append(Unscored(shape.context, str(error)))
        progress(shape.context)
    of_tables = tuple(zip(*(scores[context] for context in contexts if context in scores), strict=True))
    own = of_tables[0] if of_tables else ()
    contests = {shape.context: shape.contest for shape in shapes}
    suspects = holm([found.slower_p for found in own]) if own else ()
    slower = frozenset(
        found
        for found, is_suspect in zip(own, suspects, strict=True)
        if is_suspect
        and confirms_slower(measured(replace(contests[found.context], repeat=1), [found.chosen]), found.chosen)
    )
    store.compact()
    times = [row.measured_at for row in used]
    measured_from, measured_to = min(times, default=""), max(times, default="")
    # The public calls went through the first table.
    others = tuple(tuple(replace(found, end_to_end=None) for found in table) for table in of_tables[1:])
    return Evaluation(own, others, tuple(unscored), slower, measured_from, measured_to, preparation_s)


@dataclass(frozen=True)
class _Shape:
    """A shape, what each table selects there, by name too, and the contest in which all of it meets."""

    context: SelectionContext
    plans: tuple[ExecutionPlan, ...]
    contest: Contest

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(describe_choice(choice_of(plan.kernel_id, plan.configuration)) for plan in self.plans)


def _in_order(shapes: Iterable[_Shape]) -> tuple[_Shape, ...]:
    """Those of graphs first: beside them kernels compile for what follows, beside eager calls none may."""
    return tuple(sorted(shapes, key=lambda shape: shape.context.mode != "graph"))


def _shape(device: LiveDevice, context: SelectionContext, tables: Sequence[Snapshot]) -> _Shape:
    """All legal kernels and the public call; what is chosen reaches the final rounds whatever the screening says."""
    placed = context.with_device(device.spec)
    plans = tuple(table.select(placed) for table in tables)
    entry = _entry(tables[0], placed)
    shipped = _shipped(entry)
    for plan in plans:  # on a miss it may have the configuration of another static key
        shipped.setdefault(plan.kernel_id, {})[canonical_json(dict(plan.configuration))] = plan.configuration
    chosen = {choice_of(plan.kernel_id, plan.configuration) for plan in plans}
    entered = [
        replace(
            candidate,
            configuration=configuration,
            is_default=candidate.is_default and not configuration,
            is_anchor=choice_of(candidate.kernel_id, configuration) in chosen,
        )
        for candidate in device.candidates(context)
        if candidate.kernel_id != PUBLIC_CALL
        for _, configuration in sorted({_OWN_CHOICE: {}, **shipped.get(candidate.kernel_id, {})}.items())
    ]
    public = Candidate(PUBLIC_CALL, _served_by(plans[0], entry), is_anchor=True)
    return _Shape(context, plans, device.contest(context, [*entered, public]))


def _entry(snapshot: Snapshot, context: SelectionContext) -> TableEntry | None:
    """What the table has for the context's static key."""
    table = None if context.device is None else snapshot.tables.of(context.device)
    return None if table is None else table.find(operation_named(context.operation), context)[0]


def _served_by(plan: ExecutionPlan, entry: TableEntry | None) -> Configuration:
    """What tells public calls of one context apart: the plan, who selects it, and whether each call is asked by guards.
    What looking up costs beside differs between tables by nanoseconds."""
    is_guarded = entry is not None and plan.entry is not None and bool(entry.leaves[plan.entry[1]][0].guards)
    choice = describe_choice(choice_of(plan.kernel_id, plan.configuration))
    return {"source": plan.source, "serves": choice, "guarded": is_guarded}


def _shipped(entry: TableEntry | None) -> dict[str, dict[str, Configuration]]:
    """By kernel and text, the configurations of an entry."""
    found: dict[str, dict[str, Configuration]] = {}
    for chain in () if entry is None else entry.leaves:
        for step in chain:
            found.setdefault(step.kernel_id, {})[canonical_json(dict(step.configuration))] = step.configuration
    return found

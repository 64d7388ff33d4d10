"""Measuring a table on held-out shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.compile.judge import describe_choice
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.evaluate.score import Score, confirms_slower, has_time, score
from layerzero_tune.identity import canonical_json
from layerzero_tune.measure.contest import Candidate, Contest
from layerzero_tune.measure.statistics import holm
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import COMING, LiveDevice

# Each shape is measured once, and once more where its choice looks slow; a contest that is of no use is taken so often.
_REPEATS = 2
_TAKES = 3


@dataclass(frozen=True)
class Evaluation:
    """What the held-out shapes gave.

    Attributes:
        slower: those scores that a remeasurement confirmed to be slower than the default.
        measured_to: the latest contest's time, UTC.
        preparation_s: seconds that loading and compiling kernels took, of contests measured in this call.
    """

    scores: tuple[Score, ...]
    slower: frozenset[Score]
    measured_to: str
    preparation_s: float


def evaluate(
    device: LiveDevice,
    snapshot: Snapshot,
    contexts: Sequence[SelectionContext],
    store: ResultsStore,
    table_id: str,
    progress: Callable[[SelectionContext], None] = lambda context: None,
) -> Evaluation:
    """Measure every legal kernel, with the configurations that the table ships, and the public call on each shape, and
    score what the snapshot selects.

    Contests that the store holds already are not measured again. `table_id` is a hash of the table's content: the
    public call through another table is another job.

    Raises:
        ResultsError: the store cannot be written, or a choice could not be timed.
    """
    held: dict[str, list[Measurement]] = {}
    if store.contest_ids():
        for row in store.read().rows:
            held.setdefault(row.contest_id, []).append(row)

    used: list[Measurement] = []
    preparation_s = 0.0

    def measured(contest: Contest, chosen: str) -> Sequence[Measurement]:
        """Taken again where the GPU was slowed down, or what is chosen has no time; the last one counts if it always
        is so."""
        for take in range(_TAKES):
            rows = measured_once(replace(contest, repeat=contest.repeat + take * _REPEATS))
            if not rows[0].is_slowed and has_time(rows, chosen):
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

    placed = [context.with_device(device.spec) for context in contexts]
    plans = [snapshot.select(context) for context in placed]
    contests = [
        _contest(device, context, plan, _shipped(snapshot, there), table_id)
        for context, there, plan in zip(contexts, placed, plans, strict=True)
    ]
    scores: list[Score] = []
    for number, (context, plan, contest) in enumerate(zip(contexts, plans, contests, strict=True), 1):
        device.expect(contests[number : number + COMING])
        chosen = describe_choice((plan.kernel_id, canonical_json(dict(plan.configuration))))
        scores.append(score(measured(contest, chosen), chosen, hit=plan.source == "table"))
        progress(context)
    suspects = holm([found.slower_p for found in scores]) if scores else ()
    slower = frozenset(
        found
        for found, contest, is_suspect in zip(scores, contests, suspects, strict=True)
        if is_suspect and confirms_slower(measured(replace(contest, repeat=1), found.chosen), found.chosen)
    )
    store.compact()
    return Evaluation(tuple(scores), slower, max((row.measured_at for row in used), default=""), preparation_s)


def _contest(
    device: LiveDevice,
    context: SelectionContext,
    plan: ExecutionPlan,
    shipped: Mapping[str, Sequence[Configuration]],
    table_id: str,
) -> Contest:
    """All legal kernels and the public call; the choice reaches the final rounds whatever the screening says."""
    kernels = [
        replace(candidate, configuration=configuration, is_default=candidate.is_default and not configuration)
        for candidate in device.candidates(context)
        if candidate.kernel_id != PUBLIC_CALL
        for configuration in ({}, *shipped.get(candidate.kernel_id, ()))
    ]
    chosen = plan.kernel_id, plan.configuration
    entered = [replace(found, is_anchor=(found.kernel_id, found.configuration) == chosen) for found in kernels]
    return device.contest(context, [*entered, Candidate(PUBLIC_CALL, {"table": table_id}, is_anchor=True)])


def _shipped(snapshot: Snapshot, context: SelectionContext) -> dict[str, list[Configuration]]:
    """By kernel, the configurations beside its own choice that the table has for the context's static key."""
    operation = operation_named(context.operation)
    table = None if context.device is None else snapshot.tables.of(context.device)
    entry = None if table is None else table.entries.get(operation.name, {}).get(operation.static_key(context))
    found: dict[str, dict[str, Configuration]] = {}
    for chain in () if entry is None else entry.leaves:
        for step in chain:
            if step.configuration:
                found.setdefault(step.kernel_id, {})[canonical_json(dict(step.configuration))] = step.configuration
    return {kernel_id: [texts[text] for text in sorted(texts)] for kernel_id, texts in found.items()}

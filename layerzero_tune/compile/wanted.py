"""The next workload: the fewest shapes whose measurement closes the holes in which a table misses."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import compress

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Sizes
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import Key, cell_of
from layerzero_tune.compile.coverage import unmeasured_cells, with_tied
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.form import Entry
from layerzero_tune.compile.pipeline import Compilation
from layerzero_tune.compile.regret import VOUCHED, Place, RegretModel, place_of, vouching
from layerzero_tune.compile.witnesses import witnesses
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.workload.lines import WorkloadLine


def wanted_lines(
    compilation: Compilation, rows: Sequence[Measurement], workload: Sequence[WorkloadLine] = ()
) -> tuple[WorkloadLine, ...]:
    """Shapes to measure inside the measured ranges, those with the most to gain first: the regret that the model
    expects of the best choice there, times the weight.

    With a workload, a shape's weight is that of the lines that miss nearest to it, and shapes without any are left out;
    without one, all weigh 1. Sizes at which `rows` hold failures alone are not asked for again.
    """
    tried: dict[Key, set[Sizes]] = {}
    for row in rows:
        key, sizes = cell_of(row.context)
        tried.setdefault(key, set()).add(sizes)
    asked: dict[Key, list[tuple[Sizes, float]]] = {}
    for line in workload:
        key, sizes = cell_of(line.context)
        asked.setdefault(key, []).append((sizes, line.weight))
    found: list[tuple[float, WorkloadLine]] = []
    for entry in compilation.form.entries:
        key = (entry.operation, entry.static_key)
        model = compilation.models[key]
        shapes = _cover(entry, model, tried[key])
        weights = _weights(entry, tuple(shapes), asked.get(key, ())) if workload else dict.fromkeys(shapes, 1.0)
        for sizes, weight in weights.items():
            regret = model.expected_regret(model.best(sizes), sizes)
            found.append((round(regret * weight, 9), WorkloadLine(shapes[sizes], weight)))
    found.sort(key=lambda item: (-item[0], canonical_json(item[1].context.to_dict())))
    return tuple(line for _, line in found)


def _cover(entry: Entry, model: RegretModel, tried: Collection[Sizes]) -> dict[Sizes, SelectionContext]:
    """Calls that vouch for every hole of the entry, greedily the one that vouching for the most first.

    A new shape brings new grid lines, so holes are looked for again until there are none, or none that can be measured.
    """
    measured = [verdict.sizes for verdict in witnesses(model, entry.bounds)]
    chosen: dict[Sizes, SelectionContext] = {}
    while True:
        holes = {
            hole: place_of(hole, entry.free)
            for hole in unmeasured_cells([*measured, *chosen], entry.free, entry.max_product)
        }
        calls = {call[0]: call[1] for hole in holes for call in _call_near(hole, entry, model.verdicts[0].context)}
        places = {sizes: place_of(sizes, entry.free) for sizes in calls if sizes not in tried and sizes not in chosen}
        before = len(chosen)
        while holes and places:
            at = np.array(list(holes.values()))
            covers = {sizes: list(compress(holes, vouching(at, own))) for sizes, own in places.items()}
            best = max(covers, key=lambda sizes: (len(covers[sizes]), sizes))
            if not covers[best]:
                break
            chosen[best] = calls[best]
            del places[best]
            for hole in covers[best]:
                del holes[hole]
        if len(chosen) == before:
            return chosen


def _call_near(hole: Sizes, entry: Entry, example: SelectionContext) -> list[tuple[Sizes, SelectionContext]]:
    """The sizes of a hole with a call that has them, moved to within the largest product, and one of them by one where
    the operation has no such call (equal lengths make cross attention full attention); empty where there is none."""
    operation = operation_named(entry.operation)
    sizes = _within_product(hole, entry)
    own = [sizes[axis] for axis in entry.free]
    steps = [(place, step) for place in reversed(range(len(own))) for step in (1, -1)]
    for place, step in ((0, 0), *steps):
        moved = with_tied([size + step * (place == at) for at, size in enumerate(own)], sizes, entry.free)
        if not entry.covers(moved):
            continue
        context = operation.with_sizes(example, moved)
        try:
            operation.validate(context)
        except ContextError:
            continue
        if operation.static_key(context) == entry.static_key:
            return [(moved, context)]
    return []


def _within_product(hole: Sizes, entry: Entry) -> Sizes:
    """The hole itself, or where its product is beyond the largest one, sizes just within it that vouch for the hole."""
    product = math.prod(hole[axis] for axis in entry.free)
    if entry.max_product is None or product <= entry.max_product:
        return hole
    room = {axis: math.log(min(VOUCHED, hole[axis] / entry.bounds[axis][0])) for axis in entry.free}
    share = math.log(product / entry.max_product) / math.fsum(room.values())
    shrunk = {axis: math.floor(hole[axis] * math.exp(-share * room[axis]) + 1e-6) for axis in entry.free}
    full: list[int] = []
    for axis in range(len(hole)):
        full.append(shrunk[axis] if axis in shrunk else full[-1])
    return tuple(full)


def _weights(entry: Entry, shapes: Sequence[Sizes], asked: Sequence[tuple[Sizes, float]]) -> Mapping[Sizes, float]:
    """The weight of the calls that miss inside the measured range, each counted at the shape nearest to it."""
    places = {sizes: place_of(sizes, entry.free) for sizes in shapes}
    weights: dict[Sizes, list[float]] = {}
    for sizes, weight in asked:
        if places and entry.covers(sizes) and not leaf_at(entry.tree, sizes).chain:
            place = place_of(sizes, entry.free)
            nearest = min(places, key=lambda shape: (_farthest(places[shape], place), shape))
            weights.setdefault(nearest, []).append(weight)
    return {sizes: math.fsum(found) for sizes, found in weights.items()}


def _farthest(first: Place, second: Place) -> float:
    return round(max(abs(a - b) for a, b in zip(first, second, strict=True)), 9)

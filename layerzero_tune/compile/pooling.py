"""Verdicts that static keys share.

Those of the other 16-bit type on a GPU, which decides nothing beside this one, are a key's own: twice the cells for the
same measurements. Cross-validated over 1,217 contests of an H100 (five folds, one seed; scripts/results/h100_table) the
hit rate is 0.57 instead of 0.37, the efficiency 0.985 instead of 0.975.

Those of keys that differ in a graded feature alone, such as how many query heads share a head of keys, tell of it the
less the further away they are. Serving workloads spread a few cells over many of them: judged by the 308 attention
contests of an evaluation on an H100, the loss of what is expected to be fastest falls from 0.0214 to 0.0114.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes
from layerzero_runtime.operations import operation_named
from layerzero_runtime.twin_types import twin_of
from layerzero_tune.compile.cell import Key, cell_of
from layerzero_tune.compile.judge import Verdict


def pooled(verdicts: Mapping[Key, Sequence[Verdict]], platform: str) -> dict[Key, tuple[Verdict, ...]]:
    """Each key's verdicts and those of its twin at other sizes, in ascending order of sizes.

    Of the twin's only kernels count that have a time under the key itself: no other was checked in its type.
    """
    found = {}
    for key, own in verdicts.items():
        name, static_key = key
        twin = twin_of(static_key, platform)
        others = () if twin is None else verdicts.get((name, twin), ())
        found[key] = tuple(sorted([*own, *_borrowed(own, others)], key=lambda verdict: verdict.sizes))
    return found


def beside(verdicts: Mapping[Key, Sequence[Verdict]], platform: str) -> dict[Key, tuple[Verdict, ...]]:
    """Of each key what those that differ from it in the operation's graded feature alone tell of it."""
    found = neighbours(verdicts, platform)
    return {
        key: told_of(own, [(octaves, verdicts[other]) for octaves, other in found[key]])
        for key, own in verdicts.items()
    }


def told_of(own: Sequence[Verdict], others: Iterable[tuple[float, Sequence[Verdict]]]) -> tuple[Verdict, ...]:
    """The verdicts of other keys, each so many octaves away, on the kernels that have a time under the own one, as of
    calls of that."""
    checked = _kernels_of(own)
    return tuple(
        replace(_as_of(own[0], kept), away=octaves)
        for octaves, verdicts in others
        for verdict in verdicts
        if (kept := _of_kernels(verdict, checked)) is not None
    )


def neighbours(keys: Iterable[Key], platform: str) -> dict[Key, list[tuple[float, Key]]]:
    """Of each key those that differ from it in the operation's graded feature alone, and how far away they are, in
    octaves; of two that share their verdicts the one of its own type."""
    families: dict[Key, dict[float, list[Key]]] = {}
    for key in keys:
        family, value = _family_of(pool_of(key, platform))
        families.setdefault(family, {}).setdefault(value, []).append(key)
    return {
        key: [
            (math.log2(value / own), next((other for other in others if other[1][1] == key[1][1]), others[0]))
            for value, others in members.items()
            if value != own
        ]
        for members in families.values()
        for own, alike in members.items()
        for key in alike
    }


def _family_of(key: Key) -> tuple[Key, float]:
    """What keys share that differ in their operation's graded feature alone, and its value."""
    name, static_key = key
    operation = operation_named(name)
    if operation.graded is None:
        return key, 1.0
    place = len(static_key) - 1 - len(operation.static) + operation.static.index(operation.graded)
    return (name, (*static_key[:place], None, *static_key[place + 1 :])), float(static_key[place])


def pool_of(key: Key, platform: str) -> Key:
    """One key for all that share their verdicts: the first of them."""
    name, static_key = key
    twin = twin_of(static_key, platform)
    return key if twin is None else (name, min(static_key, twin, key=lambda each: str(each[1])))


def pooled_cell(context: SelectionContext, platform: str) -> tuple[Key, Sizes]:
    """The key and the sizes of a call, with one key for all that share their verdicts."""
    key, sizes = cell_of(context)
    return pool_of(key, platform), sizes


def _borrowed(own: Sequence[Verdict], others: Sequence[Verdict]) -> Iterator[Verdict]:
    measured = {verdict.sizes for verdict in own}
    checked = _kernels_of(own)
    for verdict in others:
        if verdict.sizes not in measured and (kept := _of_kernels(verdict, checked)) is not None:
            yield _as_of(own[0], kept)


def _as_of(own: Verdict, verdict: Verdict) -> Verdict:
    """The verdict as one on a call of the own key."""
    operation = operation_named(own.context.operation)
    return replace(verdict, context=operation.with_sizes(own.context, verdict.sizes))


def _kernels_of(verdicts: Sequence[Verdict]) -> frozenset[str]:
    return frozenset(kernel_id for verdict in verdicts for kernel_id, _ in verdict.standings)


def _of_kernels(verdict: Verdict, checked: Collection[str]) -> Verdict | None:
    """The verdict on these kernels alone; None where it hangs on another one."""
    needed = {verdict.reference, verdict.best, *verdict.tied, *verdict.acceptable}
    if not all(kernel_id in checked for kernel_id, _ in needed):
        return None
    standings = {choice: standing for choice, standing in verdict.standings.items() if choice[0] in checked}
    return replace(verdict, standings=standings)

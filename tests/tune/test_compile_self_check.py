"""The self-check finds what was changed in a module of hundreds of buckets, and says where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import TableError
from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.emit import emit, leaf_at
from layerzero_tune.compile.feature import span
from layerzero_tune.compile.form import Entry, Leaf, Split, Step, TableForm, Tree
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.self_check import check_emitted
from tests.tune.synthetic_results import Times, compiled, cross, full, grid, measured, norm

Change = Callable[[Tree], Tree]


def model(context: SelectionContext) -> Times:
    """Bests that change with every doubling, some of them with guards or bounds."""
    names: tuple[str, ...]
    if context.rows is not None:
        names = ("torch.rms_norm", "synthetic.lean", "synthetic.even", "synthetic.wide", "synthetic.dense")
        place = context.rows.bit_length() // 2 + (context.hidden_size or 0).bit_length()
    else:
        names = ("torch.sdpa", "synthetic.fused", "synthetic.bounded", "synthetic.small_scores")
        place = (context.seq_len_k or 0).bit_length() // 2 + (context.num_heads or 0).bit_length()
    best = names[place % len(names)]
    return {name: 500.0 if name == best else 1000.0 + 100.0 * number for number, name in enumerate(names)}


@cache
def form() -> TableForm:
    norms = grid(norm, (1, 8, 64, 512), (512, 1024, 2048))
    fulls = grid(full, (2, 8, 32), (32, 128, 512))
    crosses = grid(cross, (2, 8, 32), (1, 32), (64, 256, 1024))
    return compiled(measured([*norms, *fulls, *crosses], model))


def entry_indices() -> st.SearchStrategy[int]:
    return st.integers(0, len(form().entries) - 1)


def trees(tree: Tree) -> Iterator[Tree]:
    yield tree
    if isinstance(tree, Split):
        yield from trees(tree.low)
        yield from trees(tree.high)


def decisions(tree: Tree) -> object:
    """What a tree answers, apart from its boxes and evidence."""
    if isinstance(tree, Leaf):
        return tree.chain
    return (tree.feature, tree.edge, decisions(tree.low), decisions(tree.high))


def with_change(tree: Tree, target: Tree, change: Change) -> Tree:
    """The tree with one node, told by identity, changed."""
    if tree is target:
        return change(tree)
    if isinstance(tree, Split):
        low, high = (with_change(side, target, change) for side in (tree.low, tree.high))
        return replace(tree, low=low, high=high)
    return tree


def with_entry(index: int, entry: Entry) -> TableForm:
    entries = list(form().entries)
    entries[index] = entry
    return replace(form(), entries=tuple(entries))


def with_node(index: int, target: Tree, change: Change) -> TableForm:
    entry = form().entries[index]
    return with_entry(index, replace(entry, tree=with_change(entry.tree, target, change)))


def answer(entry: Entry, sizes: Sizes) -> tuple[Step, ...]:
    inside = all(entry.bounds[axis][0] <= sizes[axis] <= entry.bounds[axis][1] for axis in entry.free)
    return leaf_at(entry.tree, sizes).chain if inside else ()


def assert_named(changed: TableForm) -> None:
    """The check names an entry and sizes at which the module says otherwise than was meant."""
    module = emit(changed).module
    assume(module != emit(form()).module)
    with TemporaryDirectory() as folder:
        path = replace(emit(form()), module=module).write(Path(folder))
        with pytest.raises(TableError, match="expected") as raised:
            check_emitted(form(), path)
    found = re.search(r": (\S+) (\(.*?\)) at \(([\d, ]+)\) gives ", str(raised.value))
    assert found, raised.value
    sizes = tuple(int(size) for size in found[3].split(",") if size.strip())
    (named,) = (i for i, e in enumerate(form().entries) if (e.operation, str(e.static_key)) == (found[1], found[2]))
    assert answer(form().entries[named], sizes) != answer(changed.entries[named], sizes)


@cache
def choices() -> tuple[Choice, ...]:
    return tuple(sorted({s.choice for e in form().entries for leaf in e.leaves() for s in leaf.chain}))


def leaves(index: int) -> Sequence[Leaf]:
    return [leaf for leaf in form().entries[index].leaves() if leaf.chain]


def test_the_table_has_something_to_change() -> None:
    entries = form().entries
    assert sum(len(entry.leaves()) for entry in entries) > 30
    assert any(step.guards for entry in entries for leaf in entry.leaves() for step in leaf.chain)
    assert len(choices()) >= 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_winner_is_named(data: st.DataObject) -> None:
    index = data.draw(entry_indices())
    leaf = data.draw(st.sampled_from(leaves(index)))
    step = data.draw(st.integers(0, len(leaf.chain) - 1))
    other = data.draw(st.sampled_from([choice for choice in choices() if choice != leaf.chain[step].choice]))
    chain = list(leaf.chain)
    chain[step] = replace(chain[step], choice=other)
    assert_named(with_node(index, leaf, lambda node: replace(leaf, chain=tuple(chain))))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_moved_edge_is_named(data: st.DataObject) -> None:
    index = data.draw(entry_indices())
    split = data.draw(st.sampled_from([node for node in trees(form().entries[index].tree) if isinstance(node, Split)]))
    assume(decisions(split.low) != decisions(split.high))  # between equal sides no edge can be wrong
    low, high = span(split.feature, dict(enumerate(form().entries[index].bounds)))
    edge = data.draw(st.integers(low, high - 1).filter(lambda edge: edge != split.edge))
    assert_named(with_node(index, split, lambda node: replace(split, edge=edge)))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_dropped_guard_is_named(data: st.DataObject) -> None:
    guarded = [
        (index, leaf, step)
        for index in range(len(form().entries))
        for leaf in leaves(index)
        for step in range(len(leaf.chain))
        if leaf.chain[step].guards
    ]
    index, leaf, step = data.draw(st.sampled_from(guarded))
    guards = list(leaf.chain[step].guards)
    guards.pop(data.draw(st.integers(0, len(guards) - 1)))
    chain = list(leaf.chain)
    chain[step] = replace(chain[step], guards=tuple(guards))
    assert_named(with_node(index, leaf, lambda node: replace(leaf, chain=tuple(chain))))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_two_swapped_plans_are_named(data: st.DataObject) -> None:
    one, other = data.draw(st.lists(st.sampled_from(choices()), min_size=2, max_size=2, unique=True))
    lines = [f"    ({kernel_id!r}, {{}}),\n" for kernel_id, _ in (one, other)]
    swapped = {lines[0]: lines[1], lines[1]: lines[0]}
    module = re.sub("|".join(map(re.escape, lines)), lambda match: swapped[match[0]], emit(form()).module)
    assert module != emit(form()).module
    with TemporaryDirectory() as folder:
        path = replace(emit(form()), module=module).write(Path(folder))
        with pytest.raises(TableError, match=r": (attention|norm)\.\w+ \(.*\) at \(.*\) gives .*, expected "):
            check_emitted(form(), path)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_widened_range_is_named(data: st.DataObject) -> None:
    index = data.draw(entry_indices())
    entry = form().entries[index]
    axis = data.draw(st.sampled_from(entry.free))
    low, high = entry.bounds[axis]
    step = data.draw(st.integers(1, 100_000))
    wider = data.draw(st.sampled_from([(max(low - step, 0), high), (low, high + step)]))
    bounds = list(entry.bounds)
    bounds[axis] = wider
    assert_named(with_entry(index, replace(entry, bounds=tuple(bounds))))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_leaf_that_misses_or_hits_wrongly_is_named(data: st.DataObject) -> None:
    index = data.draw(entry_indices())
    leaf = data.draw(st.sampled_from(form().entries[index].leaves()))
    chain = () if leaf.chain else (Step(choices()[0]),)
    assert_named(with_node(index, leaf, lambda node: replace(leaf, chain=chain)))

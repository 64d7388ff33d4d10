"""The parts of a tree along one axis, and a tree of least depth over such parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layerzero_tune.compile.form import Split, Tree


def parts_along(tree: Tree, axis: int, edge: int | None = None) -> Iterator[tuple[int | None, Tree]]:
    """The subtrees that splits on this axis separate, from low sizes to high ones, each with the edge before it."""
    if isinstance(tree, Split) and tree.axis == axis:
        yield from parts_along(tree.low, axis, edge)
        yield from parts_along(tree.high, axis, tree.edge)
    else:
        yield edge, tree


def balanced(axis: int, edges: Sequence[int], parts: Sequence[Tree]) -> Tree:
    """A tree of least depth over the parts; there is one edge between each two."""
    if not edges:
        return parts[0]
    middle = len(edges) // 2
    low = balanced(axis, edges[:middle], parts[: middle + 1])
    return Split(axis, edges[middle], low, balanced(axis, edges[middle + 1 :], parts[middle + 1 :]))

"""The parts of a tree in one direction, and a tree of least depth over such parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layerzero_tune.compile.form import Split, Tree
from layerzero_tune.compile.region import Axes


def parts_along(tree: Tree, axes: Axes, edge: int | None = None) -> Iterator[tuple[int | None, Tree]]:
    """The subtrees that splits over these axes separate, from low sizes to high ones, each with the edge before it."""
    if isinstance(tree, Split) and tree.axes == axes:
        yield from parts_along(tree.low, axes, edge)
        yield from parts_along(tree.high, axes, tree.edge)
    else:
        yield edge, tree


def balanced(axes: Axes, edges: Sequence[int], parts: Sequence[Tree]) -> Tree:
    """A tree of least depth over the parts; there is one edge between each two."""
    if not edges:
        return parts[0]
    middle = len(edges) // 2
    low = balanced(axes, edges[:middle], parts[: middle + 1])
    return Split(axes, edges[middle], low, balanced(axes, edges[middle + 1 :], parts[middle + 1 :]))

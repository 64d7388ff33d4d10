"""Looking at trees."""

from __future__ import annotations

from layerzero_tune.compile.form import Leaf, Tree
from layerzero_tune.compile.region import Axes


def edges(tree: Tree) -> list[tuple[Axes, int]]:
    """(axes, edge) of every split, in ascending order of what they separate."""
    if isinstance(tree, Leaf):
        return []
    return [*edges(tree.low), (tree.axes, tree.edge), *edges(tree.high)]

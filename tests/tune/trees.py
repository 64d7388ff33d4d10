"""Looking at trees."""

from __future__ import annotations

from layerzero_tune.compile.feature import Feature
from layerzero_tune.compile.form import Leaf, Tree


def edges(tree: Tree) -> list[tuple[Feature, int]]:
    """(feature, edge) of every split, in ascending order of what they separate."""
    if isinstance(tree, Leaf):
        return []
    return [*edges(tree.low), (tree.feature, tree.edge), *edges(tree.high)]

"""The parts of a tree in one direction, those that are alike made one, and a tree of least depth over such parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from layerzero_tune.compile.feature import Feature
from layerzero_tune.compile.form import Leaf, Split, Tree
from layerzero_tune.compile.region import Region


def merged(tree: Split, region: Region, joined: Callable[[Leaf, Leaf, Region], Leaf | None]) -> Tree:
    """The tree over a region in which neighbours in its direction are one leaf, where `joined` gives one for both and
    their region."""
    found = list(parts_along(tree, tree.feature))
    ends = [edge for edge, _ in found[1:]] + [None]
    starts: list[int | None] = []
    parts: list[Tree] = []
    for (start, part), end in zip(found, ends, strict=True):
        before = parts[-1] if parts else None
        if isinstance(before, Leaf) and isinstance(part, Leaf):
            one = joined(before, part, region.within(tree.feature, starts[-1], end))
            if one is not None:
                parts[-1] = one
                continue
        starts.append(start)
        parts.append(part)
    return balanced(tree.feature, [start for start in starts if start is not None], parts)


def parts_along(tree: Tree, feature: Feature, edge: int | None = None) -> Iterator[tuple[int | None, Tree]]:
    """The subtrees that splits by this feature separate, from low ones to high ones, each with the edge before it."""
    if isinstance(tree, Split) and tree.feature == feature:
        yield from parts_along(tree.low, feature, edge)
        yield from parts_along(tree.high, feature, tree.edge)
    else:
        yield edge, tree


def balanced(feature: Feature, edges: Sequence[int], parts: Sequence[Tree]) -> Tree:
    """A tree of least depth over the parts; there is one edge between each two."""
    if not edges:
        return parts[0]
    middle = len(edges) // 2
    low = balanced(feature, edges[:middle], parts[: middle + 1])
    return Split(feature, edges[middle], low, balanced(feature, edges[middle + 1 :], parts[middle + 1 :]))

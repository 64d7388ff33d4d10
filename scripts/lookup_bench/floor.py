"""What Python itself takes: the least that any way of dispatch can cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from benchmarking.timing import Loop, fresh_ints, lru_hit

from lookup_bench.row import Row, within
from lookup_bench.stopwatch import Stopwatch

YARDSTICK = "lru_cache hit, four fresh ints (the yardstick)"
EDGES = tuple(50 + 100 * number for number in range(18))


def rows(stopwatch: Stopwatch) -> Iterator[Row]:
    quadruples, sizes = fresh_ints(2000, 4), [size for (size,) in fresh_ints(2000, 1)]
    by_tuple = {each: each[0] for each in quadruples}
    by_key = {f"key {number}": (EDGES, tuple(range(len(EDGES) + 1))) for number in range(40)}
    keyed = [(f"key {size % 40}", size) for size in sizes]

    def nothing() -> None:
        pass

    def find(key: str, size: int) -> int:
        edges, plans = by_key[key]
        return plans[bisect_left(edges, size)]

    names = {
        "nothing": nothing,
        "quadruples": quadruples,
        "by_tuple": by_tuple,
        "find": find,
        "keyed": keyed,
        "sizes": sizes,
        "bisect_left": bisect_left,
        "edges": EDGES,
        "plans": tuple(range(len(EDGES) + 1)),
    }
    for name, statement in (
        ("empty loop over four ints", "for a, b, c, d in quadruples: pass"),
        ("empty call", "for size in sizes: nothing()"),
        ("dict read, tuple key built", "for a, b, c, d in quadruples: by_tuple[a, b, c, d]"),
        ("bisect_left on 18 edges and index", "for size in sizes: plans[bisect_left(edges, size)]"),
        ("dict of static keys and one bisect, in a function", "for key, size in keyed: find(key, size)"),
    ):
        found = stopwatch.timed(Loop(statement, names, 2000))
        yield within(found, name, "floor", note="with the loop that makes the calls")
    yield within(stopwatch.timed(lru_hit()), YARDSTICK, "floor", note="against itself, with the loop over four ints")

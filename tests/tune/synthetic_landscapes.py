"""Times with a known optimum over the points of a real preset: crossings on one to three axes and on products of them,
limits, multiples, ties.

A rival's share of the default's time falls by `SLOPE` per octave beyond a crossing, as the share of a kernel with a
higher cost per call and a lower one per element does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.workload.presets import preset_workload
from tests.tune.synthetic_kernels import KERNELS
from tests.tune.synthetic_results import DEVICE, cross, full, norm

# Log ratio per octave; the asked precision of edges begins at 0.3.
SLOPE = 0.35
_BY_ID = {kernel.kernel_id: kernel for kernel in KERNELS}

Shares = Callable[[SelectionContext], dict[str, float]]


@dataclass(frozen=True)
class Landscape:
    """What kernels take over one static key.

    Attributes:
        make: a call with these sizes on the free axes.
        points: the preset's points.
        shares: time of each rival over the default's, whether or not its limits allow the call.
    """

    name: str
    make: Callable[..., SelectionContext]
    points: Sequence[SelectionContext]
    shares: Shares

    def times(self, context: SelectionContext) -> dict[str, float]:
        """Times in ns of the default and of the rivals that are legal for the call."""
        described = context.with_device(DEVICE)
        legal = {
            name: 1e6 * share
            for name, share in self.shares(context).items()
            if not rejections(_BY_ID[name].spec.limits, described)
        }
        return {operation_named(context.operation).default_kernel: 1e6} | legal

    def dense(self, steps: int) -> list[SelectionContext]:
        """Calls on a lattice of so many sizes per axis over the measured range, which avoids the measured ones where it
        can, as far as the measured products reach."""
        operation = operation_named(self.points[0].operation)
        free = [operation.axes.index(axis) for axis in operation.axes_of(self.points[0])]
        measured = [operation.sizes(point) for point in self.points]
        largest = max(math.prod(sizes[axis] for axis in free) for sizes in measured)
        lines = [_spread(sorted({sizes[axis] for sizes in measured}), steps) for axis in free]
        found = (sizes for sizes in product(*lines) if math.prod(sizes) <= largest)
        return [self.make(*sizes) for sizes in found if self._is_of_key(sizes)]

    def _is_of_key(self, sizes: Sequence[int]) -> bool:
        return self.make is not cross or sizes[1] != sizes[2]


def _spread(line: Sequence[int], steps: int) -> list[int]:
    low, high = line[0], line[-1]
    return sorted({round(low * (high / low) ** ((step + 0.5) / steps)) for step in range(steps)})


def preset_points(like: SelectionContext) -> list[SelectionContext]:
    """The points of the standard preset with the static key of this one: 30 to 70."""
    key = operation_named(like.operation).static_key(like)
    return [context for found, context in _standard_points() if found == (like.operation, key)]


@cache
def _standard_points() -> tuple[tuple[tuple[str, StaticKey], SelectionContext], ...]:
    """The points of the standard preset with what a table tells them apart by before their sizes."""
    found = (line.context for line in preset_workload("standard", tuple(OPERATIONS)))
    return tuple(((c.operation, operation_named(c.operation).static_key(c)), c) for c in found)


def beyond(crossing: float, size: int | None, slope: float = SLOPE) -> float:
    """A rival's share of the default's time, 1 at the crossing."""
    assert size is not None
    return math.exp(-slope * math.log2(size / crossing))


def landscapes(shift: float = 1.0) -> list[Landscape]:
    """`shift` moves the crossings against the measured sizes."""

    def one_axis(context: SelectionContext) -> dict[str, float]:
        """`lean` overtakes the default, and `wide` overtakes `lean`; a third ties with the default everywhere."""
        lean = beyond(20 * shift, context.rows)
        return {
            "synthetic.lean": lean,
            "synthetic.wide": lean * beyond(200 * shift, context.rows),
            "synthetic.dense": 1.0,
        }

    def limited(context: SelectionContext) -> dict[str, float]:
        """`narrow` wins from some number of rows on, up to its largest width."""
        return {"synthetic.narrow": beyond(20 * shift, context.rows), "synthetic.lean": 1.3}

    def multiples(context: SelectionContext) -> dict[str, float]:
        """`even` wins at its multiples from some number of rows on."""
        return {"synthetic.even": beyond(60 * shift, context.rows), "synthetic.lean": 1.3}

    def along(axis: str, crossing: float) -> Shares:
        """`fused` wins beyond a crossing on one axis, `bounded` ties with it where it is legal."""

        def shares(context: SelectionContext) -> dict[str, float]:
            share = beyond(crossing * shift, getattr(context, axis))
            return {"synthetic.fused": share, "synthetic.bounded": share}

        return shares

    def work(crossing: float, rival: str, *axes: str) -> Shares:
        """`rival` wins beyond a crossing of a product."""
        return lambda context: {rival: beyond(crossing * shift, math.prod(getattr(context, axis) for axis in axes))}

    rows, equal, unequal = (preset_points(like) for like in (norm(1), full(12, 64, 1), cross(12, 1, 64)))
    heads, queries, keys = "batch_kv_heads", "seq_len_q", "seq_len_k"
    even = [context for context in rows if context.hidden_size is not None and context.hidden_size % 128 == 0]
    return [
        Landscape("one axis", norm, rows, one_axis),
        # Beside the preset's a width near the limit, as a tuner that measures between different winners has it.
        Landscape("limits", norm, [*rows, *(norm(count, 1856) for count in (1, 3, 12, 37, 150, 401, 1024))], limited),
        # Without probes at other widths: a bucket around one of them leaves out `even`, whatever is measured beside it.
        Landscape("multiples", norm, even, multiples),
        Landscape("lengths of two axes", full, equal, along(queries, 90)),
        Landscape("heads of two axes", full, equal, along(heads, 15)),
        Landscape("heads of three axes", cross, unequal, along(heads, 15)),
        Landscape("queries of three axes", cross, unequal, along(queries, 6)),
        Landscape("keys of three axes", cross, unequal, along(keys, 200)),
        Landscape("elements of rows", norm, rows, work(60000, "synthetic.lean", "rows", "hidden_size")),
        Landscape("heads x lengths", full, equal, work(3000, "synthetic.fused", heads, queries)),
        Landscape("heads x keys", cross, unequal, work(8000, "synthetic.fused", heads, keys)),
        Landscape("queries x keys", cross, unequal, work(4000, "synthetic.fused", queries, keys)),
        Landscape("heads x queries x keys", cross, unequal, work(100000, "synthetic.fused", heads, queries, keys)),
    ]


def corners(shift: float = 1.0) -> list[Landscape]:
    """Regions that are bounded on several axes at once, where what is measured on one axis bends along another."""

    def two_axes(context: SelectionContext) -> dict[str, float]:
        heads = beyond(15 * shift, context.batch_kv_heads)
        return {"synthetic.fused": max(heads, beyond(90 * shift, context.seq_len_q))}

    def three_axes(context: SelectionContext) -> dict[str, float]:
        lengths = max(beyond(4 * shift, context.seq_len_q), beyond(200 * shift, context.seq_len_k))
        return {"synthetic.fused": max(lengths, beyond(14 * shift, context.batch_kv_heads))}

    return [
        Landscape("corner of two axes", full, preset_points(full(12, 64, 1)), two_axes),
        Landscape("corner of three axes", cross, preset_points(cross(12, 1, 64)), three_axes),
    ]

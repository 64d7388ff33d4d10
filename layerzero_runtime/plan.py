"""`ExecutionPlan`: the answer to a selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from layerzero_runtime.selection.transforms import Transform

Source = Literal["table", "live"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionPlan:
    """Which kernel serves a context, with which configuration, and where the choice comes from.

    Attributes:
        pre_transforms, post_transforms: steps before and behind the kernel, in order (`selection.transforms`).
        source: "table" for a measured entry, "live" for the live selector's choice on a miss.
        cached: the live selector had the answer already.
        available: whether the kernel's libraries are installed here.
        unavailable_reason: what is missing, None if nothing is.
        table: name of the table that was consulted, None if none fits the device.
        entry: (static key, leaf) of a hit.
        miss_reason: why no measured entry answered, None on a hit.
    """

    operation: str
    kernel_id: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    pre_transforms: tuple[Transform, ...] = ()
    post_transforms: tuple[Transform, ...] = ()
    source: Source
    cached: bool = False
    available: bool = True
    unavailable_reason: str | None = None
    table: str | None = None
    entry: tuple[tuple[Any, ...], int] | None = None
    miss_reason: str | None = None

"""Limits of a kernel: one declaration behind the live check, the compile-time proof and the rejection message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerzero_runtime.errors import SpecError

Kind = Literal["at_least", "at_most", "multiple_of", "one_of"]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a limit refuses a context: a stable code, and actual against required."""

    code: str
    field: str
    actual: Any
    required: str

    def __str__(self) -> str:
        return f"{self.code}: {self.field} is {self.actual!r}, required {self.required}"


@dataclass(frozen=True, slots=True)
class Limit:
    """A condition on one attribute of a context.

    `kind` says how `bound` is read: an inclusive minimum or maximum, a divisor, or the tuple of allowed values.
    `None` as an actual value (a feature that the operation does not have) satisfies every bound and divisor; a tuple of
    allowed values must list it.

    Raises:
        SpecError: the kind is unknown, or the bound does not fit it.
    """

    field: str
    kind: Kind
    bound: Any

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SpecError(f"kind of a limit is {self.kind!r}, allowed: {', '.join(get_args(Kind))}")
        if self.kind == "one_of":
            fits = isinstance(self.bound, tuple) and bool(self.bound)
        elif isinstance(self.bound, tuple):
            fits = self.kind != "multiple_of" and bool(self.bound)  # a version, compared part by part
        else:
            fits = isinstance(self.bound, int | float) and (self.kind != "multiple_of" or self.bound >= 1)
        if not fits:
            required = {"one_of": "a tuple with at least one value", "multiple_of": "a number of at least 1"}
            raise SpecError(
                f"bound of {self.field} {self.kind} is {self.bound!r}, required {required.get(self.kind, 'a number')}"
            )

    @property
    def code(self) -> str:
        return f"{self.field.upper()}_NOT_{self.kind.upper()}"

    @property
    def required(self) -> str:
        if self.kind == "at_least":
            return f">= {self.bound}"
        if self.kind == "at_most":
            return f"<= {self.bound}"
        if self.kind == "multiple_of":
            return f"a multiple of {self.bound}"
        if len(self.bound) == 1:
            return repr(self.bound[0])
        return "one of " + ", ".join(repr(value) for value in self.bound)

    def accepts(self, actual: Any) -> bool:
        """Whether the value of the field satisfies this limit."""
        if actual is None and self.kind != "one_of":
            return True
        if self.kind == "at_least":
            return bool(actual >= self.bound)
        if self.kind == "at_most":
            return bool(actual <= self.bound)
        if self.kind == "multiple_of":
            return bool(actual % self.bound == 0)
        return actual in self.bound

    def reject(self, context: object) -> Rejection | None:
        """The rejection of `context`, or None if it satisfies this limit."""
        actual = getattr(context, self.field)
        if self.accepts(actual):
            return None
        return Rejection(self.code, self.field, actual, self.required)


def rejections(limits: Iterable[Limit], context: object) -> tuple[Rejection, ...]:
    """All rejections of a context, in the order in which the limits were declared."""
    found = (limit.reject(context) for limit in limits)
    return tuple(rejection for rejection in found if rejection is not None)

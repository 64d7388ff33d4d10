"""Gates: conditions on a summary that a release has to meet."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

from layerzero_runtime.errors import ContextError
from layerzero_tune.evaluate.summary import Summary

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(r"\s*(\w+)\s*(>=|<=|==|>|<)\s*([-+0-9.eE]+)\s*")
FIGURES = tuple(field.name for field in fields(Summary))


@dataclass(frozen=True)
class Gate:
    """A figure of the summary, a comparison and a number."""

    figure: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """A gate as written on the command line, such as "efficiency_geomean>=0.98".

        Raises:
            ContextError: the text is no comparison, or names a figure that a summary does not have.
        """
        match = _GATE.fullmatch(text)
        if match is None:
            raise ContextError(f"--gate {text!r} is no condition; write for example 'efficiency_geomean>=0.98'")
        figure, comparison, number = match.groups()
        if figure not in FIGURES:
            raise ContextError(f"--gate {text!r} names {figure!r}, allowed: {', '.join(FIGURES)}")
        try:
            return cls(figure, comparison, float(number))
        except ValueError:
            raise ContextError(f"--gate {text!r}: {number!r} is no number") from None

    def failure(self, summary: Summary) -> str | None:
        """What fails, None if the summary meets the condition; a figure without a value fails."""
        value = getattr(summary, self.figure)
        if value is not None and _COMPARISONS[self.comparison](value, self.bound):
            return None
        return f"{self.figure} is {value}, required {self.comparison} {self.bound}"

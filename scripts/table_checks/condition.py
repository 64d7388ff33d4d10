"""A condition, with its figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Condition:
    """What has to hold, in words with its figure, and whether it does."""

    text: str
    holds: bool

    @classmethod
    def at_least(cls, what: str, figure: float, bound: float) -> Self:
        return cls(f"{what} {figure:.4g}, at least {bound:g}", figure >= bound)

    @classmethod
    def at_most(cls, what: str, figure: float, bound: float) -> Self:
        return cls(f"{what} {figure:.4g}, at most {bound:g}", figure <= bound)

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'FAILS '} {self.text}"

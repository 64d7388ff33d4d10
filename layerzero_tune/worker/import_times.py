"""Whether a kernel should wait for a process that has imported its library, or another process should import it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# What a compilation is taken for, in shares of a first one with its import, before another one was seen.
_LATER_SHARE = 0.25


class ImportTimes:
    """How long the first compilation of a library takes in a process, its import included, and how long later ones do.

    What compiles in an instant behind an import of seconds would be imported by every process otherwise, and a contest
    wait for it each time.
    """

    def __init__(self) -> None:
        self._first_s: dict[str, float] = {}
        self._later: dict[str, tuple[int, float]] = {}

    def learn(self, library: str, seconds: float, *, has_imported: bool) -> None:
        """How long a compilation took, and whether the library had been imported before."""
        if not has_imported:
            self._first_s[library] = seconds
            return
        count, total_s = self._later.get(library, (0, 0.0))
        self._later[library] = (count + 1, total_s + seconds)

    def is_worth_waiting(self, library: str, ahead: float) -> bool:
        """Whether so many compilations of the library, one after another, end before an import would. Nothing is known
        before the first has ended: then nobody waits.

        Args:
            ahead: of those that are under way or wait, as many as come to each process that has imported it.
        """
        first_s = self._first_s.get(library)
        if first_s is None:
            return False
        later_s = self.later_s.get(library, _LATER_SHARE * first_s)
        return ahead * later_s < first_s - later_s

    @property
    def later_s(self) -> Mapping[str, float]:
        """By library the mean of the compilations behind the first."""
        return MappingProxyType({library: total_s / count for library, (count, total_s) in self._later.items()})

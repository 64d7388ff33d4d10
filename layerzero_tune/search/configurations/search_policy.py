"""`SearchPolicy`: how much a search of configurations may cost, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchPolicy:
    """What bounds the search of one kernel's configurations at one point.

    Attributes:
        enumerated: so many valid configurations are all measured.
        measurements: of more, at most so many are.
        near_measurements: or so many, where the search begins with the best of a point nearby.
        batch: how many are measured together, in one contest with the kernel's own choice.
        bound_margin: a configuration within this share of the roofline's time ends the search.
        finalists: how many at most enter the point's contest with all other kernels.
        finalist_margin: those have screening times within this share of the best one's, of which the screening is sure
            enough.
        seed: of what the search draws by chance.
    """

    enumerated: int = 200
    measurements: int = 100
    near_measurements: int = 24
    batch: int = 8
    bound_margin: float = 0.05
    finalists: int = 4
    finalist_margin: float = 0.1
    seed: int = 0


DEFAULT_POLICY = SearchPolicy()

"""A real Ray cluster of two nodes on this machine, each with two places per product, and what its nodes measure."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.recorded_device import RecordedDevice

PLACES = 2


@contextmanager
def two_nodes(*slugs: str) -> Iterator[Any]:
    """The cluster (`ray.cluster_utils.Cluster`); its address is in RAY_ADDRESS meanwhile."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    from ray.cluster_utils import Cluster

    node = {"num_cpus": PLACES, "resources": dict.fromkeys(slugs, PLACES), "object_store_memory": 80 * 1024 * 1024}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


class SlowRecording(RecordedDevice):
    """A recorded device whose contests take a while, and leave their process's id behind."""

    def __init__(self, folder: Path, seconds: float, begun: Path) -> None:
        super().__init__(ResultsStore(folder).read().rows)
        self._seconds, self._begun = seconds, begun

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        (self._begun / f"{contest.contest_id}-{os.getpid()}").touch()
        time.sleep(contest_s(contest.contest_id, self._seconds))
        return super().measure(contest)


def contest_s(contest_id: str, seconds: float) -> float:
    """Not in step with the others, so that a node has always something in flight."""
    return seconds * (0.5 + int(contest_id[:2], 16) / 255.0)


def in_flight(begun: Path, seconds: float, processes: Container[int]) -> list[str]:
    """The contests in these processes that still take more than a tenth of a second."""
    found = []
    for path in begun.iterdir():
        contest_id, pid = path.name.split("-")
        left_s = path.stat().st_mtime + contest_s(contest_id, seconds) - time.time()
        if int(pid) in processes and left_s > 0.1:
            found.append(contest_id)
    return found


@dataclass(frozen=True)
class SlowNode:
    """What each node opens."""

    folder: Path
    seconds: float
    begun: Path

    def open(self, stack: ExitStack) -> SlowRecording:
        return SlowRecording(self.folder, self.seconds, self.begun)

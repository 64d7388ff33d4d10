"""A real Ray cluster of two nodes on this machine, each with two places per product, and what its nodes measure."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
        # Not in step with the others: a node that is killed has something in flight.
        time.sleep(self._seconds * (0.5 + int(contest.contest_id[:2], 16) / 255.0))
        return super().measure(contest)


@dataclass(frozen=True)
class SlowNode:
    """What each node opens."""

    folder: Path
    seconds: float
    begun: Path

    def open(self, stack: ExitStack) -> SlowRecording:
        return SlowRecording(self.folder, self.seconds, self.begun)

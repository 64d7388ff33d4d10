"""A Ray cluster as executor: contests on several hosts with one product.

A task is one contest, measured in the same worker process as without Ray, on a node that offers the custom resource
named after the product's slug. What a lost node had in flight is measured again by another one. Ray's API:
docs.ray.io, tried with 2.60.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from layerzero_runtime.device import DeviceSpec, detect_device, forget_devices
from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.registry import Registry
from layerzero_tune.measure.contest import Contest, MeasurementPolicy
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.device import LiveDevice, MeasuringDevice, torch_name
from layerzero_tune.search.executor import Measured, measured_on
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.worker.process import WorkerProcess

# How often a contest is begun anew whose node, or Ray's process there, was lost.
RETRIES = 5
# How long a run waits for a node when the last one has gone.
NODE_WAIT_S = 120.0
_CONNECT_S = 10.0
# Ray swallows what a signal's handler raises while it waits, so the time is watched here.
_LOOK_S = 0.5
_logger = logging.getLogger(__name__)


class Node(Protocol):
    """What each node measures on."""

    def open(self, stack: ExitStack) -> MeasuringDevice:
        """The node's device; what it holds goes with the stack."""


@dataclass(frozen=True)
class LiveNode:
    """The device of a node, which has to be `spec`, with the kernels of these modules beside the built-in ones."""

    spec: DeviceSpec
    modules: tuple[str, ...]

    def open(self, stack: ExitStack) -> LiveDevice:
        forget_devices()
        _as_important_as_others()
        if self.spec.threads is not None:  # Ray sets it to the task's share of the processors
            os.environ["OMP_NUM_THREADS"] = str(self.spec.threads)
        found = detect_device("cpu" if self.spec.platform == "cpu" else "cuda:0")
        if found != self.spec:
            raise LayerZeroError(
                f"node {socket.gethostname()} offers the resource {self.spec.slug}, but its device is "
                f"{found.to_dict()}, not {self.spec.to_dict()}; start Ray there without this resource"
            )
        worker = stack.enter_context(WorkerProcess(self.modules, torch_name(found)))
        return LiveDevice(found, Registry(load_kernels(self.modules).values()), MeasurementPolicy(), worker)


@dataclass(frozen=True)
class RecordedNode:
    """Recorded results in a folder that every node reads."""

    folder: Path

    def open(self, stack: ExitStack) -> RecordedDevice:
        return RecordedDevice(ResultsStore(self.folder).read().rows)


class OnRay(AbstractContextManager["OnRay"]):
    """An executor over the nodes of a running Ray cluster that offer the device's product.

    Args:
        spec: the device; tasks go to nodes with a custom resource of its slug's name.
        node: what is opened on each node.
        address: of the cluster; "auto" is RAY_ADDRESS, or the one that this host belongs to.

    Raises:
        LayerZeroError: Ray is not installed, there is no cluster, or no node offers the product.
    """

    def __init__(self, spec: DeviceSpec, node: Node, address: str = "auto") -> None:
        self._ray = _ray_connected(address, spec.slug)
        self._resource, self._node = spec.slug, node
        self._contests: dict[Any, Contest] = {}
        self._missing_since: float | None = None
        self._task = self._ray.remote(
            num_gpus=int(spec.platform == "cuda"), resources={spec.slug: 1}, max_retries=RETRIES, max_calls=0
        )(_measure_on_node)
        if not self._offered():
            self._ray.shutdown()
            raise LayerZeroError(
                f"no node of the Ray cluster offers the resource {spec.slug}: {_start_text(spec.slug)}"
            )

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()  # ends what this run has in flight

    @property
    def slots(self) -> int:
        return max(1, self._offered())

    def submit(self, contest: Contest) -> None:
        self._contests[self._task.remote(self._node, contest)] = contest

    def finished(self, within_s: float) -> Measured | None:
        deadline = Deadline.after(within_s)
        while (left_s := deadline.left_s()) > 0.0:
            done, _ = self._ray.wait(list(self._contests), timeout=min(_LOOK_S, left_s))
            if done:
                return self._result(done[0])
            self._check_nodes()
        return None

    def _offered(self) -> int:
        """Devices of the product in all nodes that are alive."""
        return int(self._ray.cluster_resources().get(self._resource, 0))

    def _check_nodes(self) -> None:
        if self._offered():
            self._missing_since = None
            return
        if self._missing_since is None:
            self._missing_since = monotonic()
            _logger.warning("no node offers %s any more: waiting %g s for one", self._resource, NODE_WAIT_S)
        elif monotonic() - self._missing_since > NODE_WAIT_S:
            raise LayerZeroError(f"no node offers {self._resource} any more; {_start_text(self._resource)}")

    def _result(self, task: Any) -> Measured:
        contest = self._contests.pop(task)
        try:
            measured: Measured = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LayerZeroError):
                raise error.cause from None
            raise LayerZeroError(f"a node failed at a contest: {error}") from error
        except self._ray.exceptions.RayError as error:
            raise LayerZeroError(
                f"the contest of {contest.context} was lost with its node {RETRIES + 1} times: {error}"
            ) from error
        return measured


def _ray_connected(address: str, slug: str) -> Any:
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise LayerZeroError(
            f"--executor ray: {error}; install it on every host with pip install 'layerzero-dispatch[ray]'"
        ) from error
    try:
        _check_answers(os.environ.get("RAY_ADDRESS") or address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise LayerZeroError(f"--executor ray: no cluster answers ({first}); {_start_text(slug)}") from error
    return ray


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes and then ends the process.

    Raises:
        OSError: nothing listens at the address, where that is a host and a port.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def _start_text(slug: str) -> str:
    return (
        f"""start Ray on each host with ray start --resources '{{"{slug}": 1}}' (the number of its devices) and """
        "--head on the first, --address HEAD:6379 on the others"
    )


def _as_important_as_others() -> None:
    """Undo that Ray lets its processes, and what they start, give way to all others (niceness 15)."""
    if os.nice(0) > 0:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        except PermissionError:
            _logger.warning("other processes go before the measurements: set RAY_worker_niceness=0 for ray start")


@dataclass(frozen=True)
class _Opened:
    """What this process, one of Ray's, measures on until it is given another device."""

    node: Node
    visible: str | None
    device: MeasuringDevice
    stack: ExitStack


_opened: list[_Opened] = []


def _measure_on_node(node: Node, contest: Contest) -> Measured:
    """The body of a task."""
    device = _device_of(node)
    if isinstance(device, LiveDevice) and not device.measures(contest):
        raise LayerZeroError(
            f"node {socket.gethostname()} would measure other kernels or versions than this host; install the same "
            "environment on both"
        )
    return measured_on(device, contest)


def _device_of(node: Node) -> MeasuringDevice:
    """The device that Ray has assigned to this task (of GPUs by CUDA_VISIBLE_DEVICES), with its worker process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _opened and (_opened[0].node, _opened[0].visible) != (node, visible):
        _opened.pop().stack.close()
    if not _opened:
        stack = ExitStack()
        _opened.append(_Opened(node, visible, node.open(stack), stack))
    return _opened[0].device

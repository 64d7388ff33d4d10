"""The process that compiles ahead: `python -m layerzero_tune.worker.compiler_main SOCKET LIFELINE MODULE...`.

It loads kernels, as the worker will, and forgets them: what it leaves are the caches on disk of the libraries that
compile. It sees no GPU (its environment hides them), so that it takes neither memory nor time of the one that is
measured, and runs at the lowest priority.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection

from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.kernel import Kernel
from layerzero_tune.worker.child import die_with_tuner
from layerzero_tune.worker.compile_job import CompileJob
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.worker.library_compilers import described_gpu
from layerzero_tune.worker.protocol import Ready, Refusal
from layerzero_tune.worker.triton_target import compile_for

LOWEST_PRIORITY = 19


def main(arguments: list[str]) -> None:
    socket, lifeline = (int(argument) for argument in arguments[:2])
    for descriptor in (socket, lifeline):
        os.set_inheritable(descriptor, False)
    die_with_tuner(lifeline)
    os.nice(LOWEST_PRIORITY)
    with Connection(socket) as tuner:
        try:
            kernels = load_kernels(arguments[2:])
        except LayerZeroError as error:
            tuner.send(Refusal(error))
            return
        tuner.send(Ready())
        has_target = False
        while True:
            try:
                job = tuner.recv()
            except EOFError:
                return
            if not has_target:
                has_target = _compile_for_device_of(job)
            tuner.send(_fault(job, kernels))


def _compile_for_device_of(job: CompileJob) -> bool:
    device = job.context.device
    if device is not None and device.platform == "cuda" and device.compute_capability is not None:
        # Before the first kernel is loaded: libraries read them when they are imported.
        os.environ.update(described_gpu(device))
        try:
            compile_for(device)
        except ImportError:  # then no kernel of Triton loads either, which is what becomes of its job
            return False
    return True


def _fault(job: CompileJob, kernels: Mapping[str, Kernel]) -> str:
    """Why the kernel did not load, empty if it did. The worker decides what that means: here there is no GPU."""
    try:
        kernels[job.kernel_id].load(job.context, job.configuration)
    except Exception as error:  # noqa: BLE001 - a kernel may raise anything; the worker will see it again
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main(sys.argv[1:])

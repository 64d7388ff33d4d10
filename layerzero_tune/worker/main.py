"""The worker process: `python -m layerzero_tune.worker.main SOCKET BOARD LIFELINE DEVICE MODULE...`.

The first three are descriptors; the device goes by torch's name, and the modules are those of further kernels. Threads
and environment are what torch and the tuner's environment give; freed memory stays with the process. Its standard
output and error are the tuner's scratch file, so that nothing a kernel prints reaches a terminal or a report.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection

from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.kernel import Kernel
from layerzero_tune.measure.contest_run import measure_contest
from layerzero_tune.measure.failures import SpoiledProcessError
from layerzero_tune.measure.kept_memory import allocated_bytes
from layerzero_tune.worker.allocator import kept_limit, limit_memory, retain_memory
from layerzero_tune.worker.child import die_with_tuner
from layerzero_tune.worker.kernels import load_kernels, with_loads_remembered
from layerzero_tune.worker.progress_board import ProgressBoard
from layerzero_tune.worker.protocol import Finished, Loss, Ready, Refusal, Reply, Request


def answer(
    request: Request, kernels: Mapping[str, Kernel], device: str, board: ProgressBoard, allowed_bytes: float
) -> Finished | Loss | Refusal:
    """What comes of a contest; it is the last where more than `allowed_bytes` of memory are left in use after it."""
    try:
        outcome = measure_contest(
            request.contest,
            kernels,
            device=device,
            settled=request.settled,
            progress=board.report,
            tuner=os.getppid(),
        )
        return Finished(outcome, is_last=allocated_bytes() > allowed_bytes)
    except SpoiledProcessError as error:
        return Loss(error.candidate, error.outcome)
    except LayerZeroError as error:
        return Refusal(error)
    except Exception:  # noqa: BLE001 - raised again in the tuner, which can tell the user
        return Refusal(LayerZeroError(f"the worker failed at a contest:\n{traceback.format_exc()}"))


def main(arguments: list[str]) -> None:
    descriptors = [int(argument) for argument in arguments[:3]]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # processes that a kernel starts must not keep them open
    socket, board, lifeline = descriptors
    die_with_tuner(lifeline)
    retain_memory()
    limit_memory()
    with Connection(socket) as tuner:
        try:
            import torch  # now, so that no candidate's time limit pays for it

            kernels = with_loads_remembered(load_kernels(arguments[4:]))
        except LayerZeroError as error:
            tuner.send(Refusal(error))
            return
        device = arguments[3]
        kept_bytes = kept_limit(torch.cuda.device_count() if device.startswith("cuda") else 0)
        _serve(tuner, kernels, device, ProgressBoard(board), kept_bytes)


def _serve(
    tuner: Connection[Reply, Request],
    kernels: Mapping[str, Kernel],
    device: str,
    board: ProgressBoard,
    kept_bytes: int,
) -> None:
    tuner.send(Ready())
    allowed_bytes = allocated_bytes() + kept_bytes
    while True:
        try:
            request = tuner.recv()
        except EOFError:
            return
        reply = answer(request, kernels, device, board, allowed_bytes)
        tuner.send(reply)
        if isinstance(reply, Loss) or (isinstance(reply, Finished) and reply.is_last):
            return


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a GPU gives at most: the bandwidth of a copy, and the operations per second of a bf16 matrix product.

Both are timed as kernels are in graph mode, on random data, in turn; the median of the rounds counts. The bandwidth is
the better one of a copy by the driver, which a graph may leave to a copy engine, and of a kernel that moves as many
bytes: on an H100 the first gave 2.34 TB/s where norms reached 2.97 (2026-11-26).

usage: python scripts/device_ceilings.py [--device cuda:0] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layerzero_tune.measure.bench import Bench
from layerzero_tune.measure.clock import Rotation, take_sample, warm_up

# A copy of 1 GiB is far beyond the last-level cache, a product of 8192^3 far beyond the memory's bound.
COPIED_BYTES = 1 << 30
SIZE = 8192
ROUNDS = 15
ROUND_MS = 50.0


def ceilings(device: str) -> dict[str, Any]:
    """Bytes read and written per second by a copy, and operations per second of a matrix product.

    Raises:
        ContextError: the device has no graphs.
        DeviceError: there is no such device.
    """
    bench = Bench.of(device, "graph")
    source, target = (torch.randn(COPIED_BYTES // 2, device=bench.name, dtype=torch.bfloat16) for _ in range(2))
    left, right = (torch.randn(SIZE, SIZE, device=bench.name, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b, out=product)

    def copy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return b.copy_(a)

    def negate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.neg(a, out=b)

    calls: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], float]] = {
        "driver_copy_bytes_per_s": (copy, (source, target), 2.0 * COPIED_BYTES),
        "kernel_copy_bytes_per_s": (negate, (source, target), 2.0 * COPIED_BYTES),
        "matmul_flops_per_s": (multiply, (left, right), 2.0 * SIZE**3),
    }
    timed = {name: bench.clock.timed(call, Rotation([arguments])) for name, (call, arguments, _) in calls.items()}
    call_ns = {name: warm_up(function, ROUND_MS) for name, function in timed.items()}
    rounds = [
        {name: take_sample(function, call_ns[name], ROUND_MS) for name, function in timed.items()}
        for _ in range(ROUNDS)
    ]
    rates = {name: amount / (median(times[name] for times in rounds) * 1e-9) for name, (*_, amount) in calls.items()}
    rates["copy_bytes_per_s"] = max(rates["driver_copy_bytes_per_s"], rates["kernel_copy_bytes_per_s"])
    return {
        "device": bench.spec.name,
        "torch": torch.__version__,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    } | rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, help="where to write the JSON, beside printing it")
    arguments = parser.parse_args()
    text = json.dumps(ceilings(arguments.device), indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What an eager call of each kernel costs on the host: by our adapter, by the library's public function, by torch's.

Calls are so small, and so many in a row without a synchronisation, that a GPU waits for the host: their time is the
host's. A CPU computes them in that time as well. The three are timed in turns in one process; of each the median of the
rounds counts.

usage: python scripts/host_cost.py [--device auto] [--ops attention,norm] [--kernels 'flash_attn*'] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from host_cost_bench.public import PUBLIC

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version, missing_requirement, unfit_version
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.selection.transforms import apply_transforms
from layerzero_tune.command_line.options import operations_named
from layerzero_tune.measure.inputs import RandomTensors

ROUNDS = 15
# In a row: fewer than the 1,024 launches that a GPU's queue holds, also where a call launches several kernels.
CALLS = 150
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "float64")
# The first that a kernel accepts.
SIZES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "attention.causal": (
        {"seq_len_q": 16, "seq_len_k": 16},
        {"seq_len_q": 4, "seq_len_k": 16, "causal_alignment": "bottom_right"},
    ),
    "attention.full": ({"seq_len_q": 16, "seq_len_k": 16}, {"seq_len_q": 64, "seq_len_k": 64}),
    "attention.cross": ({"seq_len_q": 1, "seq_len_k": 64},),
}
HEADS = {"batch_size": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
ROWS = {"rows": 4, "hidden_size": 256}
MATRIX = {"rows": 32, "in_features": 256, "out_features": 256}


@dataclass(frozen=True)
class Row:
    """Times in ns per call; None of a public function where there is none but torch's."""

    kernel: str
    operation: str
    library: str
    version: str | None
    context: Mapping[str, Any]
    adapter_ns: float
    public_ns: float | None
    torch_ns: float


def small_call(kernel: Kernel, operation: str, device: DeviceSpec) -> SelectionContext | None:
    """A tiny call that the kernel accepts, None if it accepts none of those tried."""
    family = operation.split(".")[0]
    others = {"attention": HEADS, "linear": MATRIX}.get(family, ROWS)
    for quant_format in (None, "int8"):
        for dtype in DTYPES:
            for sizes in SIZES.get(operation, ({},)):
                fields = {"operation": operation, "dtype": dtype, "quant_format": quant_format, "device": device}
                context = SelectionContext(**fields, **others, **sizes)
                if not rejections(kernel.spec.limits, context):
                    return context
    return None


def unavailable(kernel: Kernel, device: DeviceSpec) -> str | None:
    spec = kernel.spec
    if device.platform not in spec.platforms:
        return f"runs on {', '.join(spec.platforms)}"
    return missing_requirement(spec.requires) or unfit_version(spec.library, spec.min_version)


def host_ns(functions: Mapping[str, Callable[..., Any]], arguments: tuple[Any, ...]) -> dict[str, float]:
    """Median over the rounds, per call, of each of the functions, which are timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    gc.collect()
    gc.disable()
    try:
        for turn in range(ROUNDS + 2):
            for name, function in functions.items():
                wait()
                begin = perf_counter_ns()
                for _ in range(CALLS):
                    function(*arguments)
                taken = perf_counter_ns() - begin
                if turn >= 2:
                    times[name].append(taken / CALLS)
        wait()
    finally:
        gc.enable()
    return {name: statistics.median(found) for name, found in times.items()}


def row_of(kernel: Kernel, context: SelectionContext, registry: Registry) -> Row:
    operation = OPERATIONS[context.operation]
    where = "cpu" if context.platform == "cpu" else "cuda"
    arguments = operation.arguments(context, RandomTensors(where, 0).draw(operation, context))
    functions = {"adapter": apply_transforms(kernel.load(context, {}), kernel.spec, context)}
    if kernel.kernel_id in PUBLIC:
        functions["public"] = PUBLIC[kernel.kernel_id](context)
    default = registry.get(operation.default_kernel)
    assert default is not None
    functions["torch"] = default.load(context, {})
    found = host_ns(functions, arguments)
    return Row(
        kernel.kernel_id,
        context.operation,
        kernel.spec.library,
        library_version(kernel.spec.library),
        context.to_dict(),
        found["adapter"],
        found.get("public"),
        found["torch"],
    )


def measured(device: DeviceSpec, operations: tuple[str, ...], pattern: str) -> Iterator[Row | str]:
    """Rows, and lines about kernels that have none."""
    registry = Registry(builtin_kernels())
    for kernel in registry:
        asked = [operation for operation in kernel.spec.operations if operation in operations]
        if not asked or not fnmatch(kernel.kernel_id, pattern):
            continue
        reason = unavailable(kernel, device)
        if reason is not None:
            yield f"{kernel.kernel_id}: {reason}"
            continue
        for operation in asked:
            context = small_call(kernel, operation, device)
            if context is None:
                yield f"{kernel.kernel_id}, {operation}: accepts no call of those tried"
                continue
            if sys.stderr.isatty():
                print(f"\r{kernel.kernel_id} {operation:<40}", end="", file=sys.stderr, flush=True)
            try:
                yield row_of(kernel, context, registry)
            except Exception as error:  # noqa: BLE001 - a library that fails is listed, the others are measured
                yield f"{kernel.kernel_id}, {operation}: {type(error).__name__}: {error}"
    if sys.stderr.isatty():
        print(f"\r{'':<80}\r", end="", file=sys.stderr)


def line(row: Row) -> str:
    public = ("-", "-")
    if row.public_ns is not None:
        public = (f"{row.public_ns:,.0f}", f"{row.public_ns / row.adapter_ns:.2f}x")
    sizes = "x".join(str(value) for value in row.context.values() if type(value) is int)
    cells = (
        row.kernel,
        row.operation,
        f"{row.context['dtype']} {sizes}",
        f"{row.adapter_ns:,.0f}",
        *public,
        f"{row.torch_ns:,.0f}",
        f"{row.torch_ns / row.adapter_ns:.2f}x",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--ops", default="", help="operations or families, such as attention,norm.rms")
    parser.add_argument("--kernels", default="*", help="a glob over kernel ids")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    device = detect_device(arguments.device)
    if device.platform == "cuda":
        torch.cuda.init()
    torch.set_num_threads(1)  # on a CPU, others would have to be woken for each call
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(f"{device.name}, {', '.join(f'{name} {version}' for name, version in versions.items())}, {date}.\n")
    print("| kernel | operation | call | adapter, ns | public, ns | ratio | torch, ns | ratio |")
    print("|---|---|---|--:|--:|--:|--:|--:|", flush=True)
    rows, absent = [], []
    with torch.no_grad():
        for found in measured(device, operations_named(arguments.ops), arguments.kernels):
            if isinstance(found, Row):
                rows.append(found)
                print(line(found), flush=True)  # each as it comes: some libraries compile for a minute
            else:
                absent.append(found)
    print("\n" + "\n".join(absent))
    if arguments.json is not None:
        content = {
            "device": device.to_dict(),
            "versions": versions,
            "date": date,
            "calls": CALLS,
            "rounds": ROUNDS,
            "rows": [asdict(row) for row in rows],
            "absent": absent,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

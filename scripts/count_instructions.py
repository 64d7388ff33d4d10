"""Instructions of the processor per call of each path, counted by callgrind: unlike times, they do not vary.

usage: python scripts/count_instructions.py [--calls N] [--functions N]

Counted is what happens inside `functools.reduce`, which makes the calls; the cost of a call of an empty function is
taken off. Kernels are replaced by functions that give their first arguments back: what is left is dispatch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache, reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarking.in_force import put_in_force, shipped_table, without_kernels

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.operations import operation_named

BASE, YARDSTICK = "empty call", "lru_cache hit"
WARM_UP = 50
# Kernels that the table asks for contiguous tensors: their leaves read strides at every call.
GUARDED = ("torch.inductor.rms_norm", "torch.inductor.swiglu")


def paths() -> dict[str, Callable[[], object]]:
    """The calls by name; the first two are what the others are compared with."""

    @lru_cache(maxsize=1024)
    def cached(a: int, b: int, c: int, d: int) -> int:
        return a

    bfloat16 = torch.bfloat16
    query, key, value = (torch.randn(2, heads, 64, 64, dtype=bfloat16) for heads in (16, 4, 4))
    x, residual, weight = torch.randn(3, 16, 2048).to(bfloat16)
    weight = weight[0].clone()
    full = lz.bind("attention.full", dtype="bfloat16", num_heads=16, num_kv_heads=4, head_dim=64)
    rows = lz.bind("norm.rms", dtype="bfloat16", hidden_size=2048)
    context = lz.SelectionContext.from_tensors("attention.cross", query, key[:, :, :60], value[:, :, :60])
    route = dispatch.current_snapshot().route(operation_named("attention.cross"), context, {})
    key_of_route, routes = (context.operation, context.dtype), {(context.operation, context.dtype): route}

    def ready() -> object:
        found = routes[key_of_route]
        return found.functions[found.decide(8, 64, 60)]

    sizes = [1000, 1001, 1002, 1003]
    return {
        BASE: lambda: None,
        YARDSTICK: lambda: cached(*sizes),
        "lookup, sizes in hand": ready,
        "bound norm.rms": lambda: rows(x, weight),
        "bound attention.full": lambda: full(query, key, value),
        "lz.rms_norm": lambda: lz.rms_norm(x, weight),
        "lz.swiglu": lambda: lz.swiglu(x, residual),
        "lz.attention": lambda: lz.attention(query, key, value, enable_gqa=True),
    }


def run(name: str, calls: int) -> None:
    """What callgrind watches."""
    put_in_force(shipped_table())
    with torch.inference_mode(), without_kernels(GUARDED):
        call = paths()[name]
        for _ in range(WARM_UP):
            call()
        reduce(lambda _, number: call(), range(calls), None)


def counted(name: str, calls: int, functions: int) -> tuple[float, list[str]]:
    """(instructions per call, the functions that took most of them)."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        watch = ["--collect-atstart=no", "--toggle-collect=functools_reduce", f"--callgrind-out-file={out}"]
        child = [sys.executable, __file__, "--path", name, "--calls", str(calls)]
        subprocess.run(["valgrind", "--tool=callgrind", *watch, *child], check=True, capture_output=True)
        text = subprocess.run(["callgrind_annotate", str(out)], check=True, capture_output=True, text=True).stdout
    total = re.search(r"([\d,]+) \(100\.0%\)\s+PROGRAM TOTALS", text)
    if total is None:
        raise RuntimeError("callgrind counted nothing: it needs a Python with symbols (functools_reduce)")
    lines = re.findall(r"^\s*[\d,]+ \(\s*([\d.]+)%\)\s+\S*?:?([^:/\s]+?)(?:'\d+)?(?: \[.*)?$", text, re.MULTILINE)
    most = [f"{function} {share}%" for share, function in lines if function != "TOTALS"]
    return int(total[1].replace(",", "")) / calls, most[:functions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="calls of each path")
    parser.add_argument("--functions", type=int, default=6, help="how many of the dearest functions to name")
    parser.add_argument("--path", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.path is not None:
        run(arguments.path, arguments.calls)
        return
    print("| path | instructions | over an lru_cache hit | where most of them are |\n|---|--:|--:|---|")
    base = yardstick = 0.0
    names = (BASE, YARDSTICK, "lookup, sizes in hand", "bound norm.rms", "bound attention.full")
    for name in (*names, "lz.rms_norm", "lz.swiglu", "lz.attention"):
        whole, most = counted(name, arguments.calls, arguments.functions)
        base = whole if name == BASE else base
        yardstick = whole - base if name == YARDSTICK else yardstick
        ratio = f"{(whole - base) / yardstick:.1f}x" if yardstick else "-"
        print(f"| {name} | {whole - base:,.0f} | {ratio} | {', '.join(most)} |", flush=True)


if __name__ == "__main__":
    main()

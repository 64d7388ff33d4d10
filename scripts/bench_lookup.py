"""Dispatch, measured: what looking a kernel up adds to its call, as ratios to an `lru_cache` hit of the same run.

usage: python scripts/bench_lookup.py [--quick] [--repeats N] [--json FILE]

FlashInfer and Triton are measured where they are installed; neither needs a GPU for that:
pip install triton apache-tvm-ffi nvidia-ml-py requests tqdm && pip install --no-deps flashinfer-python
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarking.in_force import put_in_force, shipped_table, without_kernels
from lookup_bench import floor, loading, lookups, overheads, peers, tail
from lookup_bench.answered import answered, guarded_kernels
from lookup_bench.report import full_table
from lookup_bench.row import Row
from lookup_bench.stopwatch import QUICK, Effort, Stopwatch

from layerzero_runtime.device import detect_device
from layerzero_runtime.tables.table import Table

ROOT = Path(__file__).parent.parent


def measured(stopwatch: Stopwatch, table: Table) -> Iterator[Row]:
    put_in_force(table)
    yield from floor.rows(stopwatch)
    calls = {name: answered(table, name) for name in overheads.OPERATIONS}
    # Left out are kernels that are served only after a check of the call; those have rows of their own.
    with without_kernels(guarded_kernels(table)):
        yield from lookups.rows(stopwatch, calls)
        yield from overheads.bound_rows(stopwatch, calls)
        yield from overheads.public_rows(stopwatch, calls)
        yield from tail.tail_rows(calls, stopwatch.effort)
        yield tail.memory_row(calls, stopwatch.effort.hits)
    with without_kernels():
        checked = {name: answered(table, name, guarded=True) for name in overheads.GUARDED_OPERATIONS}
        yield from overheads.guarded_rows(stopwatch, checked)
    yield from loading.rows(processes=stopwatch.effort.processes)
    yield from peers.rows(stopwatch)


def results(rows: Sequence[Row], stopwatch: Stopwatch, table: Table) -> dict[str, Any]:
    """What `--json` writes."""
    yardsticks = stopwatch.yardsticks
    return {
        "device": detect_device("cpu").to_dict(),
        "processors": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": peers.installed("triton"),
            "flashinfer": peers.installed("flashinfer-python"),
        },
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **_commit(),
        "table": table.name,
        "effort": asdict(stopwatch.effort),
        "yardstick_ns": {"median": statistics.median(yardsticks), "low": min(yardsticks), "high": max(yardsticks)},
        "rows": [asdict(row) for row in rows],
    }


def _commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differ from it; nulls outside a checkout."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only to see that everything runs")
    parser.add_argument("--repeats", type=int, metavar="N", help="of every measurement (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    logging.getLogger("layerzero").setLevel(logging.ERROR)
    effort = QUICK if arguments.quick else Effort()
    if arguments.repeats is not None:
        if arguments.repeats < 1:
            parser.error(f"--repeats is {arguments.repeats}, required at least 1")
        effort = replace(effort, repeats=arguments.repeats)
    stopwatch, table = Stopwatch(effort), shipped_table()
    rows = []
    for row in measured(stopwatch, table):
        rows.append(row)
        print(f"\r{len(rows)} measured ", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 20 + "\r", end="", file=sys.stderr)
    found = results(rows, stopwatch, table)
    yardstick = found["yardstick_ns"]
    print(
        f"{found['device']['name']}, {found['processors']} processors, Python {found['versions']['python']}, torch "
        f"{found['versions']['torch']}. 1.00x is an lru_cache hit with four fresh ints: {yardstick['median']:.0f} ns "
        f"({yardstick['low']:.0f} to {yardstick['high']:.0f}).\n\n{full_table(rows)}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Selection, measured: a row for every performance scenario, with the ratio to a plain `lru_cache` hit of the same run.

usage: python scripts/bench_selection.py [--full] [--sustained SECONDS] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarking.timing import lru_hit_ns
from selection_bench import latency, load, memory
from selection_bench.measuring import Row, table_hit

from layerzero_runtime.device import detect_device

TITLES = Path(__file__).parent.parent / "tests" / "scenarios" / "scenarios.json"
# A virtual machine without a GPU, or one whose GPU this script does not load: it times the host side of selection.
NO_GPU = "cannot be measured here: no GPU; tested with described devices"
NOT_TIMED = "not timed: this script loads no GPU; tested with described devices"
GPU_SCENARIOS = {
    "PS-019": "graceful degradation",
    "PS-020": "> 80% of the bandwidth",
    "PS-021": "> 70% of the multiprocessors",
    "PS-022": "equal work on 8 GPUs",
}


def measured(full: bool, seconds: float) -> Iterator[Row]:
    hit = table_hit()
    for found in (latency.rows(hit), load.rows(hit, seconds), memory.rows(hit, full)):
        for row in found:
            print(f"\r{row.scenario} measured ", end="", file=sys.stderr, flush=True)
            yield row
    print("\r" + " " * 20 + "\r", end="", file=sys.stderr)
    for scenario, asked in GPU_SCENARIOS.items():
        yield Row(scenario, asked, NOT_TIMED if torch.cuda.is_available() else NO_GPU, met=None)


def line(row: Row, title: str, yardstick: float) -> str:
    ratio = "-" if row.ns is None else f"{row.ns / yardstick:,.1f}x"
    met = {True: "yes", False: "NO", None: "-"}[row.met]
    return f"| {row.scenario} {title} | {row.asked} | {row.measured} | {ratio} | {met} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="write the million rows of results (minutes)")
    parser.add_argument("--sustained", type=float, default=10.0, metavar="SECONDS", help="length of the sustained run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    logging.getLogger("layerzero").setLevel(logging.ERROR)  # described devices miss on purpose
    titles = json.loads(TITLES.read_text(encoding="utf-8"))
    before = lru_hit_ns()
    rows = sorted(measured(arguments.full, arguments.sustained), key=lambda row: row.scenario)
    after = lru_hit_ns()
    yardstick = (before + after) / 2
    missing = [name for name in titles if name.startswith("PS") and name not in {row.scenario for row in rows}]
    assert not missing, f"no row for {', '.join(missing)}"
    device = detect_device("cpu")
    machine = (
        f"{device.name}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"{machine}; an lru_cache hit takes {before:.0f} ns before and {after:.0f} ns after.\n")
    print("| scenario | asked | measured | ratio to an lru_cache hit | met |\n|---|---|---|--:|---|")
    for row in rows:
        print(line(row, titles[row.scenario], yardstick))
    if arguments.json is not None:
        content = {
            "machine": machine,
            "lru_hit_ns": [before, after],
            "rows": [
                asdict(row) | {"title": titles[row.scenario], "ratio": None if row.ns is None else row.ns / yardstick}
                for row in rows
            ],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

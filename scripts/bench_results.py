"""A million result rows of 16 rounds each: what they take on disk, and what compiling them takes.

usage: python scripts/bench_results.py [--rows N] [--results DIR]

The rows are those of `synthetic_tuning`. With --results they are kept there, and those that are there are used.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import synthetic_tuning

from layerzero_tune.results.store import ResultsStore

ROWS = 1_000_000
MAX_BYTES, MAX_SECONDS, MAX_PEAK = 100e6, 60.0, 2e9


def report(results: Path) -> bool:
    """Print the figures; whether all are as asked."""
    size = sum(path.stat().st_size for path in results.glob("*.parquet"))
    module = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with TemporaryDirectory() as tables:
        command = ["compile", str(results), "--out", tables, "--kernels", "synthetic_tuning", "--json"]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", "from layerzero_tune.command_line.main import main; main()", *command],
            check=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": module},
        )
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * 1024  # getrusage(2) on Linux: in KiB, of the largest child
    compiled = json.loads(done.stdout)
    found = (
        ("store", f"{size / 1e6:.0f} MB", "< 100 MB", size < MAX_BYTES),
        ("compile", f"{seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of CPU)", "< 60 s", seconds < MAX_SECONDS),
        ("peak memory of compile", f"{peak / 1e9:.2f} GB", "< 2 GB", peak < MAX_PEAK),
    )
    rows, entries, buckets = compiled["provenance"]["measurements"], compiled["entries"], compiled["buckets"]
    print(f"{rows:,} rows give {entries} static keys and {buckets:,} buckets, {compiled['probes']:,} probes.\n")
    print("| | measured | asked | met |\n|---|--:|--:|---|")
    for name, measured, asked, met in found:
        print(f"| {name} | {measured} | {asked} | {'yes' if met else 'NO'} |")
    return all(met for *_, met in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the rows there, or use those that are there")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        results = arguments.results or Path(temporary, "results")
        if not results.exists():
            synthetic_tuning.write(ResultsStore(results), arguments.rows)
        sys.exit(not report(results))


if __name__ == "__main__":
    main()

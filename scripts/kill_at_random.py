"""Kill a run at random instants (kill -9 of the tuner, of its worker, of both) and continue it, until nothing is left.

usage: python scripts/kill_at_random.py [--seeds 50] [--first-seed 0]

Each seed gives an instant between the start of the command and its usual end, and what is killed then. The same
command continues in the same folder under the next seed; a folder that is complete is compared with that of a run which
nothing disturbed, and the next seed begins another. Exits with status 1 where a stored contest was lost, one was
measured twice, or the jobs done or their statuses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from layerzero_tune.results.leases import LEASES
from layerzero_tune.results.store import ResultsStore

TARGETS = ("tuner", "worker", "both")
WORKLOAD = """\
{"operation": "norm.rms", "dtype": "float32", "rows": 2, "hidden_size": 256}
{"operation": "norm.rms", "dtype": "float32", "rows": 32, "hidden_size": 256}
{"operation": "mlp.swiglu", "dtype": "float32", "rows": 2, "hidden_size": 512}
{"operation": "mlp.swiglu", "dtype": "float32", "rows": 32, "hidden_size": 512}
"""
# Compiling would take longer than all the rest.
ENVIRONMENT = {**os.environ, "CXX": "no-such-compiler"}
COMMAND = (str(Path(sys.executable).with_name("layerzero-tune")), "run", "--device", "cpu", "--json")


@dataclass(frozen=True)
class Strike:
    """What a seed does: which process is killed, so many seconds after the start."""

    target: str
    after_s: float


def strike_of(seed: int, duration_s: float) -> Strike:
    chance = random.Random(seed)
    return Strike(chance.choice(TARGETS), chance.uniform(0.0, duration_s))


def start(folder: Path, workload: Path) -> subprocess.Popen[str]:
    arguments = (*COMMAND, "--workload", str(workload), "--out", str(folder))
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hit(process: subprocess.Popen[str], strike: Strike) -> None:
    """Kill what the strike names, if it is there then."""
    end = time.monotonic() + strike.after_s
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    if strike.target != "tuner":
        for worker in _children(process.pid):
            _kill(worker)
    if strike.target != "worker":
        process.kill()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended by itself just now
        return


def jobs_of(folder: Path) -> dict[str, set[str]]:
    """The statuses of each job."""
    found: dict[str, set[str]] = {}
    for row in ResultsStore(folder).read().rows:
        found.setdefault(row.job_id, set()).add(row.status)
    return found


def faults(folder: Path, held: frozenset[str], status: int, output: str, errors: str) -> list[str]:
    """What is wrong after a run that began with the contests `held`."""
    found = []
    contests = ResultsStore(folder).contest_ids()
    if lost := held - contests:
        found.append(f"lost the stored contests {', '.join(sorted(lost))}")
    if status == 0:
        measured, new = json.loads(output)["contests_measured"], len(contests - held)
        if measured != new:
            found.append(f"measured {measured} contests where {new} were missing")
        if (folder / LEASES).exists():
            found.append("left leases behind")
    elif status != -signal.SIGKILL:
        found.append(f"ended with status {status}: {errors.strip()[-300:]}")
    return found


def differences(jobs: dict[str, set[str]], undisturbed: dict[str, set[str]]) -> list[str]:
    """How the jobs done differ from those of the run that nothing disturbed."""
    missing, more = undisturbed.keys() - jobs.keys(), jobs.keys() - undisturbed.keys()
    other = [job for job in jobs.keys() & undisturbed.keys() if jobs[job] != undisturbed[job]]
    return [
        f"{len(which)} jobs {what}"
        for which, what in ((missing, "are missing"), (more, "are new"), (other, "have another status"))
        if which
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="number of instants")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return _strike_all(Path(scratch), range(options.first_seed, options.first_seed + options.seeds))


def _strike_all(scratch: Path, seeds: range) -> int:
    workload = scratch / "workload.jsonl"
    workload.write_text(WORKLOAD)
    began = time.monotonic()
    first = start(scratch / "undisturbed", workload)
    output, errors = first.communicate()
    duration_s = time.monotonic() - began
    wrong = faults(scratch / "undisturbed", frozenset(), first.returncode, output, errors)
    undisturbed = jobs_of(scratch / "undisturbed")
    print(f"undisturbed: {len(undisturbed)} jobs in {duration_s:.1f} s", *wrong, sep="; ", flush=True)

    hits: Counter[str] = Counter()
    folders = 0
    strikes: list[tuple[str, Strike | None]] = [(f"seed {seed}", strike_of(seed, duration_s)) for seed in seeds]
    for name, strike in (*strikes, ("final rerun", None)):
        folder = scratch / f"results-{folders}"
        held = ResultsStore(folder).contest_ids()
        process = start(folder, workload)
        if strike is not None:
            name += f", {strike.target} after {strike.after_s:.2f} s"
            hit(process, strike)
            hits[strike.target] += 1
        output, errors = process.communicate()
        found = faults(folder, held, process.returncode, output, errors)
        if process.returncode == 0:
            found += differences(jobs_of(folder), undisturbed)
            folders += 1
        print(f"{name}: {len(ResultsStore(folder).contest_ids())} contests stored", *found, sep="; ", flush=True)
        wrong += [f"{name}: {fault}" for fault in found]
    killed = ", ".join(f"{target} {hits[target]}" for target in TARGETS)
    print(f"{len(seeds)} instants ({killed}), {folders} complete folders, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a process pays before its first call: the import, a table of thousands of buckets, the first selection.

Each figure is the median of fresh processes, over a copy of the runtime whose modules are compiled as after an
installation.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarking.in_force import shipped_table

import layerzero_runtime
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.tables.table import MISS, Table
from layerzero_tune.compile.emit import emit
from lookup_bench.big_table import big_table
from lookup_bench.row import Row

KEYS, LEAVES = 60, 100
OPERATION = "attention.full"

# Programs stop the time between `begin()` and `end()`.
_CLOCKS = """
import sys
from time import perf_counter_ns, process_time_ns

def begin():
    global begun
    begun = perf_counter_ns(), process_time_ns()

def end():
    print(perf_counter_ns() - begun[0], process_time_ns() - begun[1])
"""
_IMPORT = """
begin()
import layerzero_runtime
end()
"""
# What loads a table is there before it; the module itself, which Python finds, reads and runs, is what is timed.
_LOAD = """
from importlib import import_module
from layerzero_runtime.tables.table import load_table
begin()
table = load_table(import_module("big_table"))
end()
assert "torch" not in sys.modules
"""
_SELECT = """
begin()
import layerzero_runtime as lz
plan = lz.select(lz.SelectionContext(**{context!r}))
end()
assert plan.source == {source!r}, plan
"""
_DEVICE = """
import json
from layerzero_runtime.device import detect_device
print(json.dumps(detect_device("cpu").to_dict()))
"""


def rows(processes: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        installed = Path(folder)
        measured, missed = _install(installed)
        yield _row("import layerzero_runtime", 20e6, _times(installed, _IMPORT, processes))
        name = f"loading a table of {KEYS * LEAVES:,} buckets"
        yield _row(name, 1.5e6, _times(installed, _LOAD, processes), "its module from a warm .pyc, without torch")
        hit = _SELECT.format(context=measured, source="table")
        miss = _SELECT.format(context=missed, source="live")
        parts = "import, device detection, the table found, the answer"
        yield _row("first select, a hit", 10e6, _times(installed, hit, processes), parts)
        yield _row("first select, a miss", 10e6, _times(installed, miss, processes), f"{parts} of the live selector")
        after_torch = _times(installed, f"import torch\n{hit}", processes)
        yield _row("first select, a hit, torch imported before", 10e6, after_torch, parts)


def _row(name: str, most_ns: float, times: list[tuple[int, int]], note: str = "") -> Row:
    wall, own = zip(*times, strict=True)
    median = float(statistics.median(wall))
    processes = f"median of {len(times)} fresh processes, {statistics.median(own) / 1e6:.2f} ms of their own time"
    how = "; ".join(filter(None, (note, processes)))
    met = median < most_ns
    return Row(name, f"< {most_ns / 1e6:g} ms", median, None, float(min(wall)), float(max(wall)), how, met, "loading")


def _times(installed: Path, code: str, processes: int) -> list[tuple[int, int]]:
    """(time, the processor's time) of one process each, in nanoseconds; one before them warms the file system."""
    found = []
    for _ in range(processes + 1):
        wall, own = _run(installed, _CLOCKS + code).split()
        found.append((int(wall), int(own)))
    return found[1:]


def _run(installed: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "LAYERZERO_TABLES"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _install(installed: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The runtime, the big table, and the shipped table as if it had been measured on this machine, all compiled; gives
    the fields of a context that the shipped table answers, and of one that it does not."""
    shutil.copytree(
        Path(layerzero_runtime.__file__).parent,
        installed / "layerzero_runtime",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shipped = shipped_table()
    tables = installed / "layerzero_tables"
    tables.mkdir()
    (tables / "__init__.py").write_text("")
    # torch may use another number of threads than a process without it has cores: another device, to a table.
    for before in ("", "import torch\n"):
        device = DeviceSpec.from_dict(json.loads(_run(installed, before + _DEVICE)))
        _stand_in(Path(str(shipped.path)).parent, tables / device.slug, device)
    big = emit(big_table(device, KEYS, LEAVES))
    (installed / "big_table.py").write_text(big.module, encoding="utf-8")
    compileall.compile_dir(installed, quiet=1)
    context = _measured(shipped)
    return context, context | {"dtype": "float16"}


def _stand_in(shipped: Path, folder: Path, device: DeviceSpec) -> None:
    if folder.exists():
        return
    folder.mkdir()
    source = (shipped / "__init__.py").read_text(encoding="utf-8")
    source, replaced = re.subn(r"(?m)^DEVICE = .*$", lambda _: f"DEVICE = {device.to_dict()!r}", source)
    assert replaced == 1
    (folder / "__init__.py").write_text(source, encoding="utf-8")
    shutil.copy(shipped / "evidence.json", folder)


def _measured(shipped: Table) -> dict[str, Any]:
    """The fields of a context that the table answers."""
    for key, entry in shipped.entries[OPERATION].items():
        mode, dtype, head_dim, group, unusual = key
        for batch, length in ((2**i, 2**j) for i in range(8) for j in range(4, 12)):
            if mode == "eager" and not unusual and entry.decide(batch, length) != MISS:
                heads = {"num_heads": group, "num_kv_heads": 1, "head_dim": head_dim}
                return {"operation": OPERATION, "dtype": dtype, "batch_size": batch, "seq_len_q": length, **heads}
    raise LookupError(f"{shipped.name} answers no call of {OPERATION}")

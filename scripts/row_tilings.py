"""How our Triton norms should cut up rows where no table says: times tilings over widths on a GPU, and prints for each
width of a block the tiling that is best over all norms, few rows and many.

usage: python scripts/row_tilings.py --out FILE.jsonl [--device cuda:0] [--write]
What the file has is not timed again. With --write it puts the best into `ROW_TILINGS` of
layerzero_runtime/kernels/triton_rows.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernel import Configuration
from layerzero_runtime.kernels.triton_norm import KERNELS
from layerzero_runtime.kernels.triton_rows import ROW_SPACE
from layerzero_runtime.operations import operation_named
from layerzero_tune.identity import canonical_json
from layerzero_tune.measure.bench import Bench
from layerzero_tune.measure.clock import Rotation, take_sample, warm_up
from layerzero_tune.measure.inputs import RandomTensors
from layerzero_tune.search.configurations.valid import valid_configurations

WIDTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 12288, 16384)
FEW_ROWS = 64
MANY_BYTES = 64 << 20
PROGRAMS = (0, 2)
STAGES = (1,)
WARM_UP_MS, SAMPLE_MS = 1.0, 4.0
# Argument sets that outgrow the last-level cache where a call is long enough to matter.
SETS = 3
# Narrower rows take this block too.
LEAST_BLOCK = 128
SOURCE = Path(__file__).parent.parent / "layerzero_runtime" / "kernels" / "triton_rows.py"


@dataclass(frozen=True)
class Trial:
    """A norm at one shape, and its tilings by the width of their block."""

    context: SelectionContext
    configurations: tuple[Configuration, ...]


def trials(device: DeviceSpec) -> Iterator[Trial]:
    for kernel in KERNELS:
        (operation,) = kernel.spec.operations
        for width in WIDTHS:
            for rows in (FEW_ROWS, MANY_BYTES // (2 * width)):
                context = SelectionContext(
                    operation=operation, dtype="bfloat16", mode="graph", rows=rows, hidden_size=width
                ).with_device(device)
                yield Trial(context, tuple(_tilings(context)))


def _tilings(context: SelectionContext) -> Iterator[Configuration]:
    """Those whose block holds a row whole."""
    assert context.hidden_size is not None
    block = max(LEAST_BLOCK, 1 << (context.hidden_size - 1).bit_length())
    for configuration in valid_configurations(ROW_SPACE, context).values():
        is_tried = configuration["programs_per_multiprocessor"] in PROGRAMS and configuration["num_stages"] in STAGES
        if configuration["block_width"] == block and is_tried:
            yield configuration


def load(context: SelectionContext, configuration: Configuration) -> Any:
    """Compiles, or takes what another process has compiled."""
    (kernel,) = (kernel for kernel in KERNELS if context.operation in kernel.spec.operations)
    return kernel.load(context, configuration)


def compile_all(found: Sequence[Trial]) -> None:
    """Once each; how many programs run does not change their code."""
    forms = {
        (trial.context.operation, canonical_json(dict(configuration) | {"programs_per_multiprocessor": 0})): (
            trial.context,
            configuration,
        )
        for trial in found
        for configuration in trial.configurations
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for done in [pool.submit(_compile, *form) for form in forms.values()]:
            done.result()


def _compile(context: SelectionContext, configuration: Configuration) -> None:
    """`load` for another process: functions do not travel between processes."""
    load(context, configuration)


def times(bench: Bench, trial: Trial) -> dict[str, float]:
    """ns of a call by tiling."""
    operation = operation_named(trial.context.operation)
    source = RandomTensors(bench.name, 0)
    drawn = [source.draw(operation, trial.context) for _ in range(SETS)]
    rotation = Rotation([operation.arguments(trial.context, tensors) for tensors in drawn])
    found = {}
    for configuration in trial.configurations:
        bench.give_back_memory()  # what the last graph's results lay in
        timed = bench.clock.timed(load(trial.context, configuration), rotation)
        found[canonical_json(dict(configuration))] = take_sample(timed, warm_up(timed, WARM_UP_MS), SAMPLE_MS)
    return found


def place_of(trial: Trial) -> dict[str, Any]:
    """What a line of the file is of."""
    context = trial.context
    return {"operation": context.operation, "rows": context.rows, "width": context.hidden_size}


def best_of_block(measured: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str, float, float]]:
    """By block: the tiling with the least mean loss against the best of each shape, that mean, and the worst of it."""
    losses: dict[int, dict[str, list[float]]] = {}
    for line in measured:
        best = min(line["ns"].values())
        for text, ns in line["ns"].items():
            losses.setdefault(json.loads(text)["block_width"], {}).setdefault(text, []).append(math.log(ns / best))
    for block, by_tiling in sorted(losses.items()):
        # Some tilings are of use for many rows alone.
        most = max(map(len, by_tiling.values()))
        complete = {text: values for text, values in by_tiling.items() if len(values) == most}
        text = min(complete, key=lambda text: sum(complete[text]))
        yield block, text, math.exp(sum(complete[text]) / most), math.exp(max(complete[text]))


def with_tilings(source: str, tilings: Sequence[Configuration]) -> str:
    """The module's source with these as its `ROW_TILINGS`.

    Raises:
        ValueError: the source has no such constant.
    """
    written = "".join(f"    {_tiling(tiling)},\n" for tiling in tilings)
    found, times = re.subn(r"^ROW_TILINGS = \(\n.*?^\)\n", f"ROW_TILINGS = (\n{written})\n", source, flags=re.M | re.S)
    if times != 1:
        raise ValueError(f"{SOURCE} has {times} tuples ROW_TILINGS, required 1")
    return found


def _tiling(configuration: Configuration) -> str:
    """The call that makes it, without what is usual."""
    usual = {"num_stages": 1, "programs_per_multiprocessor": 0}
    given = {name: value for name, value in configuration.items() if usual.get(name) != value}
    return f"Tiling({', '.join(f'{name}={value}' for name, value in given.items())})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, required=True, help="file of all times, a line for each norm and shape")
    parser.add_argument("--write", action="store_true", help="put the best into the source")
    arguments = parser.parse_args()
    bench = Bench.of(arguments.device, "graph")
    facts = {"device": bench.spec.name, "torch": torch.__version__}
    arguments.out.touch()
    measured = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]
    left = [
        trial
        for trial in trials(detect_device(arguments.device))
        if not any(line.items() >= (place_of(trial) | facts).items() for line in measured)
    ]
    compile_all(left)
    with torch.inference_mode(), bench.current(), arguments.out.open("a", encoding="utf-8") as file:
        for trial in left:
            ns = times(bench, trial)
            at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            measured.append(facts | {"measured_at": at} | place_of(trial) | {"ns": ns})
            file.write(json.dumps(measured[-1]) + "\n")
            file.flush()
    best = list(best_of_block(measured))
    for block, text, mean, worst in best:
        print(f"{block:6} {text}: {mean:.3f} of the best's time, {worst:.3f} at worst")
    if arguments.write:
        tilings = [json.loads(text) for _, text, *_ in best]
        SOURCE.write_text(with_tilings(SOURCE.read_text(encoding="utf-8"), tilings), encoding="utf-8")


if __name__ == "__main__":
    main()

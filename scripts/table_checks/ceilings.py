"""Kernels beside what the device gives at most: a copy's bandwidth, and the operations of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.kernels.triton_device import ITEM_BYTES
from layerzero_runtime.operations import operation_named
from layerzero_tune.command_line.output import shape_text
from layerzero_tune.compile.judge import describe_choice
from layerzero_tune.compile.pipeline import current_rows
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.work import call_elements
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from table_checks.condition import Condition

OWN = "triton."
OWN_SHARE = 0.9


def ceiling_conditions(ceilings: Mapping[str, Any], results: Path) -> Iterator[Condition]:
    """Of each shape the winner's share of its ceiling, and that of the best of our own kernels where memory is it.

    `ceilings` is what scripts/device_ceilings.py wrote; `results` were measured in the same session. Of each kernel the
    newest code counts.
    """
    copied, multiplied = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    print(
        f"ceilings of {ceilings['device']}, {ceilings['measured_at']}: copy {copied / 1e12:.2f} TB/s, bf16 matmul "
        f"{multiplied / 1e12:.0f} TFLOP/s"
    )
    by_context: dict[SelectionContext, list[Measurement]] = {}
    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    for row in current_rows(ResultsStore(results).read().rows, kernels):
        if row.status == "ok" and not row.is_search and not row.is_slowed:
            by_context.setdefault(row.context, []).append(row)
    for context, rows in by_context.items():
        timed, screened = _seconds(rows, lambda row: row.samples_ns), _seconds(rows, _screening)
        times = timed or screened
        is_prefill = context.num_heads is not None and context.seq_len_q != 1
        amount, ceiling = (_flops(context), multiplied) if is_prefill else (_bytes(context), copied)
        winner = min(times, key=lambda name: times[name])
        shape = f"{context.operation} {context.dtype} {shape_text(context)}"
        print(f"  {shape}: {winner} {amount / times[winner] / ceiling:.2f} of the ceiling")
        own = {name: time for name, time in (screened | timed).items() if name.startswith(OWN)}
        if own and not is_prefill:
            best = min(own, key=lambda name: own[name])
            yield Condition.at_least(f"{shape}: {best}'s share of the copy", amount / own[best] / ceiling, OWN_SHARE)


def _bytes(context: SelectionContext) -> float:
    """Every tensor moved once."""
    return call_elements(context) * ITEM_BYTES[context.dtype]


def _flops(context: SelectionContext) -> float:
    return operation_named(context.operation).flops(context)


def _screening(row: Measurement) -> Sequence[float]:
    return () if row.screen_ns is None else (row.screen_ns,)


def _seconds(rows: Sequence[Measurement], samples: Callable[[Measurement], Sequence[float]]) -> dict[str, float]:
    """By choice, the median over its contests of the median of their samples, in s; those without any are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if taken := samples(row):
            found.setdefault(describe_choice(choice_of(row.kernel_id, row.configuration)), []).append(median(taken))
    return {name: median(medians) * 1e-9 for name, medians in found.items()}

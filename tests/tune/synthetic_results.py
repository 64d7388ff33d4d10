"""Results with a known optimum: contests whose times come from functions, and tables compiled from them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_runtime.tables.table import MISS, Table
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.form import TableForm
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.compile.self_check import check_emitted
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.contest import Candidate, Contest, MeasurementPolicy
from layerzero_tune.results.measurement import Measurement, Status
from tests.tune.synthetic_kernels import KERNELS

DEVICE = DeviceSpec("cpu", "Synthetic CPU", "avx2", physical_cores=2, threads=2)
POLICY = MeasurementPolicy()
ALL_KERNELS: tuple[Kernel, ...] = (*builtin_kernels(), *KERNELS)

Times = Mapping[str, float | Status]
CostModel = Callable[[SelectionContext], Times]


def norm(rows: int, hidden_size: int = 1024) -> SelectionContext:
    return SelectionContext(operation="norm.rms", dtype="float32", rows=rows, hidden_size=hidden_size)


def full(batch_kv_heads: int, length: int, batch_size: int = 1) -> SelectionContext:
    """Ungrouped attention of equal lengths; the batch size is one of the ways to split batch x heads."""
    assert batch_kv_heads % batch_size == 0
    return SelectionContext(
        operation="attention.full",
        dtype="float32",
        batch_size=batch_size,
        num_heads=batch_kv_heads // batch_size,
        head_dim=64,
        seq_len_q=length,
    )


def cross(batch_kv_heads: int, seq_len_q: int, seq_len_k: int) -> SelectionContext:
    return SelectionContext(
        operation="attention.cross",
        dtype="float32",
        batch_size=1,
        num_heads=batch_kv_heads,
        head_dim=64,
        seq_len_q=seq_len_q,
        seq_len_k=seq_len_k,
    )


def contest_rows(
    context: SelectionContext,
    times: Times,
    *,
    noise: float = 0.0,
    rounds: int = 10,
    screened: Collection[str] = (),
    repeat: int = 0,
    second: int = 0,
) -> list[Measurement]:
    """The rows of one contest: by kernel id a time in ns or the status without one.

    `noise` is the standard deviation of a round's log time, beside a drift of the machine that all kernels share.
    Kernels in `screened` did not reach the rounds. Equal arguments give equal rows.
    """
    default = operation_named(context.operation).default_kernel
    candidates = tuple(Candidate(kernel_id, is_default=kernel_id == default) for kernel_id in times)
    job_ids = tuple(content_hash(["job", context.to_dict(), candidate.kernel_id]) for candidate in candidates)
    contest = Contest(context, candidates, job_ids, POLICY, repeat)
    chance = random.Random(contest.contest_id)
    drifts = [chance.lognormvariate(0.0, 0.1) for _ in range(rounds)]
    rows = []
    for candidate, job_id in zip(candidates, job_ids, strict=True):
        time = times[candidate.kernel_id]
        ns = None if isinstance(time, str) else time
        samples: tuple[float, ...] = ()
        if ns is not None and candidate.kernel_id not in screened:
            samples = tuple(ns * drift * chance.lognormvariate(0.0, noise) for drift in drifts)
        rows.append(
            Measurement(
                contest_id=contest.contest_id,
                job_id=job_id,
                context=context,
                kernel_id=candidate.kernel_id,
                configuration={},
                is_default=candidate.is_default,
                status=time if isinstance(time, str) else "ok",
                message="" if ns else f"a recorded {time}",
                relative_error=1e-7 if ns else None,
                tolerance=1e-6 if ns else None,
                screen_ns=ns,
                samples_ns=samples,
                device=DEVICE.to_dict(),
                versions={"torch": "2.13.0+cpu"},
                source_hash=content_hash(candidate.kernel_id),
                policy=POLICY.to_dict(),
                measured_at=f"2026-03-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}+00:00",
            )
        )
    return rows


def configured(row: Measurement, times: Mapping[int, float]) -> list[Measurement]:
    """The same job in further configurations of its kernel: by `block` a time in ns, with the row's noise."""
    assert row.screen_ns is not None
    return [
        replace(
            row,
            job_id=content_hash(["job", row.context.to_dict(), block]),
            configuration={"block": block},
            screen_ns=time,
            samples_ns=tuple(time / row.screen_ns * sample for sample in row.samples_ns),
        )
        for block, time in times.items()
    ]


def measured(
    contexts: Iterable[SelectionContext],
    model: CostModel,
    noise: float = 0.0,
    screen: float = math.inf,
    repeat: int = 0,
) -> list[Measurement]:
    """One contest per context, one second after the other; kernels `screen` times as slow as the best do not enter the
    rounds, unless they are the default. Another `repeat` has other noise."""
    rows = []
    for second, context in enumerate(contexts):
        times = model(context)
        best = min((time for time in times.values() if not isinstance(time, str)), default=0.0)
        default = operation_named(context.operation).default_kernel
        slow = [name for name, time in times.items() if not isinstance(time, str) and time > screen * best]
        screened = [name for name in slow if name != default]
        rows += contest_rows(context, times, noise=noise, second=second, screened=screened, repeat=repeat)
    return rows


def grid(make: Callable[..., SelectionContext], *axes: Sequence[int]) -> list[SelectionContext]:
    return [make(*sizes) for sizes in itertools.product(*axes)]


def compiled(rows: Sequence[Measurement]) -> TableForm:
    return compile_table(rows, ALL_KERNELS)


def table_of(form: TableForm) -> Table:
    """The table as a process loads it, after the compiler's own check."""
    with TemporaryDirectory() as folder:
        path = emit(form).write(Path(folder))
        assert check_emitted(form, path) > 0
        return load_table_file(path / "__init__.py")


def served(table: Table, context: SelectionContext) -> str | None:
    """The kernel that the table gives for a call, None for a miss."""
    entry, leaf = table.find(operation_named(context.operation), context.with_device(DEVICE))
    if entry is None or leaf == MISS:
        return None
    return next((step.kernel_id for step in entry.leaves[leaf] if step.accepts(context.with_device(DEVICE))), None)

"""A tuning that nobody ran: contests of attention on a described H100, with times from cost curves and 2% noise.

Importable as `--kernels synthetic_tuning`, with this folder on the module path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.contest import Candidate, Contest, MeasurementPolicy
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore

H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
POLICY = MeasurementPolicy(rounds=16)
NOISE = 0.02
DTYPES = ("float16", "bfloat16", "float32")
MODES = ("eager", "graph")
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 4, 8)
LENGTHS = tuple(2**power for power in range(4, 16))
BATCH_KV_HEADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
BLOCKS = (16, 32, 48, 64, 96, 128, 256)


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    raise NotImplementedError("the kernels of a synthetic tuning have times, but no code")


KERNELS = tuple(
    Kernel(
        KernelSpec(
            kernel_id=f"synthetic.kernel_{number}",
            operations=("attention.full",),
            platforms=("cuda",),
            dtypes=DTYPES,
            supports_gqa=True,
        ),
        _load,
    )
    for number in range(7)
)
CANDIDATES = (
    Candidate("torch.sdpa", is_default=True),
    *(Candidate(kernel.kernel_id, {"block": block}) for kernel in KERNELS for block in BLOCKS),
)


def points() -> Iterator[SelectionContext]:
    """20,160 points under 120 static keys."""
    features = itertools.product(DTYPES, MODES, HEAD_DIMS, GROUPS)
    for (dtype, mode, head_dim, group), heads, length in itertools.product(features, BATCH_KV_HEADS, LENGTHS):
        yield SelectionContext(
            operation="attention.full",
            dtype=dtype,
            mode=mode,
            batch_size=1,
            num_heads=heads * group,
            num_kv_heads=heads,
            head_dim=head_dim,
            seq_len_q=length,
        )


def contest_rows(context: SelectionContext, second: int) -> list[Measurement]:
    """The rows of the point's contest, every candidate with 16 rounds; equal arguments give equal rows."""
    job_ids = tuple(content_hash(["job", context.to_dict(), c.kernel_id, c.configuration]) for c in CANDIDATES)
    contest = Contest(context, CANDIDATES, job_ids, POLICY)
    generator = np.random.Generator(np.random.PCG64(contest.seed))
    drift = generator.normal(0.0, NOISE, POLICY.rounds)
    logs = np.log(_times_ns(context))[:, None] + drift + generator.normal(0.0, NOISE, (len(CANDIDATES), POLICY.rounds))
    samples = np.exp(logs).tolist()
    errors = generator.uniform(1e-3, 3e-3, len(CANDIDATES)).tolist()
    measured_at = f"2026-03-{1 + second // 86400:02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
    return [
        Measurement(
            contest_id=contest.contest_id,
            job_id=job_id,
            context=context,
            kernel_id=candidate.kernel_id,
            configuration=candidate.configuration,
            is_default=candidate.is_default,
            status="ok",
            message="",
            relative_error=error,
            tolerance=1e-2,
            screen_ns=times[0],
            samples_ns=tuple(times),
            device=_DEVICE,
            versions=_VERSIONS,
            source_hash=_SOURCES[candidate.kernel_id],
            policy=_POLICY,
            measured_at=f"{measured_at}+00:00",
        )
        for candidate, job_id, times, error in zip(CANDIDATES, job_ids, samples, errors, strict=True)
    ]


def write(store: ResultsStore, rows: int) -> None:
    """Write the contests of whole points until there are `rows` rows or more, a file each as a run does, compacted."""
    contests = -(-rows // len(CANDIDATES))
    for second, context in enumerate(itertools.islice(points(), contests)):
        store.append(contest_rows(context, second))
        if second % _BATCH == _BATCH - 1:
            store.compact()
    store.compact()


# Contests between two compactions: a run of days compacts at the end of each.
_BATCH = 5000
_DEVICE, _VERSIONS, _POLICY = H100.to_dict(), {"torch": "2.13.0", "synthetic": "1.0"}, POLICY.to_dict()
_SOURCES = {candidate.kernel_id: content_hash(candidate.kernel_id) for candidate in CANDIDATES}


def _times_ns(context: SelectionContext) -> list[float]:
    """A kernel has a cost per call and one per score element, the later the dearer and the faster; each has its best
    block, which grows with the length."""
    elements = (context.score_elements or 0) * (context.head_dim or 0)
    ideal = 16.0 * (context.seq_len_q or 0) ** 0.25
    times = [2000.0 + elements * 4e-4]
    for number in range(len(KERNELS)):
        best = 1500.0 * 1.5**number + elements * 3e-4 / 1.5**number
        times += [best * (1.0 + 0.2 * math.log2(block / ideal / (1 + number % 3)) ** 2) for block in BLOCKS]
    return times

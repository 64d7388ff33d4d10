"""Selection under stress: threads select and call while policies, kernels and health change a hundred times a second.

Checks: nothing raises, no plan is one that its own snapshot forbids (by a check written apart from the selector),
results are right, resident memory stays, and every thread keeps going. Prints a summary; exits 1 on a violation.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from snapshot_check import why_wrong
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.snapshot import Snapshot

THREADS = 32
POLICY_THREADS, POLICIES_PER_S = 4, 100
MAX_GROWTH = 10 * 1024 * 1024
# Of the run, at most; then memory is taken as settled.
SETTLED_AFTER_S = 10.0
# A thread that makes no step for so long hangs.
SILENCE_S = 60.0
FAILURES = 0.02  # of the calls of a kernel that is registered here
H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)
CPU = detect_device("cpu")
# Compiling one takes seconds, and is not what is tried here.
NO_INDUCTOR = Rule(kernel="torch.inductor.*")
BREAKABLE = ("torch.sdpa.math", "torch.matmul", "torch.rms_norm.fused", "torch.swiglu.in_place")
GLOBS = ("torch.sdpa.*", "torch.matmul*", "*.fused", "*.in_place", "stress.*", "*vector_norm")


class CountedSnapshot(Snapshot):
    """A snapshot that counts how many were built."""

    built = count()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        next(self.built)
        super().__init__(*arguments, **options)


def random_context(chance: random.Random) -> SelectionContext:
    device = chance.choice((CPU, CPU, H100))
    dtype = chance.choice(("float32", "bfloat16", "float16"))
    if chance.random() < 0.4:
        operation = chance.choice(("norm.rms", "mlp.swiglu", "norm.layer"))
        sizes = {"rows": chance.randint(1, 9000), "hidden_size": 32 * chance.randint(1, 128)}
        return SelectionContext(operation=operation, dtype=dtype, device=device, **sizes)
    operation = chance.choice(("attention.causal", "attention.full", "attention.cross"))
    length = chance.randint(1, 9000)
    kv_heads = chance.choice((1, 2, 4, 8))
    return SelectionContext(
        operation=operation,
        dtype=dtype,
        device=device,
        batch_size=chance.randint(1, 64),
        seq_len_q=length,
        seq_len_k=length + (operation == "attention.cross"),
        num_heads=kv_heads * chance.choice((1, 2, 4)),
        num_kv_heads=kv_heads,
        head_dim=chance.choice((32, 64, 80, 128, 256)),
        attn_mask=chance.choice(("none", "none", "none", "bool")),
        scale=chance.uniform(0.1, 2.0) if chance.random() < 0.05 else None,
        requires_deterministic=chance.random() < 0.1,
    )


def random_policy(chance: random.Random) -> Policy:
    """Rules on any kernels but the operations' defaults, so that every call can be served."""

    def rules(most: int, boost: float = 0.0) -> tuple[Rule, ...]:
        return tuple(random_rule(chance, boost) for _ in range(chance.randint(0, most)))

    allows = (Rule(kernel="torch.*"), *rules(1)) if chance.random() < 0.3 else ()
    boosts = (Rule(kernel="stress.*", boost=5.0),) if chance.random() < 0.5 else ()
    return Policy(rules(2), allows, (NO_INDUCTOR, *rules(3)), (*boosts, *rules(2, chance.uniform(-2.0, 2.0))))


def random_rule(chance: random.Random, boost: float) -> Rule:
    when = (
        (),
        (Limit("batch_size", "at_least", chance.randint(1, 64)),),
        (Limit("seq_len_q", "multiple_of", chance.choice((2, 128))), Limit("dtype", "one_of", ("float32",))),
        (Limit("rows", "at_most", chance.randint(1, 9000)),),
    )
    operation = chance.choice(("*", "attention.*", "norm.rms", "mlp.*"))
    return Rule(operation=operation, kernel=chance.choice(GLOBS), when=chance.choice(when), boost=boost)


class Stress:
    """The run's threads, what they count, and what they find."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counted: dict[str, Counter[str]] = {}
        self.violations: list[str] = []
        self.ended = threading.Event()
        self.steps: dict[str, float] = {}

    def threads(self) -> list[threading.Thread]:
        jobs: list[tuple[str, Callable[[random.Random], Iterator[str]]]] = [
            (f"user {number}", self.use) for number in range(THREADS)
        ]
        jobs += [(f"policy {number}", self.reload) for number in range(POLICY_THREADS)]
        jobs += [(f"registrar {operation}", self.registrar(operation)) for operation in KERNELS]
        jobs += [("health", self.break_and_heal)]
        return [threading.Thread(target=self.run, args=job, name=job[0], daemon=True) for job in jobs]

    def run(self, name: str, job: Callable[[random.Random], Iterator[str]]) -> None:
        """Do a job step by step until the run ends; what it yields is counted."""
        steps = job(random.Random(f"{self.seed} {name}"))
        counts = self.counted[name] = Counter()
        while not self.ended.is_set():
            self.steps[name] = time.monotonic()
            try:
                counts[next(steps)] += 1
            except Exception as error:  # noqa: BLE001 - any is a violation
                self.violations.append(f"{name}: {type(error).__name__}: {error}")
                break
        del self.steps[name]

    def use(self, chance: random.Random) -> Iterator[str]:
        calls = [make(chance) for make in (norm_call, swiglu_call, attention_call)]
        while True:
            snapshot, context = dispatch.current_snapshot(), random_context(chance)
            try:
                kernel_id: str | None = snapshot.select(context).kernel_id
            except lz.NoKernelAvailableError:
                kernel_id = None
            if (wrong := why_wrong(snapshot, kernel_id, context)) is not None:
                self.violations.append(f"{wrong}; {context.to_dict()} on {context.platform}, {snapshot.policy}")
            yield "selections"
            call, expected = chance.choice(calls)
            if not torch.allclose(call(), expected, rtol=1e-3, atol=1e-4):
                self.violations.append(f"a wrong result of {call}")
            yield "calls"
            if chance.random() < 0.01:
                lz.stats()
                yield "readings of stats"

    def reload(self, chance: random.Random) -> Iterator[str]:
        pause, due = POLICY_THREADS / POLICIES_PER_S, time.monotonic()
        while True:
            due = max(due + pause, time.monotonic() - 1.0)
            self.ended.wait(max(0.0, due - time.monotonic()))
            lz.set_policy(random_policy(chance))
            yield "policy reloads"

    def registrar(self, operation: str) -> Callable[[random.Random], Iterator[str]]:
        def register(chance: random.Random) -> Iterator[str]:
            for number in count():
                kernel_id = f"stress.{operation.replace('.', '_')}_{number % 50}"
                lz.register_kernel(
                    KernelSpec(
                        kernel_id=kernel_id,
                        operations=(operation,),
                        platforms=("cpu", "cuda"),
                        dtypes=("float32", "bfloat16"),
                        requires=(),
                        supports_gqa=chance.random() < 0.5,
                        max_batch_size=chance.choice((None, 16)),
                        priority=chance.choice((10, 150)),
                    ),
                    failing_now_and_then(KERNELS[operation], random.Random(chance.random())),
                )
                yield "kernels registered"
                self.ended.wait(chance.uniform(0.0, 0.05))
                lz.unregister_kernel(kernel_id)

        return register

    def break_and_heal(self, chance: random.Random) -> Iterator[str]:
        while True:
            kernel_id = chance.choice(BREAKABLE)
            if chance.random() < 0.5:
                dispatch.health().failed(kernel_id, "broken on purpose")
                yield "kernels broken"
            else:
                dispatch.health().succeeded(kernel_id)
                yield "kernels healed"
            self.ended.wait(chance.uniform(0.0, 0.05))


def failing_now_and_then(function: Callable[..., Any], chance: random.Random) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if chance.random() < FAILURES:
            raise RuntimeError("fails now and then")
        return function(*arguments)

    return run


def _attend(query: Any, key: Any, value: Any, mask: Any, dropout: float, scale: float | None) -> Any:
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=True)


KERNELS: dict[str, Callable[..., Any]] = {
    "mlp.swiglu": lambda gate, up: silu(gate) * up,
    "norm.rms": lambda x, weight, eps, offset: rms_norm(x, x.shape[-1:], weight, eps),
    "attention.full": _attend,
}


def norm_call(chance: random.Random) -> tuple[Callable[[], Any], Any]:
    x, weight = torch.randn(chance.randint(1, 8), 32), torch.randn(32)
    return lambda: lz.rms_norm(x, weight), rms_norm(x, (32,), weight, 1e-6)


def swiglu_call(chance: random.Random) -> tuple[Callable[[], Any], Any]:
    gate, up = torch.randn(2, chance.randint(1, 8), 32)
    return lambda: lz.swiglu(gate, up), silu(gate) * up


def attention_call(chance: random.Random) -> tuple[Callable[[], Any], Any]:
    query, key, value = torch.randn(3, 1, 2, chance.randint(2, 16), 16)
    return lambda: lz.attention(query, key, value), scaled_dot_product_attention(query, key, value)


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(seconds: float, seed: int) -> dict[str, Any]:
    """Run the stress; what was counted and measured, with the violations."""
    stress = Stress(seed)
    torch.manual_seed(seed)
    lz.set_policy(Policy(denies=(NO_INDUCTOR,)))
    dispatch.health()._first_pause_s = 0.02
    fallbacks, built = lz.stats().get("fallbacks", 0), next(CountedSnapshot.built)
    threads = stress.threads()
    start = time.monotonic()
    for thread in threads:
        thread.start()
    settled_after = min(SETTLED_AFTER_S, seconds / 2)
    settled = latest = 0
    while (elapsed := time.monotonic() - start) < seconds and not stress.violations:
        stress.ended.wait(min(1.0, seconds - elapsed))
        latest = resident_bytes()
        if not settled and time.monotonic() - start >= settled_after:
            settled = latest
        _check_progress(stress)
    elapsed = time.monotonic() - start
    stress.ended.set()
    for thread in threads:
        thread.join(SILENCE_S)
        if thread.is_alive():
            stress.violations.append(f"{thread.name} does not end")
            faulthandler.dump_traceback(all_threads=True)
    counts: Counter[str] = sum(stress.counted.values(), Counter())
    growth = latest - settled
    if growth >= MAX_GROWTH:
        stress.violations.append(f"resident memory grew by {growth / 2**20:.1f} MiB after {settled_after:.0f} s")
    snapshots = next(CountedSnapshot.built) - built - 1
    return {
        "seed": seed,
        "seconds": round(elapsed, 1),
        "threads": len(threads),
        **dict(sorted(counts.items())),
        "policy reloads asked for per s": round(counts["policy reloads"] / elapsed, 1),
        "snapshots published per s": round(snapshots / elapsed, 1),
        "fallbacks": lz.stats().get("fallbacks", 0) - fallbacks,
        "resident MiB at the start of the count": round(settled / 2**20, 1),
        "resident MiB grown by": round(growth / 2**20, 2),
        "violations": stress.violations[:20],
    }


def _check_progress(stress: Stress) -> None:
    now = time.monotonic()
    silent = [name for name, last in tuple(stress.steps.items()) if now - last > SILENCE_S]
    if silent:
        stress.violations.append(f"no step for {SILENCE_S:.0f} s: {', '.join(silent)}")
        faulthandler.dump_traceback(all_threads=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="of the random choices; printed, to repeat a run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Past any end of the run: whatever hangs shows where.
    faulthandler.dump_traceback_later(options.seconds + 3 * SILENCE_S, exit=True)
    logging.getLogger("layerzero").setLevel(logging.CRITICAL)
    # More changes of thread than usual: more orders of events, and those that wait for a lock are not starved.
    sys.setswitchinterval(0.0005)
    dispatch.Snapshot = CountedSnapshot  # type: ignore[misc]
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    summary = run(options.seconds, seed)
    if options.json:
        print(json.dumps(summary))
    else:
        for name, value in summary.items():
            print(f"{name}: {value}")
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # not held up by a thread that hangs

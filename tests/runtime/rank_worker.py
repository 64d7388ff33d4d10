"""One rank of a group, in a process of its own: `python -m tests.runtime.rank_worker RANK SIZE INIT STEP...`.

Runs the steps named, which all ranks of a group go through together, and prints one JSON object: what each gave.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import layerzero_runtime as lz
from layerzero_runtime import dispatch, distributed, ranks
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError, KernelExecutionError, RanksDifferError
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit

# Long enough for the slowest process to come, where all do.
LONG_S = 60.0
# Where one does not.
SHORT_S = 3.0
HEADS, LOCAL_HEADS = 12, 4
PREFER_THE_TESTS = Policy(boosts=(Rule(kernel="test.*", boost=1.0),))


def contexts() -> list[SelectionContext]:
    """Calls that the synthetic table answers, and calls that it does not."""
    shapes = [(rows, hidden) for rows in (1, 8, 256, 1000) for hidden in (32, 512)]
    norms = [SelectionContext(operation="mlp.swiglu", dtype="float32", rows=r, hidden_size=h) for r, h in shapes]
    attentions = [
        SelectionContext(
            operation="attention.causal", dtype="float32", batch_size=1, seq_len_q=n, num_heads=4, head_dim=16
        )
        for n in (4, 64, 2000)
    ]
    return [*norms, *attentions]


def plans() -> list[list[str]]:
    return [[plan.kernel_id, plan.source] for plan in lz.select_batch(contexts())]


def verify(timeout_s: float = LONG_S, group: Any = None) -> dict[str, Any] | None:
    """None where the ranks agree, else what the error says."""
    start = time.monotonic()
    try:
        distributed.verify_consistent(group, timeout_s)
    except RanksDifferError as error:
        return {
            "message": str(error),
            "differing": {str(rank): list(names) for rank, names in error.differing.items()},
            "unanswered": list(error.unanswered),
            "seconds": time.monotonic() - start,
        }
    return None


def alike(rank: int) -> Any:
    """Attached, all ranks select the same."""
    distributed.attach(timeout_s=LONG_S)
    attached = ranks.attached()
    found = plans()
    distributed.detach()
    return {"attached": attached, "detached": not ranks.attached(), "plans": found}


def other_policy(rank: int) -> Any:
    if rank == 1:
        lz.set_policy(Policy(denies=(Rule(kernel="torch.swiglu*"),)))
    different = verify()
    lz.set_policy(Policy(denies=(Rule(kernel="torch.swiglu*", origin=f"rank{rank}.yaml:1"),)))
    same_from_other_files = verify()
    lz.set_policy(None)
    return {"different": different, "same": same_from_other_files}


def other_kernels(rank: int) -> Any:
    """Rank 2 has a kernel more; attaching fails and leaves it as it was."""
    spec = lz.KernelSpec(
        kernel_id="test.swiglu", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",), requires=()
    )
    if rank == 2:
        lz.register_kernel(spec, _swiglu)
    try:
        distributed.attach(timeout_s=LONG_S)
        refused = ""
    except RanksDifferError as error:
        refused = str(error)
    attached = ranks.attached()
    if rank == 2:
        lz.unregister_kernel("test.swiglu")
    return {"refused": refused, "attached": attached, "after": verify()}


def broken_kernel(rank: int) -> Any:
    if rank == 0:
        dispatch.health().failed("torch.swiglu.in_place", "out of order")
    different = verify()
    dispatch.health().reset()
    return {"different": different, "after": verify()}


def failing_kernel(rank: int) -> Any:
    """A kernel that fails on rank 1 alone raises there, and is replaced only once the ranks are detached."""

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            raise RuntimeError("the driver is out of order")
        return _swiglu(gate, up)

    spec = lz.KernelSpec(
        kernel_id="test.failing",
        operations=("mlp.swiglu",),
        platforms=("cpu",),
        dtypes=("float32",),
        requires=(),
    )
    lz.register_kernel(spec, swiglu)
    lz.set_policy(PREFER_THE_TESTS)
    distributed.attach(timeout_s=LONG_S)
    gate, up = torch.randn(1000, 30), torch.randn(1000, 30)
    context = SelectionContext.from_tensors("mlp.swiglu", gate, up)
    before = lz.stats()["fallbacks"]
    errors = []
    for _ in range(2):
        try:
            torch.testing.assert_close(lz.swiglu(gate, up), _swiglu(gate, up))
            errors.append("")
        except KernelExecutionError as error:
            errors.append(str(error))
    attached = {
        "errors": errors,
        "selected": lz.select(context).kernel_id,
        "fallbacks": lz.stats()["fallbacks"] - before,
        "broken": list(lz.stats().broken),
        "after": verify(),
    }
    distributed.detach()
    torch.testing.assert_close(lz.swiglu(gate, up), _swiglu(gate, up))
    detached = {"selected": lz.select(context).kernel_id, "fallbacks": lz.stats()["fallbacks"] - before}
    lz.set_policy(None)
    lz.unregister_kernel("test.failing")
    dispatch.health().reset()
    return {"attached": attached, "detached": detached}


def breakers_hold(rank: int) -> Any:
    """A kernel that was broken before is not tried again on one rank alone, whenever its pause is over."""
    health = dispatch.health()
    health.failed("torch.swiglu.in_place", "out of order")
    health._breakers = {
        name: replace(breaker, until_s=time.monotonic() - 1.0) for name, breaker in health._breakers.items()
    }
    if rank == 0:
        health.reopen_due()  # its pause is over here first
    distributed.attach(timeout_s=LONG_S)
    health.reopen_due()
    attached = {"broken": list(lz.stats().broken), "half_open": sorted(health.half_open), "verified": verify()}
    distributed.detach()
    detached = sorted(health.half_open | health.broken.keys())
    health.reset()
    return {"attached": attached, "detached": detached}


def local_heads(rank: int) -> Any:
    """Each rank computes its heads of one attention, with a kernel that takes no more than those."""
    spec = lz.KernelSpec(
        kernel_id="test.few_heads",
        operations=("attention.full",),
        platforms=("cpu",),
        dtypes=("float32",),
        requires=(),
        extra_limits=(Limit("num_heads", "at_most", LOCAL_HEADS),),
    )
    heads_seen = []

    def few_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        heads_seen.append(query.shape[1])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    lz.register_kernel(spec, few_heads)
    lz.set_policy(PREFER_THE_TESTS)
    distributed.attach(timeout_s=LONG_S)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, HEADS, 70, 24, generator=generator) for _ in range(3))
    mine = slice(rank * LOCAL_HEADS, (rank + 1) * LOCAL_HEADS)
    local = SelectionContext.from_tensors("attention.full", query[:, mine], key[:, mine], value[:, mine], None, 0, None)
    whole = SelectionContext.from_tensors("attention.full", query, key, value, None, 0, None)
    output = lz.attention(query[:, mine], key[:, mine], value[:, mine]).contiguous()
    parts = [torch.empty_like(output) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, output)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    found = {
        "heads": local.num_heads,
        "local": lz.select(local).kernel_id,
        "whole": lz.select(whole).kernel_id,
        "seen": heads_seen,
    }
    distributed.detach()
    lz.set_policy(None)
    lz.unregister_kernel("test.few_heads")
    return found


def subgroup(rank: int) -> Any:
    """Ranks 0 and 1 are compared without rank 2, which differs."""
    group = dist.new_group([0, 1])
    if rank == 2:
        lz.set_policy(Policy(denies=(Rule(kernel="torch.swiglu*"),)))
        try:
            distributed.attach(group)
        except ContextError as error:
            return {"error": str(error)}
        finally:
            lz.set_policy(None)
    return {"verified": verify(group=group)}


def late(rank: int) -> Any:
    """Rank 2 comes when the others have given up; the next comparison is in step again."""
    if rank == 2:
        time.sleep(SHORT_S + 1.0)
    first = verify(SHORT_S)
    return {"first": first, "second": verify()}


def dead(rank: int, which: int) -> Any:
    dist.barrier()
    if rank == which:
        os._exit(1)
    return verify(SHORT_S)


def stopped(rank: int, which: int) -> Any:
    """Rank `which` neither ends nor answers, like one that the network has lost."""
    dist.barrier()
    if rank == which:
        os.kill(os.getpid(), signal.SIGSTOP)
    return verify(SHORT_S)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


STEPS: dict[str, Callable[[int], Any]] = {
    step.__name__: step
    for step in (
        *(alike, other_policy, other_kernels, broken_kernel, failing_kernel, breakers_hold),
        *(local_heads, subgroup, late),
    )
} | {
    "first_dead": lambda rank: dead(rank, 0),
    "last_dead": lambda rank: dead(rank, 2),
    "first_stopped": lambda rank: stopped(rank, 0),
    "last_stopped": lambda rank: stopped(rank, 2),
}


def main(rank: int, size: int, init: str, *steps: str) -> None:
    if size == 1:  # no group at all
        print(json.dumps({"plans": plans()}))
        return
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size, timeout=timedelta(seconds=LONG_S))
    found = {step: STEPS[step](rank) for step in steps}
    print(json.dumps(found), flush=True)
    # A group with a dead member cannot be taken down in order.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])

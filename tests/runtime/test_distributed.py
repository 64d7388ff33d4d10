"""Ranks that must select alike: real processes, a gloo group, and what `distributed` says of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from layerzero_runtime import distributed, ranks
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import ContextError, ContextTypeError, LayerZeroError, RanksDifferError
from layerzero_runtime.kernel import FunctionLoader
from layerzero_runtime.policies.policy import EMPTY, Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table_files import TABLES_VARIABLE
from layerzero_runtime.tables.table_set import TableSet
from layerzero_tune.compile.form import TableForm
from tests.runtime import rank_worker
from tests.runtime.conftest import tables_in_force
from tests.runtime.rank_worker import LOCAL_HEADS, SHORT_S, STEPS

ROOT = Path(__file__).parents[2]
SIZE = 3
Found = list[dict[str, Any] | None]


def start(arguments: list[str], tables: Path) -> subprocess.Popen[str]:
    environment = os.environ | {TABLES_VARIABLE: str(tables), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", rank_worker.__name__, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_ranks(tables: Path, init: str, *steps: str, silent: int | None = None) -> Found:
    """What the steps gave on each rank; None for the silent one, which is expected to give nothing."""
    processes = [start([str(rank), str(SIZE), init, *steps], tables) for rank in range(SIZE)]
    found: Found = [None] * SIZE
    try:
        for rank, process in enumerate(processes):
            if rank != silent:
                output, errors = process.communicate(timeout=180)
                assert process.returncode == 0, errors
                found[rank] = json.loads(output.splitlines()[-1])
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return found


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def tables(synthetic_tables: tuple[Path, TableForm]) -> Path:
    return synthetic_tables[0]


@pytest.fixture(scope="module")
def found(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By step, what it gave on each rank: one group goes through all of them, so that a comparison which mixes its
    answers with those of another one shows."""
    steps = [name for name in STEPS if not name.endswith(("_dead", "_stopped"))]
    init = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
    results = run_ranks(tables, init, *steps)
    return {step: [result[step] for result in results if result is not None] for step in steps}


@pytest.mark.scenario("FS-024")
@pytest.mark.scenario("NO-012")
def test_ranks_with_equal_snapshots_select_the_same_as_a_process_alone(
    found: dict[str, list[Any]], tables: Path
) -> None:
    output, errors = start(["0", "1", ""], tables).communicate(timeout=180)
    alone = json.loads(output)["plans"]
    assert {source for _, source in alone} == {"table", "live"}, errors
    assert len({kernel_id for kernel_id, _ in alone}) > 3
    for result in found["alike"]:
        assert result == {"attached": True, "detached": True, "plans": alone}


@pytest.mark.scenario("FS-024")
def test_a_rank_with_another_policy_is_named_on_every_rank(found: dict[str, list[Any]]) -> None:
    for result in found["other_policy"]:
        error = result["different"]
        assert error["differing"] == {"1": ["policy"]}
        assert error["unanswered"] == []
        assert "rank 1 has another policy: 1 rules [" in error["message"]
        assert "as ranks 0, 2" in error["message"]
        # Where a rule was written is no difference.
        assert result["same"] is None


@pytest.mark.scenario("FS-024")
def test_a_rank_with_a_kernel_more_is_named_and_nobody_is_attached(found: dict[str, list[Any]]) -> None:
    for result in found["other_kernels"]:
        assert "rank 2 has another kernels: " in result["refused"]
        assert "rank 1" not in result["refused"]
        assert result["attached"] is False
        assert result["after"] is None


@pytest.mark.scenario("FS-024")
def test_a_rank_with_a_broken_kernel_is_named(found: dict[str, list[Any]]) -> None:
    for result in found["broken_kernel"]:
        assert result["different"]["differing"] == {"0": ["broken"]}
        assert "rank 0 has another broken: torch.swiglu.in_place, not none" in result["different"]["message"]
        assert result["after"] is None


@pytest.mark.scenario("FS-023")
@pytest.mark.scenario("FS-024")
def test_a_kernel_that_fails_on_one_rank_raises_there_and_is_not_replaced(found: dict[str, list[Any]]) -> None:
    for rank, result in enumerate(found["failing_kernel"]):
        attached = result["attached"]
        for error in attached["errors"]:
            if rank == 1:
                assert "test.failing failed (RuntimeError: the driver is out of order)" in error
                assert "'rows': 1000" in error
                assert "not replaced on this one alone" in error
            else:
                assert error == ""
        assert (attached["selected"], attached["fallbacks"], attached["broken"]) == ("test.failing", 0, [])
        # The ranks still select alike.
        assert attached["after"] is None
        if rank == 1:
            assert result["detached"]["selected"] != "test.failing"
            assert result["detached"]["fallbacks"] == 1
        else:
            assert result["detached"] == {"selected": "test.failing", "fallbacks": 0}


@pytest.mark.scenario("FS-024")
def test_breakers_stay_as_they_are_while_ranks_are_attached(found: dict[str, list[Any]]) -> None:
    for result in found["breakers_hold"]:
        assert result["attached"] == {"broken": ["torch.swiglu.in_place"], "half_open": [], "verified": None}
        assert result["detached"] == ["torch.swiglu.in_place"]


@pytest.mark.scenario("NO-011")
def test_a_tensor_parallel_rank_selects_for_its_own_heads(found: dict[str, list[Any]]) -> None:
    """The outputs of all ranks together were compared with the whole attention in the ranks themselves."""
    for result in found["local_heads"]:
        assert result["heads"] == LOCAL_HEADS
        assert result["local"] == "test.few_heads"
        assert result["whole"] != "test.few_heads"
        assert result["seen"] == [LOCAL_HEADS]


def test_a_group_of_some_ranks_is_compared_alone(found: dict[str, list[Any]]) -> None:
    first, second, outsider = found["subgroup"]
    assert first == second == {"verified": None}
    assert "not a member of the group" in outsider["error"]


@pytest.mark.scenario("FS-022")
def test_a_rank_that_comes_too_late_learns_that_the_others_gave_up(found: dict[str, list[Any]]) -> None:
    for result in found["late"]:
        assert result["first"]["unanswered"] == [2]
        assert result["first"]["differing"] == {}
        assert result["second"] is None


@pytest.mark.scenario("FS-022")
@pytest.mark.scenario("FS-023")
@pytest.mark.parametrize(
    ("step", "silent"), [("last_dead", 2), ("first_dead", 0), ("last_stopped", 2), ("first_stopped", 0)]
)
def test_a_rank_that_is_gone_is_named_within_the_timeout(step: str, silent: int, tables: Path) -> None:
    """Rank 0 holds the store at which the ranks met: with it the store is gone, or does not answer."""
    results = run_ranks(tables, free_address(), step, silent=silent)
    assert results[silent] is None
    for rank in {*range(SIZE)} - {silent}:
        result = results[rank]
        assert result is not None
        error = result[step]
        assert error["unanswered"] == [silent]
        assert error["differing"] == {}
        assert f"rank {silent} did not answer" in error["message"]
        assert error["seconds"] < SHORT_S + 2.0


def test_without_a_group_there_is_nothing_to_attach_to() -> None:
    assert not dist.is_initialized()
    for call in (distributed.attach, distributed.verify_consistent):
        with pytest.raises(ContextError, match="init_process_group first"):
            call()
    assert not ranks.attached()


def test_odd_timeouts_are_refused() -> None:
    for timeout_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ContextError, match="timeout_s is"):
            distributed.verify_consistent(timeout_s=timeout_s)
    with pytest.raises(ContextTypeError, match="timeout_s must be a number"):
        distributed.verify_consistent(timeout_s="3")  # type: ignore[arg-type]


def test_the_majority_is_what_most_ranks_have_and_of_equals_what_the_lowest_has() -> None:
    one, other = {"policy": "1", "device": "a"}, {"policy": "2", "device": "a"}
    third = {"policy": "2", "device": "b"}
    assert distributed.differing_parts({0: one, 1: other, 2: other}) == {0: ("policy",)}
    assert distributed.differing_parts({0: one, 1: other}) == {1: ("policy",)}
    assert distributed.differing_parts({3: other, 1: one, 2: other, 0: one}) == {2: ("policy",), 3: ("policy",)}
    assert distributed.differing_parts({0: one, 1: one, 2: third}) == {2: ("policy", "device")}
    assert distributed.differing_parts({0: one, 1: one}) == {}
    assert distributed.differing_parts({}) == {}


def test_the_error_is_one_of_the_library() -> None:
    error = RanksDifferError("text", {1: ("policy",)}, (2,))
    assert isinstance(error, LayerZeroError)
    assert (error.differing, error.unanswered, str(error)) == ({1: ("policy",)}, (2,), "text")


@pytest.mark.scenario("FS-024")
def test_the_digest_depends_on_all_that_selections_follow_from(snapshot: Snapshot) -> None:
    before = snapshot.digest_parts
    assert snapshot.digest == current_snapshot().digest

    def changed(other: Snapshot) -> set[str]:
        assert other.digest != snapshot.digest
        parts = other.digest_parts
        return {name for name in before if parts[name] != before[name]}

    def like(
        registry: Registry = snapshot.registry, policy: Policy = EMPTY, tables: TableSet = snapshot.tables
    ) -> Snapshot:
        return Snapshot(registry, snapshot.counters, policy=policy, tables=tables)

    assert like().digest == snapshot.digest
    assert changed(like(policy=Policy(boosts=(Rule(boost=1.0),)))) == {"policy"}
    assert changed(like(policy=Policy(boosts=(Rule(boost=2.0),)))) == {"policy"}
    assert "kernels" in changed(like(registry=snapshot.registry.without("torch.swiglu")))
    kernels = {kernel.kernel_id: kernel for kernel in snapshot.registry}
    swiglu = kernels["torch.swiglu"]
    other_limits = replace(swiglu, spec=replace(swiglu.spec, max_hidden_size=4096))
    assert changed(like(registry=Registry((kernels | {"torch.swiglu": other_limits}).values()))) == {"kernels"}
    other_source = replace(swiglu, load=FunctionLoader(rank_worker.verify))
    assert changed(like(registry=Registry((kernels | {"torch.swiglu": other_source}).values()))) == {"libraries"}
    with tables_in_force(None) as without_table:
        assert changed(like(tables=without_table.tables)) == {"table"}


def test_processes_that_hash_texts_differently_have_one_digest(tables: Path) -> None:
    code = "from layerzero_runtime.dispatch import current_snapshot; print(current_snapshot().digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, TABLES_VARIABLE: str(tables)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1

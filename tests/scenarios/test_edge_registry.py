"""EC-025 to EC-028: an empty registry, kernels that all refuse, duplicates, changes while selections run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.selection.live_selector import LiveSelector, Ranking
from layerzero_runtime.tables.prior import Prior
from tests.scenarios.conftest import (
    Attend,
    assert_near,
    attention,
    beside_builtin,
    cpu_kernel,
    exact_attention,
    kernel,
    only,
    qkv,
    spec,
)

pytestmark = pytest.mark.usefixtures("without_tables")

FULL = "attention.full"
FA2, FA3 = kernel("flash_attn.fa2", priority=150), kernel("flash_attn.fa3", priority=200)


@pytest.mark.scenario("EC-025")
def test_without_kernels_the_error_names_the_operation_and_those_that_have_some() -> None:
    query, key, value = qkv()
    with only():
        for ask in (lambda: lz.select(attention()), lambda: lz.attention(query, key, value)):
            with pytest.raises(NoKernelAvailableError) as error:
                ask()
            assert str(error.value) == ("no kernel is registered for 'attention.full'; operations with kernels: none")
    with (
        only(kernel("mine.norm", operations=("norm.rms", "norm.layer"))),
        pytest.raises(NoKernelAvailableError, match=r"operations with kernels: norm\.layer, norm\.rms"),
    ):
        lz.select(attention())


@pytest.mark.scenario("EC-026")
def test_where_all_are_refused_the_error_lists_each_with_its_reasons() -> None:
    short, bf16 = kernel("mine.short", max_seq_len=128), kernel("mine.bf16", dtypes=("bfloat16",), max_head_dim=32)
    too_long = "SEQ_LEN_Q_NOT_AT_MOST: seq_len_q is 512, required <= 128"
    with only(short, bf16), pytest.raises(NoKernelAvailableError) as error:
        lz.select(attention())
    assert error.value.rejections == {
        "mine.short": (too_long, too_long.replace("SEQ_LEN_Q", "SEQ_LEN_K").replace("seq_len_q", "seq_len_k")),
        "mine.bf16": (
            "DTYPE_NOT_ONE_OF: dtype is 'float16', required 'bfloat16'",
            "HEAD_DIM_NOT_AT_MOST: head_dim is 64, required <= 32",
        ),
    }
    for line in (f"  mine.short: {too_long}; ", "  mine.bf16: DTYPE_NOT_ONE_OF"):
        assert line in str(error.value)


@pytest.mark.scenario("EC-026")
def test_a_real_call_that_every_kernel_refuses_raises_the_same() -> None:
    query, key, value = qkv(length=9)
    with only(cpu_kernel("mine.short", max_seq_len=8)), pytest.raises(NoKernelAvailableError) as error:
        lz.attention(query, key, value)
    assert error.value.rejections["mine.short"][0] == "SEQ_LEN_Q_NOT_AT_MOST: seq_len_q is 9, required <= 8"


@pytest.mark.scenario("EC-027")
def test_an_id_that_is_taken_is_refused_and_the_first_kernel_stays() -> None:
    first, second = Attend(), Attend()
    query, key, value = qkv()
    lz.register_kernel(cpu_kernel("mine.attend").spec, first)
    for kernel_id in ("mine.attend", "torch.sdpa"):
        with pytest.raises(ValueError, match=f"kernel '{kernel_id}' is registered twice; give one of them another"):
            lz.register_kernel(cpu_kernel(kernel_id).spec, second)
    lz.attention(query, key, value)
    assert (len(first.given), len(second.given)) == (1, 0)


@pytest.mark.scenario("EC-027")
def test_a_batch_with_one_duplicate_registers_none() -> None:
    before = current_snapshot()
    with pytest.raises(ValueError, match=r"kernel 'torch\.sdpa' is registered twice"):
        lz.register_kernels([(spec("mine.new"), Attend()), (spec("torch.sdpa"), Attend())])
    with pytest.raises(ValueError, match=r"kernel 'mine\.new' is registered twice"):
        lz.register_kernels([(spec("mine.new"), Attend()), (spec("mine.new"), Attend())])
    assert current_snapshot() is before
    lz.register_kernel(spec("mine.new"), Attend())
    assert current_snapshot().registry.get("mine.new") is not None


@pytest.mark.scenario("EC-028")
def test_a_selection_in_progress_ends_with_the_registry_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is unregistered while the selector ranks; that selection has it, the next one has not."""
    ranking, unregistered = threading.Event(), threading.Event()
    rank = LiveSelector.rank

    def slow(selector: LiveSelector, context: SelectionContext, prior: Prior) -> Ranking:
        ranking.set()
        assert unregistered.wait(10)
        return rank(selector, context, prior)

    monkeypatch.setattr(LiveSelector, "rank", slow)
    plans: list[lz.ExecutionPlan] = []
    with beside_builtin(FA2):
        thread = threading.Thread(target=lambda: plans.append(lz.select(attention())))
        thread.start()
        assert ranking.wait(10)
        lz.unregister_kernel("flash_attn.fa2")
        unregistered.set()
        thread.join(10)
        assert [plan.kernel_id for plan in plans] == ["flash_attn.fa2"]
        assert lz.select(attention()).kernel_id == "torch.sdpa"


@pytest.mark.scenario("EC-028")
def test_a_call_that_runs_a_kernel_outlives_its_unregistration() -> None:
    calls: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        calls.append(1)
        lz.unregister_kernel("mine.attend")
        return sdpa(query, key, value)

    query, key, value = qkv()
    lz.register_kernel(cpu_kernel("mine.attend").spec, attend)
    for _ in range(2):
        assert_near(lz.attention(query, key, value), exact_attention(query, key, value))
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"no kernel 'mine\.attend' is registered; registered: "):
        lz.unregister_kernel("mine.attend")


@pytest.mark.scenario("EC-028")
def test_selections_beside_changes_of_the_registry_see_whole_registries() -> None:
    """Two kernels come and go together: no selection finds the second without the first."""
    stop = threading.Event()
    found: list[set[str]] = [set() for _ in range(4)]
    errors: list[BaseException] = []

    def select(seen: set[str]) -> None:
        try:
            while not stop.is_set():
                snapshot = current_snapshot()
                seen.add(lz.select(attention()).kernel_id)
                pair = [snapshot.registry.get(name) is not None for name in ("flash_attn.fa2", "flash_attn.fa3")]
                assert pair in ([True, True], [False, False], [True, False])
                assert snapshot.select(attention()).kernel_id == (
                    "flash_attn.fa3" if pair[1] else "flash_attn.fa2" if pair[0] else "torch.sdpa"
                )
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=select, args=(seen,)) for seen in found]
    for thread in threads:
        thread.start()
    for _ in range(30):
        lz.register_kernels([(FA2.spec, Attend()), (FA3.spec, Attend())])
        lz.unregister_kernel("flash_attn.fa3")
        lz.unregister_kernel("flash_attn.fa2")
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not errors
    assert set().union(*found) <= {"flash_attn.fa2", "flash_attn.fa3", "torch.sdpa"}

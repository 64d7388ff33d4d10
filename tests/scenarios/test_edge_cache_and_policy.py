"""EC-029 to EC-035: the cache's keys, bounds and life; policies that are empty, without effect or in conflict."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import current_snapshot
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.operations import operation_named
from layerzero_runtime.policies.policy import EMPTY, Policy, Rule
from layerzero_runtime.selection.live_cache import LiveCache
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import (
    A100,
    GRAVITON,
    MI300X,
    XEON,
    Attend,
    assert_near,
    attention,
    beside_builtin,
    cpu_kernel,
    exact_attention,
    kernel,
    norm,
    only,
    qkv,
    reasons,
)

pytestmark = pytest.mark.usefixtures("without_tables")

FULL = "attention.full"
FA2, FA3 = kernel("flash_attn.fa2", priority=150), kernel("flash_attn.fa3", priority=200)


class Colliding:
    """Keys that all have one hash."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Colliding) and self.name == other.name


@pytest.mark.scenario("EC-029")
def test_keys_with_one_hash_keep_their_own_answers() -> None:
    """Keys are compared, not only hashed; -1 and -2 have one hash in Python itself."""
    assert hash(-1) == hash(-2)
    cache: LiveCache[str] = LiveCache()
    keys: list[Any] = [Colliding("a"), Colliding("b"), -1, -2]
    for expected_hit in (False, True):
        for key in keys:
            answer = f"of {getattr(key, 'name', key)}"
            assert cache.get(key, partial(str, answer)) == (answer, expected_hit)


@pytest.mark.scenario("EC-029")
@pytest.mark.parametrize(
    ("limit", "refused"),
    [
        ({"dtypes": ("float16",)}, {"dtype": "bfloat16"}),
        ({"max_batch_size": 4}, {"batch_size": 5}),
        ({"min_seq_len": 512}, {"seq_len_q": 511}),
        ({"head_dim_multiple": 16}, {"head_dim": 72}),
        ({"max_score_elements": 4 * 16 * 512 * 512}, {"num_heads": 17}),
        ({}, {"num_kv_heads": 4}),
        ({}, {"v_head_dim": 128}),
        ({}, {"attn_mask": "bool"}),
        ({}, {"dropout_p": 0.1}),
        ({"supports_scale": False}, {"scale": 0.5}),
        ({"requires_contiguous": True}, {"is_contiguous": False}),
        ({"requires_last_dim_stride1": True}, {"stride_last_dim": 2}),
        ({"deterministic": False}, {"requires_deterministic": True}),
        ({}, {"requires_grad": True}),
        ({"is_cuda_graph_safe": False}, {"is_cuda_graph_capturing": True}),
        ({"workspace_bytes": 1024}, {"workspace_limit": 1023}),
        ({}, {"quant_format": "int8"}),
        ({"min_sm": (9, 0)}, {"device": A100}),
        ({}, {"device": MI300X}),
    ],
    ids=lambda value: "-".join(value),
)
def test_each_field_that_a_check_reads_tells_selections_apart(limit: dict[str, Any], refused: dict[str, Any]) -> None:
    """Whichever of the two calls comes first, the other one is not served from its answer."""
    narrow = kernel("mine.narrow", priority=90, **limit)
    everything = kernel(
        "mine.everything",
        priority=10,
        platforms=("cuda", "rocm"),
        supports_gqa=True,
        supports_attn_mask=True,
        supports_dropout=True,
        supports_v_head_dim=True,
        supports_backward=True,
        quant_formats=(None, "int8"),
    )
    calls = [(attention(), "mine.narrow"), (attention(**refused), "mine.everything")]
    for order in (calls, calls[::-1]):
        with only(narrow, everything):
            for context, kernel_id in order:
                assert lz.select(context).kernel_id == kernel_id


@pytest.mark.scenario("EC-029")
def test_devices_that_no_check_tells_apart_do_not_share_what_was_measured_near_one_of_them(xeon_tables: Path) -> None:
    """The table of one Xeon is a guess for another one and says nothing of an Arm processor."""
    near = replace(XEON, physical_cores=16, threads=16)
    call = attention(dtype="float32", batch_size=1, seq_len_q=4, num_heads=1, head_dim=16)
    for order in ((near, GRAVITON), (GRAVITON, near)):
        with tables_in_force(xeon_tables):
            found = {device: lz.select(call.with_device(device)) for device in order}
            assert {plan.source for plan in found.values()} == {"live"}
            assert (found[near].kernel_id, found[GRAVITON].kernel_id) == ("torch.matmul", "torch.sdpa")


@pytest.mark.scenario("EC-030")
def test_a_full_cache_lets_go_of_its_oldest_answers() -> None:
    cache: LiveCache[str] = LiveCache(max_entries=3)
    for key in "abcde":
        cache.get(key, key.upper)
        assert len(cache) <= 3
    assert [cache.get(key, lambda: "new") for key in "cde"] == [("C", True), ("D", True), ("E", True)]
    assert cache.get("a", lambda: "again") == ("again", False)
    assert len(cache) == 3


@pytest.mark.scenario("EC-030")
def test_selections_beyond_the_capacity_stay_right() -> None:
    with beside_builtin(kernel("mine.short", priority=200, max_seq_len=1024)) as snapshot:
        snapshot.live_cache = LiveCache(max_entries=2)
        for _ in range(3):
            for exponent in range(4, 16):
                expected = "mine.short" if exponent <= 10 else "torch.sdpa"
                assert lz.select(attention(seq_len_q=2**exponent)).kernel_id == expected
                assert len(snapshot.live_cache) <= 2
        assert snapshot.live_cache.computed.value == 36


@pytest.mark.scenario("EC-031")
def test_an_answer_that_is_replaced_while_a_call_uses_it_still_serves_that_call() -> None:
    """An entry lives as long as its snapshot: the call at hand ends as it began, the next one is selected anew."""
    attend = Attend()
    query, key, value = qkv()
    arguments = (query, key, value, None, 0.0, None)
    operation, context = operation_named(FULL), SelectionContext.from_tensors(FULL, query, key, value)
    with beside_builtin(cpu_kernel("mine.attend", attend)):
        lz.select(context)
        before = current_snapshot()
        selection = before.choose(operation, context)
        assert (selection.choice.kernel.kernel_id, selection.cached) == ("mine.attend", True)
        lz.set_policy(Policy(denies=(Rule(kernel="mine.*"),)))
        assert_near(before.serve(selection.choice, operation, context, arguments), exact_attention(query, key, value))
        assert len(attend.given) == 1
        plan = lz.select(context)
        assert (plan.kernel_id, plan.cached) == ("torch.sdpa", False)
        assert len(before.live_cache) == 1
        lz.attention(query, key, value)
        assert len(attend.given) == 1


@pytest.mark.scenario("EC-032")
@pytest.mark.parametrize("entries", [0, -1])
def test_a_cache_without_room_cannot_be_made(entries: int) -> None:
    with pytest.raises(
        ValueError, match=f"max_entries is {entries}, required at least 1; a cache cannot be turned off"
    ):
        LiveCache(max_entries=entries)
    cache: LiveCache[str] = LiveCache(max_entries=1)
    assert [cache.get(key, lambda: "x")[1] for key in ("a", "a", "b", "b", "a")] == [False, True, False, True, False]


CONTEXTS = [
    attention(),
    attention(operation="attention.causal", dtype="bfloat16"),
    attention(dtype="float32", attn_mask="bool"),
    attention(device=A100, dropout_p=0.5),
    norm(),
]


@pytest.mark.scenario("EC-033")
@pytest.mark.parametrize("text", [None, "", "version: 1\n", "locks: []\nallows: []\ndenies: []\nboosts: []\n"])
def test_an_empty_policy_changes_nothing(text: str | None, tmp_path: Path) -> None:
    with beside_builtin(FA2, FA3):
        before = [(lz.select(context), lz.explain(context).refused) for context in CONTEXTS]
        if text is None:
            lz.set_policy(Policy())
        else:
            path = tmp_path / "policy.yaml"
            path.write_text(text, encoding="utf-8")
            lz.set_policy(str(path))
        assert current_snapshot().policy == EMPTY
        after = [(lz.select(context), lz.explain(context).refused) for context in CONTEXTS]
        assert after == before
        assert [plan.kernel_id for plan, _ in after] == [
            "flash_attn.fa3",
            "flash_attn.fa3",
            "torch.sdpa",
            "torch.sdpa",
            "torch.rms_norm",
        ]


@pytest.mark.scenario("EC-034")
def test_a_lock_to_a_kernel_that_does_not_exist_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("locks:\n  - kernel: no.such.kernel\n", encoding="utf-8")
    query, key, value = qkv()
    with beside_builtin(FA2, FA3):
        free = lz.select(attention())
        for policy in (Policy(locks=(Rule(kernel="no.such.kernel"),)), str(path)):
            lz.set_policy(policy)
            assert replace(lz.select(attention()), cached=False) == free
            assert_near(lz.attention(query, key, value), exact_attention(query, key, value))
        # What remains of the locks still holds: a kernel that exists is locked to.
        lz.set_policy(Policy(locks=(Rule(kernel="no.such.kernel"), Rule(kernel="flash_attn.fa2"))))
        assert lz.select(attention()).kernel_id == "flash_attn.fa2"


@pytest.mark.scenario("EC-034")
def test_a_lock_never_selects_a_kernel_that_refuses_the_call() -> None:
    with beside_builtin(FA2, FA3):
        lz.set_policy(Policy(locks=(Rule(kernel="flash_attn.fa2"),)))
        assert lz.select(attention()).kernel_id == "flash_attn.fa2"
        for incompatible in ({"dtype": "float32"}, {"attn_mask": "bool"}, {"num_kv_heads": 4}):
            assert lz.select(attention(**incompatible)).kernel_id == "torch.sdpa"


@pytest.mark.scenario("EC-035")
def test_what_is_allowed_and_denied_is_denied(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "allows:\n  - kernel: flash_attn.*\ndenies:\n  - kernel: flash_attn.fa3\n    operation: attention.*\n",
        encoding="utf-8",
    )
    allow, deny = Rule(kernel="flash_attn.*"), Rule(kernel="flash_attn.fa3", operation="attention.*")
    with beside_builtin(FA2, FA3):
        for policy in (Policy(allows=(allow,), denies=(deny,)), str(path)):
            lz.set_policy(policy)
            assert lz.select(attention()).kernel_id == "flash_attn.fa2"
            denied = reasons(attention(), "flash_attn.fa3")
            assert denied.startswith("POLICY_DENIED: by operation attention.*, kernel flash_attn.fa3")
            assert reasons(attention(), "torch.sdpa").startswith(
                "POLICY_NOT_ALLOWED: covered by none of kernel flash_attn.*"
            )
        lz.set_policy(Policy(allows=(allow,)))
        assert lz.select(attention()).kernel_id == "flash_attn.fa3"


@pytest.mark.scenario("EC-035")
def test_a_lock_or_a_boost_does_not_lift_a_denial() -> None:
    rule = Rule(kernel="flash_attn.fa3")
    with beside_builtin(FA2, FA3):
        lz.set_policy(Policy(locks=(rule,), allows=(rule,), denies=(rule,), boosts=(replace(rule, boost=1000.0),)))
        with pytest.raises(NoKernelAvailableError) as error:
            lz.select(attention())
        assert error.value.rejections["flash_attn.fa3"] == ("POLICY_DENIED: by kernel flash_attn.fa3",)
        assert error.value.rejections["flash_attn.fa2"][0].startswith("POLICY_NOT_ALLOWED")


@pytest.mark.scenario("EC-035")
def test_a_real_call_is_not_served_by_a_kernel_that_is_denied_and_allowed() -> None:
    attend = Attend()
    query, key, value = qkv()
    both = (Rule(kernel="mine.attend"),)
    with beside_builtin(cpu_kernel("mine.attend", attend)):
        lz.attention(query, key, value)
        lz.set_policy(Policy(allows=(Rule(kernel="*"),), denies=both))
        output = lz.attention(query, key, value)
        assert len(attend.given) == 1
        lz.set_policy(Policy(allows=both))
        lz.attention(query, key, value)
        assert len(attend.given) == 2
    torch.testing.assert_close(output, sdpa(query, key, value), rtol=0, atol=0)

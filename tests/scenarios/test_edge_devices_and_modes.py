"""EC-017 to EC-024: devices that are missing, mixed, old or virtual; capture, determinism, dropout, scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as sdpa

import layerzero_runtime as lz
from layerzero_runtime import device as devices
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device, forget_devices
from layerzero_runtime.errors import ContextError, DeviceError, NoKernelAvailableError
from tests.scenarios.conftest import (
    A100,
    FULL_KERNELS,
    H100,
    OLD_PC,
    Attend,
    assert_near,
    attention,
    beside_builtin,
    by_each_kernel,
    cpu_kernel,
    exact_attention,
    kernel,
    only,
    qkv,
    reasons,
)

pytestmark = pytest.mark.usefixtures("without_tables")

FULL = "attention.full"
FA2 = kernel("flash_attn.fa2", priority=150, min_sm=(8, 0))
FA3 = kernel("flash_attn.fa3", priority=200, min_sm=(9, 0))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA shows no device, also where this machine has one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    forget_devices()
    yield
    monkeypatch.undo()
    forget_devices()


@pytest.mark.scenario("EC-017")
@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do_and_auto_is_the_cpu() -> None:
    for name in ("cuda", "cuda:0", "cuda:3"):
        with pytest.raises(DeviceError, match=f"there is no device {name}: .*; .*use device cpu"):
            detect_device(name)
    assert detect_device("auto") is detect_device("cpu")
    assert detect_device().platform == "cpu"


@pytest.mark.scenario("EC-017")
@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_calls_without_a_device_get_a_kernel_for_the_cpu() -> None:
    with beside_builtin(kernel("mine.cuda", priority=500)):
        context = attention(device=None)
        assert lz.select(context).kernel_id == "torch.sdpa"
        assert "platform is 'cpu', required one of 'cuda'" in reasons(context, "mine.cuda")


@contextmanager
def described_tensors(device: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors that say they lie on a device, without one: torch's own fakes."""
    with FakeTensorMode():
        yield tuple(torch.empty(2, 4, 8, 64, dtype=torch.float16, device=device) for _ in range(3))


@pytest.mark.scenario("EC-017")
@pytest.mark.usefixtures("no_gpu")
def test_tensors_of_a_gpu_that_has_gone_are_named_in_the_error() -> None:
    with described_tensors("cuda:0") as parts, pytest.raises(DeviceError, match="there is no device cuda:0: "):
        SelectionContext.from_tensors(FULL, *parts)
    meta = [torch.empty(2, 4, 8, 64, device="meta")] * 3
    with pytest.raises(ContextError, match="device is 'meta', allowed: auto, cpu, cuda, cuda:N"):
        SelectionContext.from_tensors(FULL, *meta)


@pytest.mark.scenario("EC-018")
def test_the_device_of_the_tensors_decides_in_one_snapshot() -> None:
    """Contexts that differ in their device alone have plans of their own, whoever asks first."""
    on_a100, on_h100 = attention(device=A100), attention(device=H100)
    for order in ((on_a100, on_h100), (on_h100, on_a100)):
        with beside_builtin(FA2, FA3):
            for _ in range(2):
                served = {
                    plan.kernel_id: context.device for plan, context in zip(lz.select_batch(order), order, strict=True)
                }
                assert served == {"flash_attn.fa2": A100, "flash_attn.fa3": H100}


@pytest.mark.scenario("EC-018")
def test_each_tensors_own_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory of a machine with both stands in for the driver's."""
    inventory = (replace(A100, index=0), replace(H100, index=1))
    forget_devices()
    monkeypatch.setattr(devices, "_cuda_devices", lambda: inventory)
    try:
        with beside_builtin(FA2, FA3):
            for index, kernel_id in ((0, "flash_attn.fa2"), (1, "flash_attn.fa3")):
                with described_tensors(f"cuda:{index}") as parts:
                    context = SelectionContext.from_tensors(FULL, *parts)
                assert context.device is inventory[index]
                assert lz.select(context).kernel_id == kernel_id
        with (
            described_tensors("cuda:0") as first,
            described_tensors("cuda:1") as second,
            pytest.raises(ContextError, match="different devices: query cuda:0, key cuda:1, value cuda:0"),
        ):
            SelectionContext.from_tensors(FULL, first[0], second[1], first[2])
    finally:
        monkeypatch.undo()
        devices._cuda_device.cache_clear()


@pytest.mark.scenario("EC-019")
@pytest.mark.parametrize("instructions", ["sse", "generic"])
def test_an_old_cpu_is_served_by_kernels_without_special_instructions(instructions: str) -> None:
    old = replace(OLD_PC, instruction_set=instructions)
    vectors = cpu_kernel("mine.avx2", instruction_sets=("avx2", "avx512", "avx512_bf16", "amx_bf16"))
    with beside_builtin(vectors):
        assert lz.select(attention(device=old)).kernel_id == "torch.sdpa"
        refusal = f"INSTRUCTION_SET_NOT_ONE_OF: instruction_set is '{instructions}', required one of 'avx2'"
        assert refusal in reasons(attention(device=old), "mine.avx2")
        for operation, kernel_id in (("norm.rms", "torch.rms_norm"), ("mlp.swiglu", "torch.swiglu")):
            context = SelectionContext(operation=operation, dtype="float32", rows=4, hidden_size=64, device=old)
            assert lz.select(context).kernel_id == kernel_id


@pytest.mark.scenario("EC-019")
def test_code_for_instructions_that_this_cpu_lacks_is_never_run() -> None:
    own = detect_device("cpu").instruction_set
    other = "neon" if own not in ("neon", "neon_bf16", "sve", "sve_bf16") else "avx2"
    query, key, value = qkv()
    with beside_builtin(cpu_kernel("mine.foreign", instruction_sets=(other,))):
        assert_near(lz.attention(query, key, value), exact_attention(query, key, value))


VIRTUAL_A100 = DeviceSpec(
    "cuda", "GRID A100-10C", compute_capability=(8, 0), multiprocessors=108, memory_bytes=10 * 2**30
)


@pytest.mark.scenario("EC-020")
def test_a_virtual_gpu_selects_as_the_physical_one() -> None:
    with beside_builtin(FA2, FA3):
        virtual, physical = (lz.select(attention(device=device)) for device in (VIRTUAL_A100, A100))
        assert virtual.kernel_id == physical.kernel_id == "flash_attn.fa2"
        assert reasons(attention(device=VIRTUAL_A100), "flash_attn.fa3") == reasons(
            attention(device=A100), "flash_attn.fa3"
        )


@pytest.mark.scenario("EC-020")
def test_what_was_measured_on_the_physical_gpu_is_only_a_guess_for_a_virtual_one() -> None:
    assert VIRTUAL_A100.matches(A100) == A100.matches(VIRTUAL_A100) == "approximate"
    assert VIRTUAL_A100.matches(replace(VIRTUAL_A100, memory_bytes=20 * 2**30)) == "exact"
    assert VIRTUAL_A100.slug == "grid_a100_10c"


@pytest.mark.scenario("EC-020")
def test_the_little_memory_of_a_virtual_gpu_limits_the_workspace() -> None:
    with beside_builtin(FA2, kernel("mine.workspace", priority=300, workspace_bytes=8 * 2**30)):
        roomy = attention(device=VIRTUAL_A100, workspace_limit=8 * 2**30)
        narrow = replace(roomy, workspace_limit=2**30)
        assert lz.select(roomy).kernel_id == "mine.workspace"
        assert lz.select(narrow).kernel_id == "flash_attn.fa2"
        assert "workspace_limit is 1073741824, required >= 8589934592" in reasons(narrow, "mine.workspace")


@pytest.mark.scenario("EC-021")
def test_under_capture_kernels_that_may_be_captured_are_the_only_ones() -> None:
    unsafe, safe = kernel("mine.unsafe", priority=300, is_cuda_graph_safe=False), kernel("mine.safe", priority=150)
    captured = attention(is_cuda_graph_capturing=True)
    assert captured.mode == "graph"
    with beside_builtin(unsafe, safe):
        # In either order: an answer for one mode is none for the other.
        for context, kernel_id in ((attention(), "mine.unsafe"), (captured, "mine.safe"), (attention(), "mine.unsafe")):
            assert lz.select(context).kernel_id == kernel_id
        assert reasons(captured, "mine.unsafe") == "MODE_NOT_ONE_OF: mode is 'graph', required 'eager'"
        # Warm-up before a capture describes its calls so.
        assert lz.select(attention(mode="graph")).kernel_id == "mine.safe"
    with only(unsafe), pytest.raises(NoKernelAvailableError, match="mode is 'graph', required 'eager'"):
        lz.select(captured)


@contextmanager
def determinism() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.scenario("EC-022")
def test_where_determinism_is_required_only_deterministic_kernels_serve() -> None:
    with beside_builtin(kernel("mine.atomic", priority=300, deterministic=False)):
        assert lz.select(attention()).kernel_id == "mine.atomic"
        required = attention(requires_deterministic=True)
        assert lz.select(required).kernel_id == "torch.sdpa"
        refusal = "REQUIRES_DETERMINISTIC_NOT_ONE_OF: requires_deterministic is True, required False"
        assert reasons(required, "mine.atomic") == refusal


@pytest.mark.scenario("EC-022")
def test_torchs_switch_for_determinism_holds_at_the_next_call() -> None:
    attend = Attend()
    query, key, value = qkv()
    with beside_builtin(cpu_kernel("mine.atomic", attend, deterministic=False)):
        for _ in range(2):
            lz.attention(query, key, value)
        assert len(attend.given) == 2
        with determinism():
            first, second = lz.attention(query, key, value), lz.attention(query, key, value)
        assert len(attend.given) == 2
        lz.attention(query, key, value)
        assert len(attend.given) == 3
    assert torch.equal(first, second)
    assert_near(first, exact_attention(query, key, value))


@pytest.mark.scenario("EC-023")
def test_dropout_goes_to_a_kernel_that_has_it_and_draws_from_torchs_generator() -> None:
    attend = Attend()
    query, key, value = qkv(length=64)
    with beside_builtin(cpu_kernel("mine.no_dropout", attend)):
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            found = lz.attention(query, key, value, dropout_p=0.25)
            torch.manual_seed(seed)
            assert torch.equal(found, sdpa(query, key, value, dropout_p=0.25))
        assert not attend.given
        context = SelectionContext.from_tensors(FULL, query, key, value, None, 0.25)
        assert lz.select(context).kernel_id == "torch.sdpa"
        assert reasons(context, "mine.no_dropout") == "DROPOUT_P_NOT_ONE_OF: dropout_p is 0.25, required 0.0"
        # A quarter is dropped, the rest weighs more: the mean stays.
        mean = torch.stack([lz.attention(query, key, torch.ones_like(value), dropout_p=0.25) for _ in range(50)]).mean()
        assert float(mean) == pytest.approx(1.0, abs=0.05)
        lz.attention(query, key, value, dropout_p=0.0)
        assert len(attend.given) == 1


@pytest.mark.scenario("EC-023")
def test_only_the_kernels_that_have_dropout_take_it() -> None:
    query, key, value = qkv()
    assert by_each_kernel(FULL, lambda: lz.attention(query, key, value, dropout_p=0.1)).keys() == {"torch.sdpa"}
    with pytest.raises(ContextError, match=r"dropout_p is 1\.5, allowed is 0 to 1"):
        lz.attention(query, key, value, dropout_p=1.5)


@pytest.mark.scenario("EC-024")
def test_a_scale_of_the_callers_reaches_every_builtin_kernel() -> None:
    query, key, value = qkv()
    results = by_each_kernel(FULL, lambda: lz.attention(query, key, value, scale=0.6))
    assert results.keys() == FULL_KERNELS
    for result in results.values():
        assert_near(result, exact_attention(query, key, value, scale=0.6))


@pytest.mark.scenario("EC-024")
def test_a_kernel_without_a_scale_serves_the_usual_one_and_no_other() -> None:
    attend = Attend()
    query, key, value = qkv(width=64)
    with beside_builtin(cpu_kernel("mine.no_scale", attend, supports_scale=False)):
        other = lz.attention(query, key, value, scale=0.3)
        assert not attend.given
        context = SelectionContext.from_tensors(FULL, query, key, value, None, 0.0, 0.3)
        assert reasons(context, "mine.no_scale") == "SCALE_IS_USUAL_NOT_ONE_OF: scale_is_usual is False, required True"
        # 1/sqrt(64), given or not, is the usual scale.
        usual = [lz.attention(query, key, value, scale=scale) for scale in (None, 0.125)]
        assert len(attend.given) == 2
    assert_near(other, exact_attention(query, key, value, scale=0.3))
    for output in usual:
        assert_near(output, exact_attention(query, key, value))


@pytest.mark.scenario("EC-024")
def test_a_kernel_with_a_scale_gets_the_one_of_the_call_each_time() -> None:
    attend = Attend()
    query, key, value = qkv()
    with beside_builtin(cpu_kernel("mine.scale", attend)):
        for scale in (0.3, 2.0, None, 0.3):
            lz.attention(query, key, value, scale=scale)
    assert attend.scales == [0.3, 2.0, None, 0.3]

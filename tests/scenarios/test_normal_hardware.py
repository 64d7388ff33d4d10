"""NO-024 to NO-031: described devices with kernels declared for them, and what this machine's CPU really runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import layerzero_runtime as lz
from layerzero_runtime import libraries
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.errors import NoKernelAvailableError
from tests.scenarios.conftest import (
    A100,
    GAUDI,
    GRAVITON,
    H100,
    L40,
    M2,
    MI300X,
    OLD_PC,
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

FA2 = kernel("flash_attn.fa2", priority=150, min_sm=(8, 0))
FA3 = kernel("flash_attn.fa3", priority=200, min_sm=(9, 0), max_sm=(9, 0))
AVX512 = kernel("mine.avx512", platforms=("cpu",), priority=150, instruction_sets=("avx512", "avx512_bf16", "amx_bf16"))
NEON = kernel("mine.neon", platforms=("cpu",), priority=150, instruction_sets=("neon", "neon_bf16", "sve", "sve_bf16"))


@pytest.mark.scenario("NO-024")
def test_on_an_a100_the_kernel_for_ampere_wins_and_hoppers_is_refused() -> None:
    with beside_builtin(FA2, FA3):
        assert lz.select(attention(device=A100)).kernel_id == "flash_attn.fa2"
        assert reasons(attention(device=A100), "flash_attn.fa3") == "SM_NOT_AT_LEAST: sm is (8, 0), required >= (9, 0)"


@pytest.mark.scenario("NO-025")
def test_on_an_h100_the_kernel_for_hopper_wins() -> None:
    with beside_builtin(FA2, FA3):
        plan = lz.select(attention(device=H100))
        assert (plan.kernel_id, plan.available) == ("flash_attn.fa3", True)
        assert reasons(attention(device=H100), "flash_attn.fa2") == ""


@pytest.fixture
def absent_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a probe for a library that is not installed."""
    monkeypatch.setitem(libraries._PROBES, "fa3", lambda: "flash_attn_3 is not installed: pip install flash-attn-3")
    libraries.missing_requirement.cache_clear()
    yield "fa3"
    libraries.missing_requirement.cache_clear()


@pytest.mark.scenario("NO-025")
def test_on_an_h100_without_its_library_the_kernel_before_it_serves(absent_library: str) -> None:
    missing = kernel("flash_attn.fa3", priority=200, min_sm=(9, 0), requires=(absent_library,))
    with beside_builtin(FA2, missing):
        assert lz.select(attention(device=H100)).kernel_id == "flash_attn.fa2"
        assert reasons(attention(device=H100), "flash_attn.fa3").startswith(
            "flash_attn_3 is not installed: pip install"
        )
    with only(missing):
        plan = lz.select(attention(device=H100))
        assert (plan.kernel_id, plan.available) == ("flash_attn.fa3", False)
        assert plan.unavailable_reason == "flash_attn_3 is not installed: pip install flash-attn-3"


@pytest.mark.scenario("NO-025")
def test_a_library_that_is_too_old_counts_as_missing() -> None:
    newer = kernel("torch.newer", priority=200, min_version="99.1")
    with beside_builtin(FA2, newer):
        assert lz.select(attention()).kernel_id == "flash_attn.fa2"
        assert "required at least 99.1" in reasons(attention(), "torch.newer")


@pytest.mark.scenario("NO-026")
def test_on_an_l40_the_kernel_for_ada_wins_and_amperes_serves_without_it() -> None:
    ada = kernel("mine.ada", priority=180, min_sm=(8, 9), max_sm=(8, 9))
    up_to_ampere = kernel("mine.up_to_ampere", priority=300, min_sm=(8, 0), max_sm=(8, 6))
    context = attention(device=L40)
    with beside_builtin(FA2, FA3, ada, up_to_ampere):
        assert lz.select(context).kernel_id == "mine.ada"
        assert reasons(context, "mine.up_to_ampere") == "SM_NOT_AT_MOST: sm is (8, 9), required <= (8, 6)"
        assert lz.select(attention(device=A100)).kernel_id == "mine.up_to_ampere"
    with beside_builtin(FA2, FA3, up_to_ampere):
        assert lz.select(context).kernel_id == "flash_attn.fa2"


@pytest.mark.parametrize(
    ("device", "kernel_id"),
    [
        pytest.param(MI300X, "aotriton.attention", marks=pytest.mark.scenario("NO-027")),
        pytest.param(GAUDI, "gaudi.attention", marks=pytest.mark.scenario("NO-028")),
        pytest.param(M2, "metal.attention", marks=pytest.mark.scenario("NO-031")),
    ],
)
def test_a_platforms_own_kernel_serves_it_and_without_one_the_error_says_so(device: DeviceSpec, kernel_id: str) -> None:
    context = attention(device=device)
    with beside_builtin(FA2, kernel(kernel_id, platforms=(device.platform,), priority=10)):
        assert lz.select(context).kernel_id == kernel_id
        platform = f"PLATFORM_NOT_ONE_OF: platform is '{device.platform}', required one of 'cuda', None"
        assert platform in reasons(context, "flash_attn.fa2")
        # It is no candidate elsewhere.
        assert lz.select(attention(device=H100)).kernel_id == "flash_attn.fa2"
        assert "PLATFORM_NOT_ONE_OF: platform is 'cuda'" in reasons(attention(device=H100), kernel_id)
    with beside_builtin(FA2), pytest.raises(NoKernelAvailableError) as error:
        lz.select(context)
    assert set(error.value.rejections) >= {"flash_attn.fa2", "torch.sdpa", "torch.matmul"}
    assert all(found[0].startswith("PLATFORM_NOT_ONE_OF") for found in error.value.rejections.values())


@pytest.mark.scenario("NO-027")
def test_a_virtual_function_of_an_mi300x_is_the_same_product() -> None:
    virtual = replace(MI300X, name="AMD Instinct MI300X VF")
    assert (virtual.matches(MI300X), virtual.slug) == ("exact", MI300X.slug)
    with beside_builtin(kernel("ck.attention", platforms=("rocm",))):
        assert lz.select(attention(device=virtual)).kernel_id == "ck.attention"


@pytest.mark.scenario("NO-028")
@pytest.mark.scenario("NO-031")
@pytest.mark.parametrize("device", [GAUDI, M2])
def test_what_a_platform_has_no_kernel_for_is_answered_on_the_cpu(device: DeviceSpec) -> None:
    """A kernel for attention alone: a norm there is refused with reasons; on a CPU the same call is served."""
    with beside_builtin(kernel("mine.attention", platforms=(device.platform,))):
        with pytest.raises(NoKernelAvailableError, match=f"platform is '{device.platform}'"):
            lz.select(norm(device=device))
        assert lz.select(norm(device=XEON)).kernel_id == "torch.rms_norm"


@pytest.mark.scenario("NO-028")
@pytest.mark.scenario("NO-031")
def test_tensors_of_a_device_that_cannot_be_described_go_to_torchs_own_function() -> None:
    """torch's "meta" device stands for one that LayerZero cannot detect."""
    query, key, value = (torch.empty(2, 4, 8, 16, device="meta") for _ in range(3))
    before = lz.stats()
    with beside_builtin(cpu_kernel("mine.cpu")):
        output = lz.attention(query, key, value)
    assert (output.shape, output.device.type) == ((2, 4, 8, 16), "meta")
    after = lz.stats()
    assert after["other_devices"] == before.get("other_devices", 0) + 1


@pytest.mark.scenario("NO-029")
def test_on_a_xeon_the_kernel_for_avx512_wins() -> None:
    with beside_builtin(AVX512, NEON):
        assert lz.select(attention(device=XEON)).kernel_id == "mine.avx512"
        refusal = reasons(attention(device=XEON), "mine.neon")
        assert "INSTRUCTION_SET_NOT_ONE_OF: instruction_set is 'avx512_bf16', required one of 'neon'" in refusal
        assert lz.select(attention(device=OLD_PC)).kernel_id == "torch.sdpa"


@pytest.mark.scenario("NO-029")
def test_on_this_cpu_the_kernel_for_its_instructions_really_runs() -> None:
    own = detect_device("cpu").instruction_set
    if own == "generic":
        pytest.skip("this processor's instruction set is not known")
    attend = Attend()
    query, key, value = qkv()
    with beside_builtin(cpu_kernel("mine.own", attend, instruction_sets=(own,))):
        output = lz.attention(query, key, value)
    assert len(attend.given) == 1
    assert_near(output, exact_attention(query, key, value))


@pytest.mark.scenario("NO-029")
@pytest.mark.scenario("NO-030")
def test_without_special_kernels_every_cpu_is_served_by_torch_on_the_same_terms() -> None:
    query, key, value = qkv()
    for device in (XEON, GRAVITON, OLD_PC):
        context = SelectionContext.from_tensors("attention.full", query, key, value).with_device(device)
        assert lz.select(context).kernel_id == "torch.sdpa"
    torch.testing.assert_close(lz.attention(query, key, value), sdpa(query, key, value), rtol=0, atol=0)


@pytest.mark.scenario("NO-030")
def test_on_a_graviton_the_kernel_for_neon_wins_and_that_for_x86_is_refused() -> None:
    with beside_builtin(AVX512, NEON):
        assert lz.select(attention(device=GRAVITON)).kernel_id == "mine.neon"
        assert "instruction_set is 'sve_bf16', required one of 'avx512'" in reasons(
            attention(device=GRAVITON), "mine.avx512"
        )

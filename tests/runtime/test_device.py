"""Descriptions of devices: values, names, matching."""

from __future__ import annotations

import copy
import importlib.util
import json
import keyword
import math
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.device import ALIASES, PLATFORMS, DeviceSpec
from layerzero_runtime.devices.cpu import INSTRUCTION_SETS
from layerzero_runtime.errors import ContextError, ContextTypeError, LayerZeroError

EPYC = DeviceSpec("cpu", "AMD EPYC", "avx512_bf16", physical_cores=2, threads=2)
H100 = DeviceSpec(
    "cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132, bandwidth_bytes_per_s=3.35e12
)
H200 = DeviceSpec("cuda", "NVIDIA H200", compute_capability=(9, 0), multiprocessors=132, bandwidth_bytes_per_s=4.8e12)
H100_PCIE = DeviceSpec(
    "cuda", "NVIDIA H100 PCIe", compute_capability=(9, 0), multiprocessors=114, bandwidth_bytes_per_s=2.04e12
)
A100 = DeviceSpec("cuda", "NVIDIA A100-SXM4-40GB", compute_capability=(8, 0), multiprocessors=108)
MI300X = DeviceSpec("rocm", "AMD Instinct MI300X", compute_capability=(9, 4), multiprocessors=304)

COUNTS = st.none() | st.integers(1, 2**40)
DEVICES = st.builds(
    DeviceSpec,
    platform=st.sampled_from(PLATFORMS),
    name=st.sampled_from([*ALIASES, *ALIASES.values(), "AMD EPYC", "class", "3090", "X-1"])
    | st.text(max_size=30).map(lambda text: f"a{text}"),
    instruction_set=st.sampled_from(["", *(name for name, _ in INSTRUCTION_SETS)]),
    physical_cores=st.none() | st.integers(1, 4),
    threads=st.none() | st.integers(1, 4),
    compute_capability=st.none() | st.tuples(st.integers(7, 9), st.integers(0, 9)),
    multiprocessors=COUNTS,
    memory_bytes=COUNTS,
    bandwidth_bytes_per_s=st.none() | st.floats(1.0, 1e14),
    l2_bytes=COUNTS,
    index=st.none() | st.integers(0, 7),
)


def variant(device: DeviceSpec, **changes: Any) -> DeviceSpec:
    return DeviceSpec.from_dict({**device.to_dict(), **changes})


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        (EPYC, EPYC, "exact"),
        (EPYC, variant(EPYC, physical_cores=4), "approximate"),
        (EPYC, variant(EPYC, threads=1), "approximate"),
        (EPYC, variant(EPYC, name="AMD EPYC 9654 96-Core Processor"), "approximate"),
        (EPYC, variant(EPYC, instruction_set="avx2"), None),
        (variant(EPYC, instruction_set=""), variant(EPYC, instruction_set="", threads=1), None),
        (EPYC, H100, None),
        (H100, variant(H100, memory_bytes=1, multiprocessors=114), "exact"),
        (H100, H100_PCIE, "approximate"),
        (H100, H200, "approximate"),
        (H100, A100, None),
        (A100, DeviceSpec("cuda", "NVIDIA A10", compute_capability=(8, 6)), "approximate"),
        (A100, DeviceSpec("cuda", "A100-SXM4-40GB"), "exact"),
        (DeviceSpec("cuda", "A100-SXM4-40GB"), DeviceSpec("cuda", "NVIDIA A100-PG509-200"), "exact"),
        (MI300X, DeviceSpec("rocm", "AMD Instinct MI300X VF"), "exact"),
        (MI300X, variant(H100, compute_capability=[9, 4]), None),
        (H100, DeviceSpec("cuda", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", compute_capability=(9, 0)), "approximate"),
        (H100, DeviceSpec("cuda", "NVIDIA X"), None),
        (DeviceSpec("mps", "Apple M2"), DeviceSpec("mps", "Apple M3"), None),
        (DeviceSpec("hpu", "Gaudi2"), DeviceSpec("hpu", "Gaudi2"), "exact"),
    ],
)
def test_matching(one: DeviceSpec, other: DeviceSpec, match: str | None) -> None:
    assert one.matches(other) == match
    assert other.matches(one) == match


@given(DEVICES, DEVICES)
def test_matching_is_reflexive_and_symmetric(one: DeviceSpec, other: DeviceSpec) -> None:
    assert one.matches(one) == "exact"
    assert one.matches(other) == other.matches(one)


@given(DEVICES, DEVICES)
def test_what_matches_exactly_has_one_slug(one: DeviceSpec, other: DeviceSpec) -> None:
    """A table is looked for in the folder that the slug names."""
    if one.matches(other) == "exact":
        assert one.slug == other.slug


def test_index_is_no_part_of_the_product() -> None:
    first, second = DeviceSpec("cuda", "NVIDIA H200", index=0), DeviceSpec("cuda", "NVIDIA H200", index=1)
    assert first == second
    assert hash(first) == hash(second)
    assert first.to_dict() == second.to_dict()


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        (EPYC, "cpu_amd_epyc_avx512_bf16_2c_2t"),
        (DeviceSpec("cpu", "Intel(R) Xeon(R) CPU @ 2.20GHz", "avx2"), "cpu_intel_r_xeon_r_cpu_2_20ghz_avx2"),
        (H100, "nvidia_h100_80gb_hbm3"),
        (DeviceSpec("cuda", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"), "nvidia_a100_sxm4_40gb_mig_1g_5gb"),
        (MI300X, "amd_instinct_mi300x"),
        (DeviceSpec("cuda", "3090"), "cuda_3090"),
        (DeviceSpec("mps", "class"), "mps_class"),
        (DeviceSpec("cuda", "  Ünï — GPU  "), "n_gpu"),
    ],
)
def test_slugs(device: DeviceSpec, slug: str) -> None:
    assert device.slug == slug


@given(DEVICES)
def test_a_slug_names_a_module(device: DeviceSpec) -> None:
    slug = device.slug
    assert slug.isascii()
    assert slug.isidentifier()
    assert slug == slug.lower()
    assert not keyword.iskeyword(slug)
    assert importlib.util.resolve_name(f".{slug}", "layerzero_tables") == f"layerzero_tables.{slug}"


@given(DEVICES)
def test_dictionaries_survive_json(device: DeviceSpec) -> None:
    values = device.to_dict()
    assert None not in values.values()
    assert "" not in values.values()
    assert DeviceSpec.from_dict(json.loads(json.dumps(values))) == device


def test_the_dictionary_of_a_device() -> None:
    assert EPYC.to_dict() == {
        "platform": "cpu", "name": "AMD EPYC", "instruction_set": "avx512_bf16", "physical_cores": 2, "threads": 2,
    }  # fmt: skip
    assert H200.to_dict()["compute_capability"] == [9, 0]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"platform": "cpu"}, ContextError, "lacks name"),
        ({}, ContextError, "lacks platform and name"),
        ({"platform": "cpu", "name": "x", "cores": 2}, ContextError, "unknown fields cores; allowed: platform"),
        ({"platform": "cpu", "name": "x", "index": 0}, ContextError, "unknown fields index"),
        ({"platform": "tpu", "name": "x"}, ContextError, "'tpu', allowed: cpu, cuda, rocm, hpu, mps"),
        ({"platform": 1, "name": "x"}, ContextTypeError, "platform must be a string"),
        ({"platform": "cpu", "name": None}, ContextTypeError, "name must be a string"),
        ({"platform": "cpu", "name": ""}, ContextError, "letters or digits"),
        ({"platform": "cpu", "name": "—"}, ContextError, "letters or digits"),
        ({"platform": "cpu", "name": "x" * 200}, ContextError, "160 at most"),
        ({"platform": "cpu", "name": "x", "instruction_set": None}, ContextTypeError, "instruction_set must be"),
        ({"platform": "cpu", "name": "x", "threads": 0}, ContextError, "threads is 0, required at least 1"),
        ({"platform": "cpu", "name": "x", "physical_cores": -1}, ContextError, "physical_cores is -1"),
        ({"platform": "cpu", "name": "x", "threads": 2.0}, ContextTypeError, "threads must be an integer, not 2.0"),
        ({"platform": "cpu", "name": "x", "threads": True}, ContextTypeError, "threads must be an integer"),
        ({"platform": "cuda", "name": "x", "multiprocessors": "132"}, ContextTypeError, "multiprocessors"),
        ({"platform": "cuda", "name": "x", "l2_bytes": 0}, ContextError, "l2_bytes"),
        ({"platform": "cuda", "name": "x", "memory_bytes": 0}, ContextError, "memory_bytes"),
        ({"platform": "cuda", "name": "x", "bandwidth_bytes_per_s": 0}, ContextError, "positive finite"),
        ({"platform": "cuda", "name": "x", "bandwidth_bytes_per_s": math.nan}, ContextError, "positive finite"),
        ({"platform": "cuda", "name": "x", "bandwidth_bytes_per_s": math.inf}, ContextError, "positive finite"),
        ({"platform": "cuda", "name": "x", "bandwidth_bytes_per_s": "1"}, ContextTypeError, "must be a number"),
        ({"platform": "cuda", "name": "x", "compute_capability": 90}, ContextTypeError, "two integers"),
        ({"platform": "cuda", "name": "x", "compute_capability": [9]}, ContextTypeError, "two integers"),
        ({"platform": "cuda", "name": "x", "compute_capability": [9, "0"]}, ContextTypeError, "two integers"),
        ({"platform": "cuda", "name": "x", "compute_capability": "90"}, ContextTypeError, "two integers"),
        ({"platform": "cuda", "name": "x", "compute_capability": [9, -1]}, ContextError, "from 0 on"),
    ],
)
def test_values_that_are_not_allowed(values: dict[str, Any], error: type[LayerZeroError], message: str) -> None:
    with pytest.raises(error, match="device") as caught:
        DeviceSpec.from_dict(values)
    assert message in str(caught.value)


def test_index_must_be_one() -> None:
    with pytest.raises(ContextError, match="index is -1"):
        DeviceSpec("cuda", "x", index=-1)


def test_distance_ranks_by_size() -> None:
    assert H100.distance(H100) == 0
    assert H100.distance(H200) < H100.distance(H100_PCIE)
    assert EPYC.distance(variant(EPYC, physical_cores=4, threads=4)) == pytest.approx(2 * math.log(2))
    assert EPYC.distance(variant(EPYC, threads=1)) == pytest.approx(math.log(2))
    # Unknown on the other side counts as a factor of two; unknown on this side ranks nobody.
    assert H200.distance(DeviceSpec("cuda", "X", multiprocessors=132)) == pytest.approx(math.log(2))
    assert DeviceSpec("cuda", "X").distance(H100) == 0


@given(DEVICES, DEVICES)
def test_distance_is_a_size(one: DeviceSpec, other: DeviceSpec) -> None:
    assert 0 <= one.distance(other) < math.inf
    assert one.distance(one) == 0


def test_copies_and_pickles_are_found_by_hash() -> None:
    assert {H100: 1}[copy.deepcopy(H100)] == 1
    code = "import pickle, sys; device, known = pickle.load(sys.stdin.buffer); print(known[device], device.index)"
    device = DeviceSpec("cuda", "NVIDIA H200", compute_capability=(9, 0), index=3)
    for seed in ("1", "2"):
        completed = subprocess.run(
            [sys.executable, "-c", f"from layerzero_runtime.device import DeviceSpec\n{code}"],
            input=pickle.dumps((device, {copy.copy(device): "found"})),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert completed.stdout.split() == [b"found", b"3"]

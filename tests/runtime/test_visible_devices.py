"""CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER over described GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.devices.nvml import Gpu
from layerzero_runtime.devices.visible_devices import visible_gpus

A = Gpu(name="A", uuid="GPU-4d8a22f6-e8e8-86e5-4b1a-d8fc31360a40", multiprocessors=132, max_clock_mhz=1980)
B = Gpu(name="B", uuid="GPU-4d8a0000-e8e8-86e5-4b1a-d8fc31360a41", multiprocessors=132, max_clock_mhz=1980)
C = Gpu(name="C", uuid="GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6", multiprocessors=132, max_clock_mhz=1980)
THREE = (A, B, C)

MIG_1 = Gpu(name="H MIG 3g.40gb", uuid="MIG-1d11a5f4-0000-5c1d-9a0d-1e4b7f0c1a01")
MIG_2 = Gpu(name="H MIG 1g.10gb", uuid="MIG-1d11a5f4-1111-5c1d-9a0d-1e4b7f0c1a02")
OLD_MIG = Gpu(name="H MIG 1g.5gb", uuid="MIG-GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6/7/0")
OLD_MIG_2 = Gpu(name="H MIG 1g.5gb", uuid="MIG-GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6/8/0")
DIVIDED = Gpu(name="H", uuid="GPU-11111111-0000-0000-0000-000000000000", mig_enabled=True, mig_devices=(MIG_1, MIG_2))
EMPTY = Gpu(name="H", uuid="GPU-22222222-0000-0000-0000-000000000000", mig_enabled=True)
OLD_DIVIDED = Gpu(
    name="H", uuid="GPU-33333333-0000-0000-0000-000000000000", mig_enabled=True, mig_devices=(OLD_MIG, OLD_MIG_2)
)


def names(visible: str | None, gpus: tuple[Gpu, ...] = THREE, order: str | None = "PCI_BUS_ID") -> str:
    return " ".join(gpu.name for gpu in visible_gpus(gpus, visible, order))


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, "A B C"),
        ("", ""),
        (" ", ""),
        ("-1", ""),
        ("0", "A"),
        ("2,1", "C B"),
        ("2,0,1", "C A B"),
        ("0,2,-1,1", "A C"),
        ("0,3,1", "A"),
        ("3", ""),
        ("3,0", ""),
        ("-1,0", ""),
        (",0", ""),
        ("0,,1", "A"),
        ("0,", "A"),
        ("NoDevFiles", ""),
        ("all", ""),
        ("none", ""),
        (" 1, 2", "B C"),
        ("1gpu2,2ampere", "B C"),
        ("0x1", "A"),
        ("+1", "B"),
        ("-0", "A"),
        ("01", "B"),
        ("1;2", "B"),
        ("99999999999999999999", ""),
        ("9" * 5000, ""),
        # A device named twice leaves none, unless an invalid entry ends the list before.
        ("0,0", ""),
        ("1,0,1", ""),
        ("0,5,0", "A"),
        ("0,5,5", "A"),
        ("0,GPU-9fb4", "A"),
    ],
)
def test_indices(visible: str | None, seen: str) -> None:
    assert names(visible) == seen


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (A.uuid, "A"),
        (f"{C.uuid},{A.uuid}", "C A"),
        ("GPU-9", "C"),
        ("GPU-9fb42d6f", "C"),
        ("GPU-4d8a2,GPU-9fb", "A C"),
        ("GPU-4d8a", ""),  # two have it
        ("GPU-9fb,GPU-4d8a,GPU-4d8a2", "C"),
        ("GPU-", ""),
        ("GPU", ""),
        (A.uuid[4:], ""),  # without the prefix it is an index, and "4" is none
        ("GPU-zzz", ""),
        (f"GPU-zzz,{A.uuid}", ""),
        (f"{A.uuid},GPU-zzz,{B.uuid}", "A"),
        (f"{A.uuid},{A.uuid}", ""),
        ("GPU-9fb4,GPU-9fb", ""),
        (f"{A.uuid},0", "A"),
        ("GPU-" + A.uuid[4:].upper(), "A"),
        (A.uuid.lower(), ""),
        (" " + A.uuid, ""),
        (A.uuid + " ", "A"),
        (A.uuid + "x", "A"),
        (f"{A.uuid}, {B.uuid}", "A"),
        (f"{A.uuid},MIG-1d11a5f4-0", "A"),
    ],
)
def test_uuids(visible: str, seen: str) -> None:
    assert names(visible) == seen


@pytest.mark.parametrize(
    ("gpus", "visible", "seen"),
    [
        ((DIVIDED,), None, "H MIG 3g.40gb"),
        ((A, DIVIDED), None, "H MIG 3g.40gb"),  # beside a MIG device no other GPU is seen
        ((A, EMPTY), None, "A"),
        ((EMPTY,), None, ""),
        ((A, DIVIDED), "0", "A"),
        ((A, DIVIDED), "1", "H MIG 3g.40gb"),
        ((A, DIVIDED), "GPU-111", "H MIG 3g.40gb"),
        ((A, DIVIDED), MIG_2.uuid, "H MIG 1g.10gb"),
        ((A, DIVIDED), f"{MIG_2.uuid},{MIG_1.uuid}", "H MIG 1g.10gb"),
        ((A, DIVIDED), "MIG-1d11a5f4-1", "H MIG 1g.10gb"),
        ((A, DIVIDED), "MIG-1d11a5f4", ""),
        ((A, DIVIDED), "MIG-", ""),
        ((A,), MIG_1.uuid, ""),
        ((A, OLD_DIVIDED), OLD_MIG.uuid, "H MIG 1g.5gb"),
        ((A, OLD_DIVIDED), "MIG-GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6/9/0", ""),
        ((A, OLD_DIVIDED), "MIG-GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6", ""),  # two have it
    ],
)
def test_mig(gpus: tuple[Gpu, ...], visible: str | None, seen: str) -> None:
    assert names(visible, gpus) == seen


def test_order() -> None:
    small = Gpu(name="small", uuid="GPU-5", multiprocessors=46, max_clock_mhz=1800)
    large = Gpu(name="large", uuid="GPU-6", multiprocessors=108, max_clock_mhz=1410)
    assert names(None, (small, large), "PCI_BUS_ID") == "small large"
    assert names(None, (small, large), "FASTEST_FIRST") == "large small"
    assert names(None, (small, large), None) == "large small"
    assert names("0", (small, large), None) == "large"
    assert names("GPU-5", (small, large), None) == "small"


def test_equal_products_stay_in_pci_order() -> None:
    assert names(None, THREE, None) == "A B C"
    unknown = tuple(Gpu(name=name, uuid=f"GPU-{name}") for name in "XYZ")
    assert names(None, unknown, None) == "X Y Z"


ENTRIES = st.sampled_from(
    ["0", "1", "2", "3", "-1", "", " 1", "x", "GPU-9", "GPU-4d8a", A.uuid, "MIG-1d11a5f4-0", "MIG"]
)


@given(
    st.lists(ENTRIES | st.text(max_size=5), max_size=5).map(",".join), st.sampled_from([THREE, (), (A, DIVIDED, EMPTY)])
)
def test_whatever_the_variable_says(visible: str, gpus: tuple[Gpu, ...]) -> None:
    """No device appears twice, no value shows more than there is, and a divided GPU never appears whole."""
    seen = visible_gpus(gpus, visible, None)
    assert len(set(seen)) == len(seen)
    devices = {*gpus, *(device for gpu in gpus for device in gpu.mig_devices)}
    assert set(seen) <= {device for device in devices if not device.mig_enabled}


@given(st.lists(st.integers(-1, 4), max_size=5))
def test_what_follows_an_invalid_index_does_not_matter(indices: list[int]) -> None:
    visible = ",".join(map(str, indices))
    assert visible_gpus(THREE, f"{visible},7,0,1" if indices else "7,0", None) == (
        visible_gpus(THREE, visible, None) if indices else ()
    )

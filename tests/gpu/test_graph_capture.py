"""Calls under capture of a CUDA graph: prepared plans are captured and replay rightly, nothing else is tried there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.serving.execution import current_mode
from layerzero_runtime.serving.published import PUBLISHED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SPEC: dict[str, Any] = {
    "operations": ("norm.rms",),
    "platforms": ("cuda",),
    "dtypes": ("bfloat16",),
    "library": "test",
    "requires": (),
    "priority": 500,
}


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.fixture
def kernel() -> Iterator[list[str]]:
    """A registered kernel that notes when it is called from Python."""
    called: list[str] = []

    def noted(*arguments: Any) -> torch.Tensor:
        called.append(current_mode())
        return norm(*arguments)

    lz.register_kernel(lz.KernelSpec(kernel_id="test.noted", **SPEC), noted)
    yield called
    lz.unregister_kernel("test.noted")


def captured(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = lz.rms_norm(x, weight)
    return graph, output


def changed(before: dict[str, int], name: str) -> int:
    return lz.stats().get(name, 0) - before.get(name, 0)


def test_only_prepared_plans_are_captured_and_they_replay_rightly(kernel: list[str]) -> None:
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    before = lz.stats()
    with torch.inference_mode():
        graph, output = captured(x, weight)
        assert kernel == [], "not prepared: the default is captured"
        assert changed(before, "unprepared") == 1
        context = lz.SelectionContext.from_tensors("norm.rms", x, weight, mode="graph")
        assert lz.warmup([context])[0].kernel_id == "test.noted"
        kernel.clear()
        before = lz.stats()
        graph, output = captured(x, weight)
        assert kernel == ["graph"]
        assert changed(before, "unprepared") == 0
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(output, norm(x, weight, 1e-6, 0.0))
    assert PUBLISHED.special == 0
    assert current_mode() == "eager"


def test_an_error_under_capture_is_raised_and_breaks_nothing() -> None:
    def failing(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if current_mode() == "graph" and torch.cuda.is_current_stream_capturing():
            raise ValueError("this kernel allocates")
        return norm(x, *rest)

    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    lz.register_kernel(lz.KernelSpec(kernel_id="test.failing", **SPEC), failing)
    try:
        lz.warmup([lz.SelectionContext.from_tensors("norm.rms", x, weight, mode="graph")])
        with torch.inference_mode(), pytest.raises(ValueError, match="this kernel allocates"):
            captured(x, weight)
        assert "test.failing" not in lz.stats().broken
    finally:
        lz.unregister_kernel("test.failing")
    assert PUBLISHED.special == 0
    torch.testing.assert_close(lz.rms_norm(x, weight), norm(x, weight, 1e-6, 0.0))


def test_calls_on_the_gpu_agree_with_torch_and_the_card_is_described() -> None:
    from layerzero_runtime.device import detect_device

    query = torch.randn(2, 8, 128, 64, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(lz.attention(query, query, query, is_causal=True), expected)
    device = detect_device("cuda")
    assert device.compute_capability == torch.cuda.get_device_capability()
    assert device.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    assert set(lz.stats().throttled) <= {0}

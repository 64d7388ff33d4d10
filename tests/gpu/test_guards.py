"""Guards on CUDA tensors: calls alike are served by themselves, others are seen to differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.calls import attention as attention_module
from layerzero_runtime.calls import guards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations of calls of attention that were described."""
    found: list[str] = []
    serve: Callable[..., Any] = vars(attention_module)["serve"]

    def noted(snapshot: Any, operation: Any, *rest: Any) -> Any:
        found.append(operation.name)
        return serve(snapshot, operation, *rest)

    monkeypatch.setattr(attention_module, "serve", noted)
    return found


def test_this_torch_has_the_guards_and_cuda_tensors_are_told_apart(described: list[str]) -> None:
    assert guards._native_guards() is not None
    query, key, value = (torch.randn(2, 8, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for _ in range(10):
        torch.testing.assert_close(lz.attention(query, key, value), expected)
    assert described == ["attention.full"]
    longer, longer_key, longer_value = (torch.cat([part, part], dim=2) for part in (query, key, value))
    lz.attention(longer, longer_key, longer_value)
    assert described == ["attention.full"]
    with torch.autocast("cuda", dtype=torch.float16):
        assert lz.attention(query, key, value).dtype == torch.float16
    assert described == ["attention.full"] * 2
    with pytest.raises(ValueError, match="different devices"):
        lz.attention(query, key.cpu(), value)
    for part in (query, key, value):
        part.requires_grad_()
        assert lz.attention(query, key, value).requires_grad
        part.requires_grad_(False)
    assert described == ["attention.full"] * 6
    lz.attention(query, key, value)
    assert described == ["attention.full"] * 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_is_another_kind(described: list[str]) -> None:
    query = torch.randn(2, 8, 64, 64, device="cuda:0", dtype=torch.bfloat16)
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        there = query.to(device, copy=True)
        output = lz.attention(there, there.clone(), there.clone())
        assert output.device == torch.device(device)
    assert described == ["attention.full"] * 2

"""A decode step of grouped-query attention and a norm, dispatched through the table."""

import torch

import layerzero_runtime as lz

# A script may wait for a kernel that compiles; a server prepares with lz.warmup(contexts) instead.
lz.preparation("on_first_use")

torch.manual_seed(0)
query = torch.randn(2, 32, 1, 64, dtype=torch.bfloat16)
key, value = (torch.randn(2, 8, 400, 64, dtype=torch.bfloat16) for _ in range(2))
ours = lz.attention(query, key, value, enable_gqa=True)
torchs = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
print("attention agrees with torch:", torch.allclose(ours, torchs, atol=2e-2))

context = lz.SelectionContext.from_tensors("attention.cross", query, key, value)
print("served by:", lz.select(context).kernel_id)

hidden, weight = torch.randn(64, 4096), torch.ones(4096)
normed = lz.rms_norm(hidden, weight)
print(
    "norm agrees with torch:",
    torch.allclose(normed, torch.nn.functional.rms_norm(hidden, (4096,), weight, 1e-6), atol=1e-5),
)
print({name: count for name, count in lz.stats().items() if name in ("calls", "hits", "misses")})

"""Attention of few queries over many keys in Triton: keys split between programs, heads of a group in one tile."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.triton_device import ITEM_BYTES, multiprocessors, shared_bytes
from layerzero_runtime.kernels.triton_launch import TritonForm
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

# More queries would read the keys more often than kernels made for many.
_MAX_QUERIES = 64
# Beside the output, results of the splits: never more, with fewer splits where they would be.
_WORKSPACE_BYTES = 64 * 2**20
# Splits that `combine_splits` reads at a time.
_COMBINED_SPLITS = 16


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    from layerzero_runtime.kernels.triton_sources.attention import attend_to_splits, combine_splits

    width, group = context.head_dim, context.gqa_group
    assert width and group
    dtype = getattr(torch, context.dtype)
    padded_width = _padded(width)
    usual_scale = 1.0 / math.sqrt(width)
    choices = []
    for chosen in (configuration,) if configuration else _defaults(context):
        form = TritonForm(
            attend_to_splits,
            pointers=(dtype, dtype, dtype, dtype, torch.float32),
            divisible=9,
            numbers=(int, int, int, int, int, int, float),
            constants={
                "GROUP": group,
                "WIDTH": width,
                "IS_CAUSAL": context.is_causal,
                "ROWS": chosen["rows_per_program"],
                "KEYS": chosen["block_keys"],
                "PADDED_WIDTH": padded_width,
                "PRECISION": "ieee" if context.dtype == "float32" else "tf32",
            },
            num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"],
        )
        wanted = chosen["programs_per_multiprocessor"] * multiprocessors(context)
        choices.append((chosen["rows_per_program"], chosen["block_keys"], wanted, form.launcher(context)))
    combine = TritonForm(
        combine_splits,
        pointers=(torch.float32, dtype),
        divisible=0,
        numbers=(int, int, int),
        constants={"GROUP": group, "WIDTH": width, "PADDED_WIDTH": padded_width, "SPLITS": _COMBINED_SPLITS},
        num_warps=4,
    ).launcher(context)
    row_bytes = 4 * (width + 1)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        batch, _, length_q, _ = query.shape
        _, kv_heads, length_k, _ = key.shape
        # Dense, whatever the query's strides are.
        output = torch.empty_like(query) if query.is_contiguous() else query.new_empty(query.shape)
        rows = group * length_q
        for tile_rows, block_keys, wanted, launch in choices:  # noqa: B007 - the last one is for all other numbers
            if rows <= tile_rows:
                break
        sequences = batch * kv_heads
        all_rows = sequences * rows
        tiles = sequences * -(-rows // tile_rows)
        blocks = -(-length_k // block_keys)
        splits = 1
        if 2 * tiles <= wanted and all_rows:
            splits = max(1, min(blocks, wanted // tiles, _WORKSPACE_BYTES // (all_rows * row_bytes)))
        keys_per_split = -(-blocks // splits) * block_keys
        splits = max(1, -(-length_k // keys_per_split)) if blocks else 1
        partial = output
        if splits > 1:
            partial = query.new_empty(splits * all_rows * (width + 1), dtype=torch.float32)
        query, query_strides = _strides(query)
        key, key_strides = _strides(key)
        value, value_strides = _strides(value)
        factor = (usual_scale if scale is None else scale) * math.log2(math.e)
        launch(
            tiles * splits,
            (query, key, value, output, partial),
            (*query_strides, *key_strides, *value_strides),
            (kv_heads, length_q, length_k, keys_per_split, splits, all_rows, factor),
        )
        if splits > 1:
            combine(all_rows, (partial, output), (), (length_q, splits, all_rows))
        return output

    return attend


def _strides(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with dense rows, and its strides between batches, heads and rows."""
    *strides, of_row = x.stride()
    if of_row == 1 or x.shape[-1] == 1:
        return x, tuple(strides)
    x = x.contiguous()
    return x, x.stride()[:3]


def _padded(width: int) -> int:
    """The next power of two: what tiles of Triton are as wide as."""
    return 1 << (width - 1).bit_length()


def _defaults(context: SelectionContext) -> tuple[Configuration, ...]:
    """For the rows of one query, and for those of more, of which wgmma takes 64 at a time."""
    if context.dtype == "float32":
        return (
            {
                "rows_per_program": 16,
                "block_keys": 32,
                "num_warps": 8,
                "num_stages": 1,
                "programs_per_multiprocessor": 2,
            },
        )
    assert context.head_dim
    short_tile = {
        "rows_per_program": 16,
        "block_keys": 64 if context.head_dim <= 128 else 32,
        "num_warps": 4,
        "num_stages": 3,
        "programs_per_multiprocessor": 2,
    }
    tall_tile = {
        **short_tile,
        "rows_per_program": 64,
        "block_keys": 64 if context.head_dim <= 64 else 32,
        "num_warps": 4 if context.head_dim <= 128 else 8,
        "num_stages": 3 if context.head_dim <= 128 else 2,
    }
    return (short_tile, tall_tile)


def _fits(configuration: Configuration, context: SelectionContext) -> bool:
    rows: int = configuration["rows_per_program"]
    keys: int = configuration["block_keys"]
    warps, stages = configuration["num_warps"], configuration["num_stages"]
    assert context.head_dim and context.gqa_group
    padded_width = _padded(context.head_dim)
    item_bytes = ITEM_BYTES[context.dtype]
    # Registers: beside the result and two tiles of scores a thread needs about 100 of its 255.
    if rows * (padded_width + 2 * keys) // (32 * warps) > 96:
        return False
    # Without tensor cores the operands of a product are in registers too.
    if context.dtype == "float32" and (rows > 16 or keys * padded_width // (32 * warps) > 32):
        return False
    # Shared memory: tiles of keys and values in flight, one more where wgmma reads them there, two more where they are
    # laid out anew for products without tensor cores, and the queries.
    in_flight = stages if rows >= 64 else max(1, stages - 1)
    if context.dtype == "float32":
        in_flight = stages + 1
    shared = ((in_flight * 2 * keys + rows) * padded_width + rows * keys) * item_bytes
    if shared > shared_bytes(context):
        return False
    # A warp computes 16 rows, or 8 keys of them; one beyond the tile has nothing to do.
    if warps > rows // 16 * (keys // 8):
        return False
    if context.seq_len_q is None or context.seq_len_k is None:
        return True
    # Tiles beyond the call are idle.
    all_rows = context.gqa_group * context.seq_len_q
    return (rows == 16 or rows < 2 * all_rows) and (keys == 16 or keys < 2 * context.seq_len_k)


_SPACE = ConfigurationSpace(
    {
        "rows_per_program": (16, 32, 64, 128),
        "block_keys": (16, 32, 64, 128, 256),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3, 4, 5),
        "programs_per_multiprocessor": (1, 2, 3, 4, 6, 8),
    },
    _fits,
)

_SPLIT_KV = KernelSpec(
    kernel_id="triton.split_kv",
    operations=("attention.cross", "attention.causal"),
    platforms=("cuda",),
    dtypes=("float32", "float16", "bfloat16"),
    library="triton",
    requires=("torch", "triton"),
    min_version="3.4",
    min_sm=(8, 0),  # Triton's own
    min_head_dim=16,  # the shortest sum that tl.dot takes
    max_head_dim=256,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=("bottom_right",),
    workspace_bytes=_WORKSPACE_BYTES,
    compiles=True,
    priority=30,
    extra_limits=(Limit("seq_len_q", "at_most", _MAX_QUERIES),),
)

KERNELS = (Kernel(_SPLIT_KV, _load, _SPACE, ("triton_device.py", "triton_launch.py", "triton_sources/attention.py")),)

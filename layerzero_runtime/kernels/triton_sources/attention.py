"""Attention of few queries over many keys: the keys are split between programs, whose results are then combined.

The query heads of a group stand as rows beside each other, so that a program reads a tile of keys and values once for
all of them (Flash-Decoding, Dao et al. 2023; the softmax in one pass is that of Milakov and Gimelshein,
arXiv:1805.02867). Row r of a sequence (one key/value head of one batch) is the query at position r // GROUP of the
group's head r % GROUP.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["kv_heads", "length_q", "length_k", "keys_per_split", "splits", "all_rows"])
def attend_to_splits(
    query,
    key,
    value,
    output,
    partial,
    query_batch: tl.int64,
    query_head: tl.int64,
    query_row: tl.int64,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_row: tl.int64,
    value_batch: tl.int64,
    value_head: tl.int64,
    value_row: tl.int64,
    kv_heads: tl.int32,
    length_q: tl.int32,
    length_k: tl.int32,
    keys_per_split: tl.int32,
    splits: tl.int32,
    all_rows: tl.int64,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one split of the keys gives for one tile of rows.

    query: (batch, heads, length_q, WIDTH), key and value: (batch, kv_heads, length_k, WIDTH), with these strides and
    dense rows. `scale` is that of the scores in units of log2: scale x log2(e). With one split the result goes to
    `output`, (batch, heads, length_q, WIDTH), dense. With several, `partial` gets float32: (splits, all_rows, WIDTH)
    weighted means, and behind them (all_rows, splits) logarithms to base 2 of the sums of their weights.
    """
    rows = length_q * GROUP
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    tile = program % tiles
    split = (program // tiles) % splits
    sequence = (program // tiles // splits).to(tl.int64)
    batch = sequence // kv_heads
    kv_head = sequence % kv_heads

    row = tile * ROWS + tl.arange(0, ROWS)
    position = row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, PADDED_WIDTH)
    is_row = row < rows
    is_dim = dim < WIDTH
    is_query = is_row[:, None] & is_dim[None, :]
    rows_of_query = batch * query_batch + head * query_head + position.to(tl.int64) * query_row
    queries = tl.load(query + rows_of_query[:, None] + dim[None, :], mask=is_query, other=0.0)

    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, length_k)
    # Bottom-right: the query at `position` sees the keys up to `position + unseen`.
    unseen = length_k - length_q
    if IS_CAUSAL:
        last_position = tl.minimum((tile * ROWS + ROWS - 1) // GROUP, length_q - 1)
        last = tl.minimum(last, last_position + unseen + 1)

    keys = tl.arange(0, KEYS)
    key_place = key + batch * key_batch + kv_head * key_head
    value_place = value + batch * value_batch + kv_head * value_head
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_WIDTH], tl.float32)
    for start in range(first, last, KEYS):
        is_key = start + keys < last
        is_read = is_key[:, None] & is_dim[None, :]
        key_rows = key_place + tl.cast(start, tl.int64) * key_row + keys[:, None] * key_row
        tile_of_keys = tl.load(key_rows + dim[None, :], mask=is_read, other=0.0)
        scores = tl.dot(queries, tl.trans(tile_of_keys), input_precision=PRECISION) * scale
        is_seen = is_key[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (start + keys[None, :] <= position[:, None] + unseen)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # Rows that have seen no key yet: any number in the place of -inf - -inf.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(largest - base)
        weight_sum = weight_sum * decay + tl.sum(weights, axis=1)
        value_rows = value_place + tl.cast(start, tl.int64) * value_row + keys[:, None] * value_row
        tile_of_values = tl.load(value_rows + dim[None, :], mask=is_read, other=0.0)
        result = tl.dot(
            weights.to(value.dtype.element_ty), tile_of_values, result * decay[:, None], input_precision=PRECISION
        )
        largest = new_largest

    result /= tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    if splits == 1:
        place = (batch * kv_heads * GROUP + head) * length_q + position
        tl.store(output + place[:, None] * WIDTH + dim[None, :], result.to(output.dtype.element_ty), mask=is_query)
    else:
        place = sequence * rows + row
        means = partial + (split * all_rows + place)[:, None] * WIDTH
        tl.store(means + dim[None, :], result, mask=is_query)
        logarithms = partial + splits * all_rows * WIDTH
        tl.store(logarithms + place * splits + split, largest + tl.log2(weight_sum), mask=is_row)


@triton.jit(do_not_specialize=["length_q", "splits", "all_rows"])
def combine_splits(
    partial,
    output,
    length_q: tl.int32,
    splits: tl.int32,
    all_rows: tl.int64,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The mean of what the splits gave for one row, weighted by the sums of their weights."""
    place = tl.program_id(0).to(tl.int64)
    logarithms = partial + splits * all_rows * WIDTH + place * splits
    chunk = tl.arange(0, SPLITS)
    largest = float("-inf")
    for start in range(0, splits, SPLITS):
        largest = tl.maximum(
            largest, tl.max(tl.load(logarithms + start + chunk, mask=start + chunk < splits, other=float("-inf")))
        )
    base = tl.where(largest == float("-inf"), 0.0, largest)
    dim = tl.arange(0, PADDED_WIDTH)
    is_dim = dim < WIDTH
    weight_sum = 0.0
    result = tl.zeros([PADDED_WIDTH], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + chunk
        is_split = split < splits
        weights = tl.exp2(tl.load(logarithms + split, mask=is_split, other=float("-inf")) - base)
        means = partial + (split * all_rows + place)[:, None] * WIDTH + dim[None, :]
        parts = tl.load(means, mask=is_split[:, None] & is_dim[None, :], other=0.0)
        result += tl.sum(parts * weights[:, None], axis=0)
        weight_sum += tl.sum(weights)
    result /= tl.where(weight_sum == 0.0, 1.0, weight_sum)
    rows = length_q * GROUP
    row = place % rows
    written = (place // rows * GROUP + row % GROUP) * length_q + row // GROUP
    tl.store(output + written * WIDTH + dim, result.to(output.dtype.element_ty), mask=is_dim)

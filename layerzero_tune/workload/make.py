"""Workloads made from model configurations: the calls that serving a model makes at given sizes."""

from __future__ import annotations

from collections.abc import Sequence

from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, merge_workloads
from layerzero_tune.workload.model_share import check_sizes, share_of

# Chunked prefill feeds a quarter of the sequence at a time, at most this many tokens: the budget per step that vLLM's
# chunked prefill began with (max_num_batched_tokens=512).
CHUNK_TOKENS = 512


def make_workload(
    model: str,
    tp: int = 1,
    mode: str = "eager",
    dtype: str = "bfloat16",
    batch_sizes: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (128, 1024, 4096),
) -> tuple[WorkloadLine, ...]:
    """The calls of one device that serves a model, weighted by how often one forward pass makes them.

    For every batch size and length: prefill, chunked prefill and decode of a decoder, full attention of an encoder,
    attention from a decoder to an encoder, and the norms and activations over the tokens of each. Lengths beyond the
    model's longest are left out; an encoder of a fixed length has that one. `ModelShare` says how `tp` devices divide
    the model.

    Raises:
        WorkloadError: the model is unknown, `tp` does not divide it, or no length fits.
        ContextError: mode, dtype or a batch size is not allowed.
        ContextTypeError: one of them has the wrong type.
    """
    share = share_of(model, tp, mode, dtype)
    config = share.config
    check_sizes("lengths", tuple(lengths))
    check_sizes("batch_sizes", tuple(batch_sizes))
    fitting = [length for length in lengths if length <= config.max_length]
    if not fitting and (config.decoder_layers or config.encoder_length is None):
        raise WorkloadError(
            f"lengths are {', '.join(map(str, lengths))}, but {model} takes at most {config.max_length}; "
            "give at least one that fits"
        )
    lines: list[WorkloadLine] = []
    for batch in batch_sizes:
        if config.encoder_layers:
            for length in [config.encoder_length] if config.encoder_length is not None else fitting:
                lines.extend(share.encoder(batch, length))
        if config.decoder_layers:
            for length in fitting:
                lines.extend(share.prefill(batch, length))
                if length > 1:
                    lines.extend(share.decode(batch, length))
                if (chunk := min(length // 4, CHUNK_TOKENS)) > 1:
                    lines.extend(share.chunk(batch, chunk, length))
    return merge_workloads(lines)

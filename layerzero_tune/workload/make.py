"""Workloads made from model configurations: the calls that serving a model makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, merge_workloads
from layerzero_tune.workload.models import ModelConfig, model_named

# Chunked prefill feeds a quarter of the sequence at a time, at most this many tokens: the budget per step that vLLM's
# chunked prefill began with (max_num_batched_tokens=512).
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class _Share:
    """One device's share of a model under tensor parallelism, and what all of its points have in common."""

    config: ModelConfig
    common: dict[str, Any]
    num_heads: int
    num_kv_heads: int
    intermediate_size: int

    def line(self, weight: int, operation: str, **sizes: Any) -> WorkloadLine:
        return WorkloadLine(SelectionContext(operation=operation, **self.common, **sizes), weight)

    def attention(self, operation: str, batch: int, length_q: int, length_k: int, **features: Any) -> WorkloadLine:
        layers = self.config.encoder_layers if operation == "attention.full" else self.config.decoder_layers
        return self.line(
            layers,
            operation,
            batch_size=batch,
            seq_len_q=length_q,
            seq_len_k=length_k,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.config.head_dim,
            **features,
        )

    def rows(self, rows: int, norm_calls: int, layers: int) -> Iterator[WorkloadLine]:
        """Norms over the whole hidden size (every device has it) and activations over this device's share."""
        config = self.config
        norms = {"rows": rows, "hidden_size": config.hidden_size}
        if config.norm == "layer":
            yield self.line(norm_calls, "norm.layer", has_bias=True, **norms)
        else:
            yield self.line(norm_calls, "norm.rms", offset=config.norm_offset, **norms)
            # Serving frameworks add the residual in the same call, in all norms but the first; the fused call has no
            # offset.
            if config.norm_offset == 0.0:
                yield self.line(norm_calls - 1, "norm.add_rms", **norms)
        hidden = {"rows": rows, "hidden_size": self.intermediate_size}
        if config.activation == "swiglu":
            yield self.line(layers, "mlp.swiglu", **hidden)
        elif config.activation == "geglu_tanh":
            yield self.line(layers, "mlp.geglu", approximate="tanh", **hidden)


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
    model's longest are left out. Attention heads and activations are divided among `tp` devices; key/value heads are
    repeated where there are fewer of them than devices, as serving frameworks do.

    RMS norms occur twice: as norm.rms in the count of a framework that adds residuals apart, and as norm.add_rms in
    that of one that fuses them.

    Raises:
        WorkloadError: the model is unknown, `tp` does not divide it, or no length fits.
        ContextError: mode, dtype or a batch size is not allowed.
        ContextTypeError: one of them has the wrong type.
    """
    config = model_named(model)
    _check_sizes("lengths", lengths)
    _check_sizes("batch_sizes", batch_sizes)
    share = _share(model, config, tp, {"dtype": dtype, "mode": mode})
    fitting = [length for length in lengths if length <= config.max_length]
    if not fitting:
        raise WorkloadError(
            f"lengths are {', '.join(map(str, lengths))}, but {model} takes at most {config.max_length}; "
            "give at least one that fits"
        )
    lines: list[WorkloadLine] = []
    for batch in batch_sizes:
        if config.encoder_layers:
            for length in [config.encoder_length] if config.encoder_length is not None else fitting:
                lines.extend(_encoder(share, batch, length))
        if config.decoder_layers:
            for length in fitting:
                lines.extend(_decoder(share, batch, length))
    return merge_workloads(lines)


def _encoder(share: _Share, batch: int, length: int) -> Iterator[WorkloadLine]:
    config = share.config
    yield share.attention("attention.full", batch, length, length)
    # Two norms per layer, and one after the embeddings (BERT) or the last layer (Whisper).
    yield from share.rows(batch * length, 2 * config.encoder_layers + 1, config.encoder_layers)


def _decoder(share: _Share, batch: int, length: int) -> Iterator[WorkloadLine]:
    config = share.config
    chunk = min(length // 4, CHUNK_TOKENS)
    new_tokens = [length]
    yield share.attention("attention.causal", batch, length, length)
    if length > 1:
        new_tokens.append(1)
        yield share.attention("attention.cross", batch, 1, length)
    if chunk > 1:
        new_tokens.append(chunk)
        yield share.attention("attention.causal", batch, chunk, length, causal_alignment="bottom_right")
    for tokens in new_tokens:
        if config.encoder_length is not None:
            yield share.attention("attention.cross", batch, tokens, config.encoder_length)
        norm_calls = config.norms_per_layer * config.decoder_layers + 1
        yield from share.rows(batch * tokens, norm_calls, config.decoder_layers)


def _share(model: str, config: ModelConfig, tp: int, common: dict[str, Any]) -> _Share:
    _check_sizes("tp", (tp,))
    if uneven := _not_divided(config, tp):
        allowed = [str(devices) for devices in range(1, config.num_heads + 1) if not _not_divided(config, devices)]
        raise WorkloadError(
            f"tp is {tp}, which does not divide {model}'s {' and '.join(uneven)}; allowed: {', '.join(allowed)}"
        )
    return _Share(
        config=config,
        common=common,
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, config.num_kv_heads // tp),
        intermediate_size=config.intermediate_size // tp,
    )


def _not_divided(config: ModelConfig, tp: int) -> list[str]:
    kv_heads = config.num_kv_heads
    even = {
        f"num_heads {config.num_heads}": config.num_heads % tp == 0,
        f"num_kv_heads {kv_heads}": kv_heads % tp == 0 or tp % kv_heads == 0,
        f"intermediate_size {config.intermediate_size}": config.intermediate_size % tp == 0,
    }
    return [name for name, divides in even.items() if not divides]


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    if not sizes:
        raise WorkloadError(f"{name} is empty; give at least one")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise WorkloadError(f"{name} holds {size!r}, required integers of at least 1")

"""`ModelShare`: one device's share of a model under tensor parallelism, and the calls that serving it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine
from layerzero_tune.workload.models import ModelConfig, model_named


@dataclass(frozen=True)
class ModelShare:
    """What one of `tp` devices has of a model, and what all of its points have in common.

    Attention heads and activations are divided among the devices; key/value heads are repeated where there are fewer of
    them than devices, as serving frameworks do. Lines weigh as much as one forward pass makes calls.

    RMS norms occur twice: as norm.rms in the count of a framework that adds residuals apart, and as norm.add_rms in
    that of one that fuses them.
    """

    config: ModelConfig
    common: dict[str, Any]
    num_heads: int
    num_kv_heads: int
    intermediate_size: int

    def encoder(self, batch: int, length: int) -> Iterator[WorkloadLine]:
        """A pass of the encoder over so many positions."""
        layers = self.config.encoder_layers
        yield self._attention("attention.full", batch, length, length)
        # Two norms per layer, and one after the embeddings (BERT) or the last layer (Whisper).
        yield from self._rows(batch * length, 2 * layers + 1, layers)

    def prefill(self, batch: int, length: int) -> Iterator[WorkloadLine]:
        """The decoder's first pass, over whole prompts."""
        yield self._attention("attention.causal", batch, length, length)
        yield from self._decoder_rows(batch, length)

    def chunk(self, batch: int, tokens: int, length: int) -> Iterator[WorkloadLine]:
        """A pass over the last so many tokens of sequences of this length. Servers whose prefixes are shared attend to
        what lies before the chunk apart (cascades), which no mask covers."""
        yield self._attention("attention.causal", batch, tokens, length, causal_alignment="bottom_right")
        before = length - tokens
        if before != tokens:  # else it would be a point of attention.full
            yield self._attention("attention.cross", batch, tokens, before)
        yield from self._decoder_rows(batch, tokens)

    def decode(self, batch: int, length: int) -> Iterator[WorkloadLine]:
        """The pass that makes a token of each sequence, the last of this length."""
        yield self._attention("attention.cross", batch, 1, length)
        yield from self._decoder_rows(batch, 1)

    def _decoder_rows(self, batch: int, tokens: int) -> Iterator[WorkloadLine]:
        config = self.config
        if config.encoder_length is not None:
            yield self._attention("attention.cross", batch, tokens, config.encoder_length)
        norm_calls = config.norms_per_layer * config.decoder_layers + 1
        yield from self._rows(batch * tokens, norm_calls, config.decoder_layers)

    def _attention(self, operation: str, batch: int, length_q: int, length_k: int, **features: Any) -> WorkloadLine:
        layers = self.config.encoder_layers if operation == "attention.full" else self.config.decoder_layers
        return self._line(
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

    def _rows(self, rows: int, norm_calls: int, layers: int) -> Iterator[WorkloadLine]:
        """Norms over the whole hidden size (every device has it) and activations over this device's share."""
        config = self.config
        norms = {"rows": rows, "hidden_size": config.hidden_size}
        if config.norm == "layer":
            yield self._line(norm_calls, "norm.layer", has_bias=True, **norms)
        else:
            yield self._line(norm_calls, "norm.rms", offset=config.norm_offset, **norms)
            # Serving frameworks add the residual in the same call, in all norms but the first; the fused call has no
            # offset.
            if config.norm_offset == 0.0:
                yield self._line(norm_calls - 1, "norm.add_rms", **norms)
        hidden = {"rows": rows, "hidden_size": self.intermediate_size}
        if config.activation == "swiglu":
            yield self._line(layers, "mlp.swiglu", **hidden)
        elif config.activation == "geglu_tanh":
            yield self._line(layers, "mlp.geglu", approximate="tanh", **hidden)

    def _line(self, weight: int, operation: str, **sizes: Any) -> WorkloadLine:
        return WorkloadLine(SelectionContext(operation=operation, **self.common, **sizes), weight)


def share_of(model: str, tp: int, mode: str, dtype: str) -> ModelShare:
    """The share of each of `tp` devices.

    Raises:
        WorkloadError: the model is unknown, or `tp` does not divide it.
    """
    config = model_named(model)
    check_sizes("tp", (tp,))
    if uneven := _not_divided(config, tp):
        allowed = [str(devices) for devices in range(1, config.num_heads + 1) if not _not_divided(config, devices)]
        raise WorkloadError(
            f"tp is {tp}, which does not divide {model}'s {' and '.join(uneven)}; allowed: {', '.join(allowed)}"
        )
    return ModelShare(
        config=config,
        common={"dtype": dtype, "mode": mode},
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, config.num_kv_heads // tp),
        intermediate_size=config.intermediate_size // tp,
    )


def divides(model: str, tp: int) -> bool:
    """Whether so many devices can share the model.

    Raises:
        WorkloadError: the model is unknown.
    """
    return not _not_divided(model_named(model), tp)


def _not_divided(config: ModelConfig, tp: int) -> list[str]:
    kv_heads = config.num_kv_heads
    even = {
        f"num_heads {config.num_heads}": config.num_heads % tp == 0,
        f"num_kv_heads {kv_heads}": kv_heads % tp == 0 or tp % kv_heads == 0,
        f"intermediate_size {config.intermediate_size}": config.intermediate_size % tp == 0,
    }
    return [name for name, is_even in even.items() if not is_even]


def check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """
    Raises:
        WorkloadError: there are none, or one is no integer of at least 1.
    """
    if not sizes:
        raise WorkloadError(f"{name} is empty; give at least one")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise WorkloadError(f"{name} holds {size!r}, required integers of at least 1")

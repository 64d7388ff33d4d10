"""Model configurations: the shapes that a model's layers call the operations with.

The numbers are those of each model's public `config.json` on the Hugging Face hub, in the repository named beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerzero_tune.workload.errors import WorkloadError, nearest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model's layers call, on one device and without tensor parallelism.

    Attributes:
        source: repository on the Hugging Face hub whose config.json has the numbers.
        norm: "rms" or "layer"; layer norms have a bias.
        norm_offset: added to the norm's weight (1.0 for Gemma).
        norms_per_layer: norm calls in one decoder layer (or encoder layer, where there is no decoder).
        activation: the gated activation between two linear layers, None where it has no gate or is not one of ours.
        max_length: the longest sequence (max_position_embeddings).
        encoder_layers: layers with full attention.
        decoder_layers: layers with causal attention.
        encoder_length: of an encoder beside a decoder, the fixed number of positions to which the decoder attends.
    """

    source: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norms_per_layer: int = 2
    activation: Literal["swiglu", "geglu_tanh"] | None = "swiglu"
    encoder_layers: int = 0
    decoder_layers: int = 0
    encoder_length: int | None = None


def _whisper(source: str, width: int, heads: int, layers: int) -> ModelConfig:
    return ModelConfig(
        source=source,
        hidden_size=width,
        intermediate_size=4 * width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        max_length=448,  # max_target_positions
        norm="layer",
        norms_per_layer=3,
        activation=None,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_length=1500,  # max_source_positions: 30 s of sound
    )


MODELS: dict[str, ModelConfig] = {
    "llama-3.2-1b": ModelConfig(
        source="meta-llama/Llama-3.2-1B",
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_length=131072,
        decoder_layers=16,
    ),
    "llama-3.1-8b": ModelConfig(
        source="meta-llama/Llama-3.1-8B",
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_length=131072,
        decoder_layers=32,
    ),
    "llama-3.1-70b": ModelConfig(
        source="meta-llama/Llama-3.1-70B",
        hidden_size=8192,
        intermediate_size=28672,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_length=131072,
        decoder_layers=80,
    ),
    "qwen2.5-0.5b": ModelConfig(
        source="Qwen/Qwen2.5-0.5B",
        hidden_size=896,
        intermediate_size=4864,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        max_length=32768,
        decoder_layers=24,
    ),
    "qwen2.5-7b": ModelConfig(
        source="Qwen/Qwen2.5-7B",
        hidden_size=3584,
        intermediate_size=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_length=131072,
        decoder_layers=28,
    ),
    # Gemma 2 norms before and after both blocks, and caps its scores (attn_logit_softcapping), which torch's attention
    # cannot: its attention points describe the shapes, its norm and activation points the calls. query_pre_attn_scalar
    # is 256, the head dimension, in both: the usual scale.
    "gemma-2-2b": ModelConfig(
        source="google/gemma-2-2b",
        hidden_size=2304,
        intermediate_size=9216,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        max_length=8192,
        norm_offset=1.0,
        norms_per_layer=4,
        activation="geglu_tanh",
        decoder_layers=26,
    ),
    "gemma-2-9b": ModelConfig(
        source="google/gemma-2-9b",
        hidden_size=3584,
        intermediate_size=14336,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        max_length=8192,
        norm_offset=1.0,
        norms_per_layer=4,
        activation="geglu_tanh",
        decoder_layers=42,
    ),
    "phi-3-mini": ModelConfig(
        source="microsoft/Phi-3-mini-4k-instruct",
        hidden_size=3072,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        max_length=4096,
        decoder_layers=32,
    ),
    "mistral-7b": ModelConfig(
        source="mistralai/Mistral-7B-v0.3",
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_length=32768,
        decoder_layers=32,
    ),
    # Its activation is no mlp.swiglu: clamped, scaled and shifted (swiglu_limit). Every other layer has a window of 128
    # keys and all have sinks, which torch's attention cannot: the attention points describe the shapes.
    "gpt-oss-20b": ModelConfig(
        source="openai/gpt-oss-20b",
        hidden_size=2880,
        intermediate_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        max_length=131072,
        activation=None,
        decoder_layers=24,
    ),
    "gpt2": ModelConfig(
        source="openai-community/gpt2",
        hidden_size=768,
        intermediate_size=3072,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_length=1024,
        norm="layer",
        activation=None,
        decoder_layers=12,
    ),
    "bert-base": ModelConfig(
        source="google-bert/bert-base-uncased",
        hidden_size=768,
        intermediate_size=3072,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_length=512,
        norm="layer",
        activation=None,
        encoder_layers=12,
    ),
    "whisper-small": _whisper("openai/whisper-small", 768, 12, 12),
    "whisper-large-v3": _whisper("openai/whisper-large-v3", 1280, 20, 32),
}


def model_named(name: str) -> ModelConfig:
    """The configuration of that name.

    Raises:
        WorkloadError: there is none.
    """
    try:
        return MODELS[name]
    except KeyError:
        raise WorkloadError(f"model is {name!r}, known models: {', '.join(MODELS)}{nearest(name, MODELS)}") from None

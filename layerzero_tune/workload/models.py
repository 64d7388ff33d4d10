"""Model configurations: the shapes that a model's layers call the operations with.

The numbers lie in two files beside this one, whose groups never meet: tunings may measure the shapes of the models in
models_tuned.toml, and evaluations those in models_held_out.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
        activation: the gated activation between two linear layers, "none" where it has no gate or is not one of ours.
        max_length: the longest sequence (max_position_embeddings).
        encoder_layers: layers with full attention.
        decoder_layers: layers with causal attention.
        encoder_length: the fixed number of positions of an encoder, such as the patches of an image or 30 s of sound;
            a decoder beside it attends to them.
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
    activation: Literal["swiglu", "geglu_tanh", "none"] = "swiglu"
    encoder_layers: int = 0
    decoder_layers: int = 0
    encoder_length: int | None = None


def _read(name: str) -> Mapping[str, ModelConfig]:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return {model: ModelConfig(**fields) for model, fields in tomllib.loads(text).items()}


# Names for several models at once.
GROUPS: Mapping[str, Mapping[str, ModelConfig]] = {
    "tuned": _read("models_tuned.toml"),
    "held-out": _read("models_held_out.toml"),
}
MODELS: Mapping[str, ModelConfig] = {name: config for group in GROUPS.values() for name, config in group.items()}


def model_named(name: str) -> ModelConfig:
    """The configuration of that name.

    Raises:
        WorkloadError: there is none.
    """
    try:
        return MODELS[name]
    except KeyError:
        raise WorkloadError(f"model is {name!r}, known models: {', '.join(MODELS)}{nearest(name, MODELS)}") from None


def models_named(names: tuple[str, ...]) -> tuple[str, ...]:
    """The models of these names and groups, each once."""
    return tuple(dict.fromkeys(model for name in names for model in GROUPS.get(name, (name,))))

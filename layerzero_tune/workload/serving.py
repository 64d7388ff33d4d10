"""Workloads drawn from what a server meets: prompts and caches of any length, in batches of any size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from layerzero_tune.workload.lines import WorkloadLine, merge_workloads
from layerzero_tune.workload.memory import fits
from layerzero_tune.workload.model_share import ModelShare, check_sizes, share_of

# Of the smallest GPUs that serve these models at these lengths.
_MEMORY_BYTES = 80 * 10**9
_SHORTEST, _LONGEST = 128, 131_072
_MOST_PROMPTS, _MOST_CHUNKS, _MOST_SEQUENCES, _MOST_INPUTS = 8, 8, 256, 64
# Tokens of one pass; vLLM's default budget for chunks is 2,048 to 16,384 (max_num_batched_tokens).
_MOST_TOKENS, _LARGEST_CHUNK, _SMALLEST_CHUNK = 131_072, 8_192, 64
_ATTEMPTS = 1000
# Each number of devices (1, 2, 4, 8) has a quarter of the lengths and of the batches, so that all of them together have
# short and long sequences, few and many, wherever a model's heads have no other model beside them.
_QUARTERS, _BATCH_QUARTERS = 4, (2, 0, 3, 1)


@dataclass(frozen=True)
class _Point:
    """A place in the ranges of a server's sizes; each from 0 for the smallest to 1 for the largest."""

    batch: float
    length: float
    chunk: float


_Kind = Callable[[ModelShare, _Point], Iterator[WorkloadLine]]


def draw_serving(model: str, tp: int, mode: str, dtype: str, draws: int) -> tuple[WorkloadLine, ...]:
    """The calls of one device that serves a model, at random points.

    For a decoder `draws` points each of prefill (up to 8 prompts), chunked prefill (up to 8 chunks of 64 to 8,192
    tokens at the end of longer sequences) and decode (up to 256 sequences), of 128 to 131,072 tokens or as many as the
    model takes; for an encoder as many batches of up to 64 inputs. Sizes are log-uniform, as far as 80 GB hold a
    contest there. Of chunks the attention alone is there: their rows are as many as those of a prefill. Equal arguments
    give equal points, and more draws the same ones and others.

    Raises:
        WorkloadError: the model is unknown, `tp` does not divide it, or `draws` is no integer of at least 1.
        ContextError: mode or dtype is not allowed.
        ContextTypeError: one of them has the wrong type.
    """
    share = share_of(model, tp, mode, dtype)
    check_sizes("draws", (draws,))
    chance = random.Random(f"{model}, {tp} devices, {mode}, {dtype}")
    kinds: list[_Kind] = [_encoder] if share.config.encoder_layers else []
    if share.config.decoder_layers:
        kinds += [_prefill, _chunk, _decode]
    quarter = tp.bit_length() - 1
    found = (_fitting(kind, share, chance, quarter + index) for index in range(draws) for kind in kinds)
    return merge_workloads(*found)


def _fitting(kind: _Kind, share: ModelShare, chance: random.Random, quarter: int) -> list[WorkloadLine]:
    """The lines of a point that fits into memory; none where hardly any does."""
    for _ in range(_ATTEMPTS):
        point = _Point(
            batch=(_BATCH_QUARTERS[quarter % _QUARTERS] + chance.random()) / _QUARTERS,
            length=(quarter % _QUARTERS + chance.random()) / _QUARTERS,
            chunk=chance.random(),
        )
        found = list(kind(share, point))
        if all(fits(line.context, _MEMORY_BYTES) for line in found):
            return found
    return []


def _encoder(share: ModelShare, point: _Point) -> Iterator[WorkloadLine]:
    length = share.config.encoder_length
    return share.encoder(_between(1, _MOST_INPUTS, point.batch), _length(share, point) if length is None else length)


def _prefill(share: ModelShare, point: _Point) -> Iterator[WorkloadLine]:
    length = _length(share, point)
    return share.prefill(_between(1, min(_MOST_PROMPTS, _MOST_TOKENS // length), point.batch), length)


def _chunk(share: ModelShare, point: _Point) -> Iterator[WorkloadLine]:
    length = _length(share, point)
    largest = min(_LARGEST_CHUNK, length // 2)
    tokens = _between(min(_SMALLEST_CHUNK, largest), largest, point.chunk)
    lines = share.chunk(_between(1, _MOST_CHUNKS, point.batch), tokens, length)
    return (line for line in lines if line.context.rows is None)


def _decode(share: ModelShare, point: _Point) -> Iterator[WorkloadLine]:
    return share.decode(_between(1, _MOST_SEQUENCES, point.batch), _length(share, point))


def _length(share: ModelShare, point: _Point) -> int:
    longest = min(_LONGEST, share.config.max_length)
    return _between(min(_SHORTEST, longest // 4), longest, point.length)


def _between(low: int, high: int, place: float) -> int:
    """The size at a place between two, log-uniformly."""
    return min(high, max(low, round(math.exp(math.log(low) + place * (math.log(high) - math.log(low))))))

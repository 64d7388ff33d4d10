"""What others take to find a tuned configuration, on this CPU: their host side, with their kernels left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from benchmarking.timing import Loop, fresh_ints

from lookup_bench.row import Row, within
from lookup_bench.stopwatch import Stopwatch, Timed

TRITON = "Triton Autotuner.run, a hit"
FLASHINFER = "FlashInfer AutoTuner.choose_one, a hit"
VLLM = "vLLM's fused MoE: nearest of 18 batch sizes (restated)"


def installed(distribution: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def rows(stopwatch: Stopwatch) -> Iterator[Row]:
    yield _row(TRITON, "triton", lambda: _triton(stopwatch))
    yield _row(FLASHINFER, "flashinfer-python", lambda: _flashinfer(stopwatch))
    yield within(
        stopwatch.timed(_nearest_batch_size()),
        VLLM,
        "peers",
        note="written anew after its structure: an lru_cache read, then min over the keys by distance; "
        "without its import statement and its check for an override at every call",
    )
    yield from _torch(stopwatch)


def _row(name: str, distribution: str, measure: Callable[[], tuple[Timed, str]]) -> Row:
    """The row of a library that may not be installed, or in a version whose inner parts have other names."""
    found = installed(distribution)
    problem = "is not installed"
    if found is not None:
        try:
            timed, note = measure()
            return within(timed, name, "peers", note=f"{distribution} {found}; {note}")
        except (ImportError, AttributeError, TypeError) as error:
            problem = f"{found}: {type(error).__name__}: {error}"
    return Row(name, "", None, None, None, None, f"not measured: {distribution} {problem}", None, "peers")


class _Launcher:
    """In place of a compiled kernel: there is no GPU to launch it on."""

    @staticmethod
    def fn(x: Any, weight: Any, out: Any, rows: int, width: int, eps: float, block: int) -> None: ...

    def run(self, *arguments: Any, **options: Any) -> None: ...


def _triton(stopwatch: Stopwatch) -> tuple[Timed, str]:
    """Two configurations, a key of two sizes, three tensors; timed are the calls of which the key is known."""
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    launcher = _Launcher()
    configs = [Config({"block": block}, num_warps=4) for block in (512, 1024)]
    tuner = Autotuner(
        launcher,
        ["x", "weight", "out", "rows", "width", "eps", "block"],
        configs,
        ["rows", "width"],
        None,
        None,
        do_bench=lambda call, quantiles: [1.0, 1.0, 1.0],
    )
    tensors = torch.empty(8, 64), torch.empty(64), torch.empty(8, 64)
    sizes = fresh_ints(97, 2)
    chosen = configs[0].all_kwargs()
    names = {"run": tuner.run, "launch": launcher.run, "tensors": tensors, "sizes": sizes, "chosen": chosen}
    hit = Loop("x, weight, out = tensors\nfor rows, width in sizes: run(x, weight, out, rows, width, 1e-6)", names, 97)
    launch = Loop(
        "x, weight, out = tensors\nfor rows, width in sizes: launch(x, weight, out, rows, width, 1e-6, **chosen)",
        names,
        97,
    )
    exec(hit.statement, dict(names))
    assert len(tuner.cache) == len(set(sizes)), "the autotuner's key is another than the two sizes"
    return stopwatch.timed(hit, launch), "up to the launch, for which an empty function stands in: there is no GPU"


def _flashinfer(stopwatch: Stopwatch) -> tuple[Timed, str]:
    """Three tensors, one dynamic dimension in buckets of powers of two, one runner, its winner in memory."""
    from flashinfer.autotuner import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
    from flashinfer.utils import next_positive_power_of_2

    class Runner(TunableRunner):
        def get_valid_tactics(self, inputs: Any, profile: Any) -> list[int]:
            return [0, 1]

        def forward(self, inputs: Any, tactic: int = -1, do_preparation: bool = False, **options: Any) -> Any:
            return inputs[0]

    buckets = tuple(2**power for power in range(8))
    spec = DynamicTensorSpec((0,), (0,), buckets, lambda size: min(next_positive_power_of_2(size), buckets[-1]))
    config = TuningConfig(dynamic_tensor_specs=(spec,))
    tuner, runner = AutoTuner.get(), Runner()
    inputs = [torch.empty(7, 64), torch.empty(64, 64), torch.empty(7, 64)]
    # What tuning would have left there; it needs a GPU.
    shapes = tuple(tuner._get_input_sizes(inputs))
    key = AutoTuner._get_cache_key("bench", runner, shapes, config, runner.get_cache_key_extras(inputs))
    tuner.profiling_cache[key] = (1, None)
    chosen = tuner.choose_one("bench", [runner], config, inputs)
    assert chosen == (runner, 1), f"the autotuner chose {chosen}, not what its cache holds"
    names = {"choose": tuner.choose_one, "runners": [runner], "config": config, "inputs": inputs}
    hit = Loop("for _ in range(50): choose('bench', runners, config, inputs)", names, 50)
    return stopwatch.timed(hit), "one runner, three tensors; the winner was put into its memory, as tuning needs a GPU"


def _nearest_batch_size() -> Loop:
    """A map from batch sizes to configurations for each (experts, width), kept by `lru_cache`; the nearest key counts.

    Structure: try_get_optimal_moe_config and get_moe_configs in vllm/model_executor/layers/fused_moe/fused_moe.py.
    """
    sizes = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)

    @functools.lru_cache
    def tuned(experts: int, width: int, dtype: str | None, block_n: int, block_k: int) -> dict[int, dict[str, int]]:
        return {size: {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "num_warps": 4} for size in sizes}

    def nearest(
        weights: tuple[int, int, int], dtype: str | None, tokens: int, block: list[int] | None
    ) -> dict[str, int]:
        experts, _, width = weights
        block_n, block_k = block or (0, 0)
        by_size = tuned(experts, width, dtype, block_n, block_k)
        return by_size[min(by_size, key=lambda size: abs(size - tokens))]

    names = {"nearest": nearest, "weights": (8, 4096, 14336), "tokens": [size for (size,) in fresh_ints(500, 1)]}
    return Loop("for size in tokens: nearest(weights, None, size, None)", names, 500)


def _torch(stopwatch: Stopwatch) -> Iterator[Row]:
    """What a call of torch's own functions takes at the least: with their kernels, on next to no data."""
    query, x, weight = torch.zeros(1, 1, 1, 8), torch.zeros(1, 8), torch.ones(8)
    attend, normalise = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.rms_norm
    with torch.no_grad():
        for name, loop in (
            ("scaled_dot_product_attention", Loop("f(query, query, query)", {"f": attend, "query": query})),
            ("rms_norm", Loop("f(x, (8,), weight, 1e-6)", {"f": normalise, "x": x, "weight": weight})),
        ):
            yield within(stopwatch.timed(loop), f"torch {name} of 8 numbers, kernel included", "peers")

"""A real table for the tests of dispatch: invented times of the builtin kernels, judged and printed by the compiler."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.operation import Sizes
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.form import TableForm
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.identity import content_hash
from layerzero_tune.results.measurement import Measurement

ROUNDS = 8
BEST_NS, DEFAULT_NS, OTHER_NS = 10_000.0, 20_000.0, 40_000.0


@dataclass(frozen=True)
class Region:
    """A static key, the grid of sizes on which it was measured, and the kernels that win, from small sizes to large.

    `largest` leaves out the cells whose sizes have a larger product.
    """

    operation: str
    dtype: str
    features: dict[str, Any]
    grid: tuple[tuple[int, ...], ...]
    winners: tuple[str, ...]
    largest: int | None = None

    @property
    def context(self) -> SelectionContext:
        """The static features, with sizes that mean nothing."""
        sizes: dict[str, Any] = {"rows": 1, "hidden_size": 1}
        if self.operation.startswith("attention"):
            group = self.features["group"]
            cross = self.features.get("causal_alignment") is not None or self.operation == "attention.cross"
            sizes = {"batch_size": 1, "num_kv_heads": 1, "num_heads": group, "seq_len_q": 2, "seq_len_k": 2 + cross}
        rest = {name: value for name, value in self.features.items() if name != "group"}
        return SelectionContext(operation=self.operation, dtype=self.dtype, **sizes, **rest)

    def cells(self) -> Iterator[tuple[Sizes, str]]:
        """The measured sizes and the kernel that wins there, in diagonal bands of the grid."""
        bands = sum(len(line) - 1 for line in self.grid) + 1
        for places in itertools.product(*(range(len(line)) for line in self.grid)):
            sizes = tuple(line[place] for line, place in zip(self.grid, places, strict=True))
            if self.largest is None or math.prod(sizes) <= self.largest:
                yield self._with_tied(sizes), self.winners[sum(places) * len(self.winners) // bands]

    def _with_tied(self, sizes: Sizes) -> Sizes:
        axes = operation_named(self.operation).axes
        return sizes if len(sizes) == len(axes) else (*sizes, sizes[-1])


_MATMUL, _FLASH, _FOLDED, _MATH = (
    "torch.matmul",
    "torch.sdpa.flash_cpu",
    "torch.sdpa.flash_cpu_folded",
    "torch.sdpa.math",
)
_BATCHES, _LENGTHS = (1, 4, 16), (4, 16, 64)
_ROWS = ((1, 8, 64, 256), (32, 128, 512))


def _attention(
    operation: str, dtype: str, winners: tuple[str, ...], grid: tuple[tuple[int, ...], ...], group: int = 1, **rest: Any
) -> Region:
    features = {"head_dim": 16, "group": group, **rest}
    return Region(operation, dtype, features, grid, winners, largest=12288 if len(grid) == 3 else None)


REGIONS = (
    _attention("attention.causal", "float32", ("torch.matmul.causal", _FLASH, "torch.sdpa"), (_BATCHES, _LENGTHS)),
    _attention("attention.causal", "float32", (_MATH, _FLASH), (_BATCHES, _LENGTHS), group=2),
    _attention("attention.causal", "bfloat16", (_FLASH, "torch.matmul.causal"), (_BATCHES, _LENGTHS), group=2),
    _attention(
        "attention.causal",
        "float32",
        (_FLASH, "torch.matmul.causal", _FOLDED),
        (_BATCHES, (1, 6, 24), (8, 32, 128)),
        group=2,
        causal_alignment="bottom_right",
    ),
    _attention(
        "attention.causal",
        "float32",
        (_FLASH, "torch.matmul.causal", _MATH),
        (_BATCHES, (1, 6, 24), (8, 32, 128)),
        causal_alignment="top_left",
    ),
    _attention("attention.full", "float32", (_MATMUL, _FLASH, "torch.sdpa"), (_BATCHES, _LENGTHS)),
    _attention("attention.full", "bfloat16", (_FLASH, _MATMUL, _MATH), (_BATCHES, _LENGTHS), group=2),
    _attention("attention.cross", "float32", (_MATMUL, _FLASH, _MATH), (_BATCHES, (1, 6, 24), (8, 32, 128)), group=2),
    Region("norm.rms", "float32", {}, _ROWS, ("torch.rms_norm.fused", "torch.inductor.rms_norm", "torch.rms_norm")),
    Region("norm.rms", "float32", {"offset": 1.0}, _ROWS, ("torch.rms_norm", "torch.rms_norm.vector_norm")),
    Region("norm.rms", "bfloat16", {}, _ROWS, ("torch.rms_norm.vector_norm", "torch.rms_norm.fused")),
    Region("norm.add_rms", "float32", {}, _ROWS, ("torch.add_rms_norm.vector_norm", "torch.add_rms_norm")),
    Region("norm.layer", "float32", {"has_bias": True}, _ROWS, ("torch.layer_norm", "torch.layer_norm.vector_norm")),
    Region("norm.layer", "float32", {}, _ROWS, ("torch.layer_norm.vector_norm",)),
    Region("mlp.swiglu", "float32", {}, _ROWS, ("torch.swiglu.in_place", "torch.inductor.swiglu", "torch.swiglu")),
    Region("mlp.swiglu", "bfloat16", {}, _ROWS, ("torch.swiglu", "torch.swiglu.in_place")),
    Region("mlp.geglu", "float32", {"approximate": "tanh"}, _ROWS, ("torch.geglu.in_place", "torch.geglu")),
    Region("mlp.geglu", "float32", {}, _ROWS, ("torch.geglu", "torch.geglu.in_place")),
)


def measurements(device: DeviceSpec) -> list[Measurement]:
    """Rows of contests between all kernels that are legal at a cell."""
    return [
        row for region in REGIONS for sizes, winner in region.cells() for row in _contest(device, region, sizes, winner)
    ]


def _contest(device: DeviceSpec, region: Region, sizes: Sizes, winner: str) -> Iterator[Measurement]:
    operation = operation_named(region.operation)
    context = operation.with_sizes(region.context, sizes)
    described = context.with_device(device)
    contest_id = content_hash(context.to_dict())
    noise = random.Random(contest_id)
    for kernel in Registry(builtin_kernels()).candidates(operation.name):
        if rejections(kernel.spec.limits, described):
            continue
        is_default = kernel.kernel_id == operation.default_kernel
        time = BEST_NS if kernel.kernel_id == winner else DEFAULT_NS if is_default else OTHER_NS
        yield Measurement(
            contest_id=contest_id,
            job_id=content_hash([contest_id, kernel.kernel_id]),
            context=context,
            kernel_id=kernel.kernel_id,
            configuration={},
            is_default=is_default,
            status="ok",
            message="",
            relative_error=1e-7,
            tolerance=1e-5,
            screen_ns=time,
            samples_ns=tuple(time * noise.uniform(0.99, 1.01) for _ in range(ROUNDS)),
            device=device.to_dict(),
            versions={"torch": library_version("torch") or ""},
            source_hash=kernel_source_hash(kernel),
            policy={"rounds": ROUNDS},
            measured_at="2026-03-01T10:00:00+00:00",
        )


def write_table(folder: Path, device: DeviceSpec) -> TableForm:
    """Compile the rows and write the device's table below `folder`; gives the form that was printed."""
    form = compile_table(measurements(device), builtin_kernels())
    emit(form).write(folder)
    return form

"""`KernelSpec`, a kernel's declaration; `ConfigurationSpace`, what a tuner may choose of it; `Kernel`, both and the
function that loads it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from layerzero_runtime.context import ALIGNMENTS, DENSE_LAYOUTS, DTYPES, LAYOUTS, QUANT_FORMATS, SelectionContext
from layerzero_runtime.device import PLATFORMS
from layerzero_runtime.devices.cpu import INSTRUCTION_SETS
from layerzero_runtime.errors import SpecError
from layerzero_runtime.selection.limits import Limit

KERNEL_ID = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")

_NAMES: Mapping[str, tuple[str | None, ...]] = {
    "platforms": PLATFORMS,
    "dtypes": DTYPES,
    "layouts": LAYOUTS,
    "causal_geometries": ("square", *ALIGNMENTS),
    "quant_formats": (None, *QUANT_FORMATS),
    "instruction_sets": tuple(name for name, _ in INSTRUCTION_SETS),
}
_SIZE_PAIRS = (("min_head_dim", "max_head_dim"), ("min_seq_len", "max_seq_len"))
_BOUND_PAIRS = (*_SIZE_PAIRS, ("min_sm", "max_sm"))
_BOUNDS = (
    *(name for pair in _SIZE_PAIRS for name in pair),
    "max_batch_size",
    "max_score_elements",
    "max_hidden_size",
    "head_dim_multiple",
    "hidden_size_multiple",
)

Scalar = str | int | float | bool | None
Configuration = Mapping[str, Any]
KernelFunction = Callable[..., Any]
Loader = Callable[[SelectionContext, Configuration], KernelFunction]
Restriction = Callable[[Configuration, SelectionContext], bool]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What a kernel computes and where it may be used. Bounds are inclusive; None means no limit.

    Attributes:
        kernel_id: dotted lower-case name, library first, such as "torch.sdpa.flash_cpu".
        operations: names of the operations that it computes.
        library: the distribution whose version matters for its timings.
        version_digits: how many leading components of that version matter (torch 2.13.1 with 2: "2.13").
        requires: names of probes (`layerzero_runtime.libraries`) that must pass before it can be loaded.
        min_version: the oldest version of the library that it runs with, such as "2.11".
        min_sm, max_sm: compute capabilities of CUDA devices, (major, minor).
        instruction_sets: those of CPUs that it has code for; empty for any.
        layouts: memory layouts that its function takes; dense ones reach it from each other through a transposed view.
        max_score_elements: for kernels that write the score matrices out, their largest number of elements.
        quant_formats: quantised forms that it computes; None stands for none, which is what most kernels compute.
        produces_dtype: the output's dtype where it is not `result_dtype` of the context; what the call asks for is then
            cast.
        fuses_ops: names of the operations that it does in one, for `explain`.
        workspace_bytes: what it allocates beside its output at most, for calls that limit that.
        is_cuda_graph_safe: may be captured; a kernel that may not is left out wherever the mode is "graph".
        transform_cost_hint: priority that a copy before or behind the kernel costs it.
        deterministic: equal inputs give equal bits.
        supports_backward: gradients flow through it.
        compiles: the first use compiles code, for seconds.
        traceable: Dynamo can trace the function for all sizes at once; one that it cannot is an operator in its graphs.
        traced_as: id of the kernel that Dynamo traces in its place: this one is what compilation makes of that.
        priority: order among the legal kernels where nothing was measured; higher goes first.

    Raises:
        SpecError: the id is malformed, a name is unknown or missing, a bound is below 1, or a pair of bounds is empty.
    """

    kernel_id: str
    operations: tuple[str, ...]
    platforms: tuple[str, ...]
    dtypes: tuple[str, ...]
    library: str = "torch"
    version_digits: int = 2
    requires: tuple[str, ...] = ("torch",)
    min_version: str = ""
    min_sm: tuple[int, int] | None = None
    max_sm: tuple[int, int] | None = None
    instruction_sets: tuple[str, ...] = ()
    layouts: tuple[str, ...] = LAYOUTS[:1]
    min_head_dim: int | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    min_seq_len: int | None = None
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    max_score_elements: int | None = None
    max_hidden_size: int | None = None
    hidden_size_multiple: int = 1
    supports_gqa: bool = False
    supports_attn_mask: bool = False
    supports_dropout: bool = False
    supports_scale: bool = True
    supports_offset: bool = True
    supports_mixed_weight_dtype: bool = False
    supports_v_head_dim: bool = False
    causal_geometries: tuple[str, ...] = ("square",)
    requires_contiguous: bool = False
    requires_last_dim_stride1: bool = False
    quant_formats: tuple[str | None, ...] = (None,)
    produces_dtype: str | None = None
    fuses_ops: tuple[str, ...] = ()
    workspace_bytes: int = 0
    is_cuda_graph_safe: bool = True
    transform_cost_hint: float = 10.0
    deterministic: bool = True
    supports_backward: bool = False
    compiles: bool = False
    traceable: bool = False
    traced_as: str | None = None
    priority: int = 50
    extra_limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kernel_id, str) or not KERNEL_ID.fullmatch(self.kernel_id):
            raise SpecError(
                f"kernel_id {self.kernel_id!r} must be dotted lower-case words, such as 'torch.sdpa.flash_cpu'"
            )
        for name in ("operations", "platforms", "dtypes", "layouts"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value:
                raise SpecError(f"{self.kernel_id}: {name} is {value!r}, required a tuple with at least one name")
        for name, known in _NAMES.items():
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise SpecError(f"{self.kernel_id}: {name} has {unknown[0]!r}, allowed: {', '.join(map(str, known))}")
        for name in _BOUNDS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SpecError(f"{self.kernel_id}: {name} is {value!r}, required an integer of at least 1")
        for limit in self.extra_limits:
            if not hasattr(SelectionContext, limit.field):
                raise SpecError(f"{self.kernel_id}: {limit.field!r} in extra_limits is no field of a context")
        if self.produces_dtype is not None and self.produces_dtype not in DTYPES:
            raise SpecError(
                f"{self.kernel_id}: produces_dtype is {self.produces_dtype!r}, allowed: {', '.join(DTYPES)}"
            )
        if (
            isinstance(self.workspace_bytes, bool)
            or not isinstance(self.workspace_bytes, int)
            or self.workspace_bytes < 0
        ):
            raise SpecError(
                f"{self.kernel_id}: workspace_bytes is {self.workspace_bytes!r}, required an integer from 0 on"
            )
        if self.traced_as is not None and (self.traceable or not KERNEL_ID.fullmatch(self.traced_as)):
            raise SpecError(
                f"{self.kernel_id}: traced_as is {self.traced_as!r} and traceable is {self.traceable!r}, "
                "required is one of the two, for traced_as a kernel_id such as 'torch.sdpa'"
            )
        for low, high in _BOUND_PAIRS:
            bounds = getattr(self, low), getattr(self, high)
            if None not in bounds and bounds[0] > bounds[1]:
                raise SpecError(f"{self.kernel_id}: {low} {bounds[0]} is above {high} {bounds[1]}")

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """All conditions on a context but the operation, derived from the fields above."""
        found: list[Limit] = [
            Limit("platform", "one_of", (*self.platforms, None)),
            Limit("dtype", "one_of", self.dtypes),
        ]

        def bound(field: str, minimum: Any, maximum: Any) -> None:
            if minimum is not None:
                found.append(Limit(field, "at_least", minimum))
            if maximum is not None:
                found.append(Limit(field, "at_most", maximum))

        def only(field: str, unless: bool, *allowed: object) -> None:
            if not unless:
                found.append(Limit(field, "one_of", allowed))

        bound("sm", self.min_sm, self.max_sm)
        if self.instruction_sets:
            found.append(Limit("instruction_set", "one_of", (*self.instruction_sets, None)))
        only("mode", self.is_cuda_graph_safe, "eager")
        found.append(Limit("quant_format", "one_of", self.quant_formats))
        if self.workspace_bytes:
            bound("workspace_limit", self.workspace_bytes, None)
        bound("head_dim", self.min_head_dim, self.max_head_dim)
        bound("seq_len_q", self.min_seq_len, self.max_seq_len)
        bound("seq_len_k", self.min_seq_len, self.max_seq_len)
        bound("batch_size", None, self.max_batch_size)
        bound("score_elements", None, self.max_score_elements)
        bound("hidden_size", None, self.max_hidden_size)
        for field, multiple in (("head_dim", self.head_dim_multiple), ("hidden_size", self.hidden_size_multiple)):
            if multiple != 1:
                found.append(Limit(field, "multiple_of", multiple))
        families = {operation.split(".")[0] for operation in self.operations}
        if "attention" in families:
            dense = DENSE_LAYOUTS if set(self.layouts).intersection(DENSE_LAYOUTS) else ()
            found.append(Limit("layout", "one_of", tuple(dict.fromkeys((*self.layouts, *dense)))))
            only("gqa_group", self.supports_gqa, 1)
            only("attn_mask", self.supports_attn_mask, "none")
            only("dropout_p", self.supports_dropout, 0.0)
            only("scale_is_usual", self.supports_scale, True)
            only("other_v_head_dim", self.supports_v_head_dim, None)
            found.append(Limit("causal_mask", "one_of", (*self.causal_geometries, None)))
        if "norm" in families:
            only("offset", self.supports_offset, 0.0)
            only("mixed_weight_dtype", self.supports_mixed_weight_dtype, None)
        only("is_contiguous", not self.requires_contiguous, True)
        only("stride_last_dim", not self.requires_last_dim_stride1, 1)
        only("requires_deterministic", self.deterministic, False)
        only("requires_grad", self.supports_backward, False)
        return (*found, *self.extra_limits)

    @property
    def backend(self) -> str:
        """What policies call the library."""
        return self.library


def _unrestricted(configuration: Configuration, context: SelectionContext) -> bool:
    return True


def _one_regime(configuration: Configuration, context: SelectionContext) -> Scalar:
    return None


@dataclass(frozen=True, eq=False)
class ConfigurationSpace:
    """The configurations of a kernel that are worth measuring; `{}`, the kernel's own choice, always is and is none of
    them.

    A configuration has a value for every parameter. The kernel must be correct in each for all sizes that its limits
    allow, since a bucket of a table spans many: what `is_valid` refuses by the sizes of a context is not worth
    measuring there; what a device or static features rule out must be refused.

    Attributes:
        parameters: by name the values to choose from, JSON scalars.
        is_valid: the kernel's own restrictions: whether the configuration may be measured at the context, and is
            expected to serve there; the context has the device.
        regime: in which of several ways a configuration works at the context, where sizes decide that, as whether a
            block holds a whole row: measured in one, it is not expected to serve in another.

    Raises:
        SpecError: no parameters, a name that is no identifier, or values that are no tuple, empty, no JSON scalars or
            equal to each other (as 1, 1.0 and True are).
    """

    parameters: Mapping[str, tuple[Scalar, ...]]
    is_valid: Restriction = _unrestricted
    regime: Callable[[Configuration, SelectionContext], Scalar] = _one_regime

    def __post_init__(self) -> None:
        if not self.parameters:
            raise SpecError("a space of configurations has no parameters, required at least one; leave the space out")
        for name, values in self.parameters.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise SpecError(f"parameter {name!r} of a space must have the name of an identifier, such as 'block'")
            if not isinstance(values, tuple) or not values:
                raise SpecError(f"parameter {name!r} has {values!r}, required a tuple with at least one value")
            for value in values:
                if not _is_scalar(value):
                    raise SpecError(
                        f"parameter {name!r} has {value!r}, required are JSON scalars: strings, finite numbers, "
                        "True, False or None"
                    )
            if len(set(values)) != len(values):
                raise SpecError(f"parameter {name!r} has equal values in {values!r}, required each once")
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))


def _is_scalar(value: object) -> bool:
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, str | int)


@dataclass(frozen=True)
class Kernel:
    """A declaration, its loader, and the space of its configurations where there is one to search.

    `load(context, configuration)` imports the library and returns the function to call. It may rely on the device and
    the static features of the context alone, never on its sizes; the function takes the arguments that
    `Operation.arguments` lists. The configuration is one of `space`, or `{}`, the kernel's own choice. `sources` names
    further files of its code, relative to the folder of its adapter.
    """

    spec: KernelSpec
    load: Loader
    space: ConfigurationSpace | None = None
    sources: tuple[str, ...] = ()

    @property
    def kernel_id(self) -> str:
        return self.spec.kernel_id


class FunctionLoader:
    """A loader that gives one function, whatever the context; its source is the function's."""

    def __init__(self, function: KernelFunction) -> None:
        self._function = function
        if hasattr(function, "__code__"):
            self.__code__ = function.__code__

    def __call__(self, context: SelectionContext, configuration: Configuration) -> KernelFunction:
        return self._function

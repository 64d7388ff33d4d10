"""`SelectionContext`: the description of one call, all that a selection may depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from layerzero_runtime.context_checks import check_bytes, check_choice, check_size, checked_number, is_integer
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ContextError, ContextTypeError

# Names of torch dtypes, as str(dtype) prints them without "torch.".
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
MODES = ("eager", "graph")
# Dense layouts by (batch, heads, sequence, dim); "nhd" is ragged: all tokens of a batch in one dimension, then heads.
DENSE_LAYOUTS = ("bhsd", "bshd")
LAYOUTS = (*DENSE_LAYOUTS, "nhd")
QUANT_FORMATS = ("int8", "fp8")
ALIGNMENTS = ("top_left", "bottom_right")
MASKS = ("none", "bool", "float")
APPROXIMATIONS = ("none", "tanh")
# How a quantised matrix is scaled back: by one number, or by one for each of its rows.
SCALINGS = ("tensor", "row")
# What quantised matrix products give, whatever they multiply.
LINEAR_OUTPUT = "bfloat16"

_SIZES = (
    "batch_size",
    "seq_len_q",
    "seq_len_k",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "v_head_dim",
    "rows",
    "hidden_size",
    "in_features",
    "out_features",
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "weight_dtype": DTYPES,
    "output_dtype": DTYPES,
    "mode": MODES,
    "layout": LAYOUTS,
    "causal_alignment": ALIGNMENTS,
    "attn_mask": MASKS,
    "approximate": APPROXIMATIONS,
    "scale_x": SCALINGS,
    "scale_w": SCALINGS,
}
_FLAGS = (
    "requires_grad",
    "requires_deterministic",
    "is_contiguous",
    "has_weight",
    "has_bias",
    "is_cuda_graph_capturing",
)
_NUMBERS = ("dropout_p", "scale", "offset")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionContext:
    """One call, described: sizes in elements, dtypes by torch's names without the prefix.

    A size that the operation does not have stays None. `num_kv_heads` defaults to `num_heads`, `seq_len_k` to
    `seq_len_q`, `v_head_dim` to `head_dim`, `weight_dtype` to `dtype`, `output_dtype` to `result_dtype`. A `scale` of
    1/sqrt(head_dim) is the usual one and becomes None, as in torch. `scale_x` and `scale_w` say whether a quantised
    input and its weight have one scale ("tensor") or one per row ("row"; a row of a weight is an output channel).
    `quant_format` asks for a quantised kernel. `workspace_limit` is how many bytes a kernel may allocate beside its
    output, None for as many as it likes. Under capture of a CUDA graph the mode is "graph".

    Raises:
        ContextError: a value is not allowed.
        ContextTypeError: a value has the wrong type.
    """

    operation: str
    dtype: str
    mode: str = "eager"
    batch_size: int | None = None
    seq_len_q: int | None = None
    seq_len_k: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    causal_alignment: str = "top_left"
    layout: str = "bhsd"
    attn_mask: str = "none"
    dropout_p: float = 0.0
    scale: float | None = None
    rows: int | None = None
    hidden_size: int | None = None
    in_features: int | None = None
    out_features: int | None = None
    weight_dtype: str = ""
    output_dtype: str = ""
    quant_format: str | None = None
    offset: float = 0.0
    has_weight: bool = True
    has_bias: bool = False
    approximate: str = "none"
    scale_x: str = "tensor"
    scale_w: str = "tensor"
    requires_grad: bool = False
    requires_deterministic: bool = False
    is_contiguous: bool = True
    stride_last_dim: int = 1
    is_cuda_graph_capturing: bool = False
    workspace_limit: int | None = None
    device: DeviceSpec | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.operation, str):
            raise ContextTypeError(f"operation must be a string, not {type(self.operation).__name__}")
        set_field = object.__setattr__
        for name, default in (("weight_dtype", self.dtype), ("output_dtype", self.result_dtype)):
            if not getattr(self, name):
                set_field(self, name, default)
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name in _SIZES:
            check_size(name, getattr(self, name))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ContextTypeError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in _NUMBERS:
            if name != "scale" or self.scale is not None:
                # As floats, so that 1 and 1.0 are written out, and hashed, alike.
                set_field(self, name, checked_number(name, getattr(self, name)))
        if not is_integer(self.stride_last_dim):
            raise ContextTypeError(f"stride_last_dim must be an integer, not {self.stride_last_dim!r}")
        if self.quant_format is not None:
            check_choice("quant_format", self.quant_format, QUANT_FORMATS)
        if self.workspace_limit is not None:
            check_bytes("workspace_limit", self.workspace_limit)
        if self.is_cuda_graph_capturing:
            set_field(self, "mode", "graph")
        if not 0.0 <= self.dropout_p <= 1.0:
            raise ContextError(f"dropout_p is {self.dropout_p}, allowed is 0 to 1")
        if self.device is not None and not isinstance(self.device, DeviceSpec):
            raise ContextTypeError(
                f"device must be a DeviceSpec, not {self.device!r}; detect_device(name) of layerzero_runtime.device "
                "gives that of this machine"
            )
        self._fill_defaults()

    def _fill_defaults(self) -> None:
        set_field = object.__setattr__
        if self.num_kv_heads is None:
            set_field(self, "num_kv_heads", self.num_heads)
        if self.seq_len_k is None:
            set_field(self, "seq_len_k", self.seq_len_q)
        if self.v_head_dim is None:
            set_field(self, "v_head_dim", self.head_dim)
        self._check_groups()
        if self.scale is not None and self.head_dim is not None and is_usual_scale(self.scale, self.head_dim):
            set_field(self, "scale", None)

    def _check_groups(self) -> None:
        if self.num_heads is not None and self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ContextError(
                f"num_heads is {self.num_heads}, which is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "grouped-query attention needs whole groups"
            )

    @classmethod
    def from_tensors(cls, operation: str, *arguments: Any, **features: Any) -> SelectionContext:
        """The context of a call: the positional arguments of the operation's kernels, and by keyword what they do not
        show (`layout`, `causal_alignment`, `approximate`, `mode`).

        Raises:
            ContextError: the operation is unknown, or the arguments do not fit together.
        """
        from layerzero_runtime.operations import operation_named

        return operation_named(operation).describe(*arguments, **features)

    @property
    def is_causal(self) -> bool:
        return self.operation == "attention.causal"

    @property
    def gqa_group(self) -> int | None:
        """Query heads per key/value head."""
        return None if self.num_heads is None or self.num_kv_heads is None else self.num_heads // self.num_kv_heads

    @property
    def batch_kv_heads(self) -> int | None:
        """batch_size x num_kv_heads: the number of independent key/value sequences."""
        return None if self.batch_size is None or self.num_kv_heads is None else self.batch_size * self.num_kv_heads

    @property
    def causal_geometry(self) -> str:
        """How a causal mask lies: "square" for equal lengths (both alignments agree), else the alignment."""
        return "square" if self.seq_len_q == self.seq_len_k else self.causal_alignment

    @property
    def score_elements(self) -> int | None:
        """Elements of the score matrices (batch, heads, query, key), for kernels that write them out."""
        if self.batch_size is None or self.num_heads is None or self.seq_len_q is None or self.seq_len_k is None:
            return None
        return self.batch_size * self.num_heads * self.seq_len_q * self.seq_len_k

    @property
    def causal_mask(self) -> str | None:
        """The geometry of the causal mask, None where the operation has none."""
        return self.causal_geometry if self.is_causal else None

    @property
    def mixed_weight_dtype(self) -> str | None:
        """The weight's dtype where it is not the input's."""
        return None if self.weight_dtype == self.dtype else self.weight_dtype

    @property
    def other_v_head_dim(self) -> int | None:
        """The value's head dimension where it is not the key's."""
        return None if self.v_head_dim == self.head_dim else self.v_head_dim

    @property
    def result_dtype(self) -> str:
        """The dtype that kernels give of themselves: of a quantised matrix product bfloat16, else the input's."""
        return LINEAR_OUTPUT if self.operation.startswith("linear.") else self.dtype

    @property
    def other_output_dtype(self) -> str | None:
        """The output's dtype where it is not the one that kernels give of themselves."""
        return None if self.output_dtype == self.result_dtype else self.output_dtype

    @property
    def sm(self) -> tuple[int, int] | None:
        """Compute capability of a CUDA device (major, minor), None where it is not known."""
        return None if self.device is None else self.device.compute_capability

    @property
    def instruction_set(self) -> str | None:
        """Of a CPU; None of other devices and where it is not known."""
        return (self.device.instruction_set or None) if self.device is not None else None

    @property
    def scale_is_usual(self) -> bool:
        return self.scale is None

    @property
    def platform(self) -> str | None:
        """The kind of device ("cpu", "cuda"), None while no device is known."""
        return None if self.device is None else self.device.platform

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in declaration order: a workload line without its weight."""
        return {
            f.name: value
            for f in fields(self)
            if f.name != "device" and (value := getattr(self, f.name)) != self._default_of(f.name, f.default)
        }

    def _default_of(self, name: str, declared: object) -> object:
        derived = {
            "num_kv_heads": self.num_heads,
            "seq_len_k": self.seq_len_q,
            "v_head_dim": self.head_dim,
            "weight_dtype": self.dtype,
            "output_dtype": self.result_dtype,
        }
        # `mode` is written out always: a line should say which clock it means.
        return object() if name == "mode" else derived.get(name, declared)

    def with_device(self, device: DeviceSpec) -> SelectionContext:
        return replace(self, device=device)

    def resized(self, sizes: Mapping[str, int]) -> SelectionContext:
        """This call with other sizes, by the names of fields that it has. What else it says has been checked, and is
        taken over as it is: a compilation asks for half a million of them.

        Raises:
            ContextError: a size is below 1, or the heads form no whole groups.
            ContextTypeError: a size is no integer.
        """
        for name, size in sizes.items():
            check_size(name, size)
        other = object.__new__(SelectionContext)
        for name, put in _SLOTS:
            put(other, getattr(self, name))
        for name, size in sizes.items():
            object.__setattr__(other, name, size)
        other._check_groups()
        return other


_SLOTS = tuple((f.name, vars(SelectionContext)[f.name].__set__) for f in fields(SelectionContext))
FIELD_NAMES = tuple(f.name for f in fields(SelectionContext) if f.name != "device")


def is_usual_scale(scale: float, head_dim: int) -> bool:
    """Whether a scale is attention's usual 1/sqrt(head_dim), up to the rounding of a Python float."""
    return math.isclose(scale, 1.0 / math.sqrt(head_dim), rel_tol=1e-9)

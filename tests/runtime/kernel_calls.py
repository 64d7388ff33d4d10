"""Random legal calls of every operation, and the error of a kernel on one, for tests of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel, KernelFunction
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections

KERNELS = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
# Allowed beside twice the default's own error: about the rounding of one output element.
FLOORS = {"float64": 1e-15, "float32": 1e-6, "float16": 2e-4, "bfloat16": 1e-3}
LENGTHS = (1, 2, 7, 33, 129, 300)
PLACEMENTS = ("contiguous", "contiguous", "transposed", "transposed", "sliced", "strided")

_loaded: dict[tuple[str, str, StaticKey], KernelFunction] = {}


@dataclass(frozen=True)
class Call:
    """Arguments of an operation, tensors included, and the context that describes them."""

    context: SelectionContext
    arguments: tuple[Any, ...]

    def accepts(self, kernel: Kernel) -> bool:
        return self.context.operation in kernel.spec.operations and not rejections(kernel.spec.limits, self.context)

    def default(self) -> Kernel:
        return KERNELS[OPERATIONS[self.context.operation].default_kernel]

    def reference(self) -> tuple[torch.Tensor, ...]:
        wide = (argument.double() if is_floating(argument) else argument for argument in self.arguments)
        return OPERATIONS[self.context.operation].reference(self.context, *wide)

    def run(self, kernel: Kernel) -> tuple[torch.Tensor, ...]:
        """The kernel's outputs. A function is loaded once for all calls with its static key, whatever their sizes."""
        key = (kernel.kernel_id, self.context.operation, OPERATIONS[self.context.operation].static_key(self.context))
        if key not in _loaded:
            _loaded[key] = kernel.load(self.context, {})
        outputs = _loaded[key](*self.arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def on_cpu(self) -> Call:
        arguments = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in self.arguments)
        return Call(self.context.with_device(detect_device("cpu")), arguments)

    def with_gradients(self) -> Call:
        """The same call on leaves that need gradients."""
        arguments = tuple(a.detach().clone().requires_grad_() if is_floating(a) else a for a in self.arguments)
        return Call(replace(self.context, requires_grad=True), arguments)


def is_floating(argument: object) -> bool:
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def relative_error(outputs: tuple[torch.Tensor, ...], reference: tuple[torch.Tensor, ...]) -> float:
    """The largest relative L2 error among the outputs."""

    def error(output: torch.Tensor, exact: torch.Tensor) -> float:
        size, difference = float(exact.norm()), float((output.double() - exact).norm())
        return difference / size if size else difference

    return max(error(output, exact) for output, exact in zip(outputs, reference, strict=True))


def assert_close_to_reference(call: Call, kernel: Kernel) -> None:
    """On another device the default is run on the CPU: on CUDA it refuses, or reads beside, some calls that it need not
    serve there."""
    plain = call.on_cpu()
    outputs = tuple(output.cpu() for output in call.run(kernel))
    expected, reference = plain.run(plain.default()), plain.reference()
    for output, standard in zip(outputs, expected, strict=True):
        assert output.shape == standard.shape
        assert output.dtype == standard.dtype
    assert relative_error(outputs, reference) <= allowed_error(call, expected, reference)


def allowed_error(call: Call, expected: tuple[torch.Tensor, ...], reference: tuple[torch.Tensor, ...]) -> float:
    """Twice the default's own error and a floor, a higher one where few elements make both errors a matter of luck."""
    fewest = min(exact.numel() for exact in reference)
    own_error = relative_error(expected, reference)
    # The default is no judge of itself: its error is bounded apart, at a few roundings even of summed-up gradients.
    floor = FLOORS[call.context.result_dtype]
    assert own_error < 50.0 * floor
    return 2.0 * own_error + floor * (1.0 + 4.0 / math.sqrt(fewest))


def tensor(shape: tuple[int, ...], dtype: str, placement: str = "contiguous") -> torch.Tensor:
    """Standard normal values; "transposed" memory has the second to last dimension swapped with an earlier one."""
    kind = getattr(torch, dtype)
    if placement == "transposed" and len(shape) > 1:
        other = -3 if len(shape) == 4 else 0
        swapped = list(shape)
        swapped[other], swapped[-2] = swapped[-2], swapped[other]
        return torch.randn(swapped).to(kind).transpose(other, -2)
    if placement == "sliced":
        return torch.randn(*shape[:-1], shape[-1] + 3).to(kind)[..., 2:-1]
    if placement == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(kind)[..., ::2]
    return torch.randn(shape).to(kind)


@st.composite
def attention_calls(draw: st.DrawFn, operation: str, dtype: str) -> Call:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    length_q, length_k = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
    if operation == "attention.full":
        length_k = length_q
    elif operation == "attention.cross" and length_k == length_q:
        length_k += 1
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 4)))
    head_dim = draw(st.sampled_from((16, 33, 64)))
    value_dim = draw(st.sampled_from((head_dim, head_dim, head_dim, 24)))
    # At least 256 elements of output: on fewer the ratio of two errors is a matter of luck.
    batch = max(draw(st.integers(1, 2)), math.ceil(256 / (kv_heads * group * length_q * value_dim)))
    shapes = (
        (batch, kv_heads * group, length_q, head_dim),
        (batch, kv_heads, length_k, head_dim),
        (batch, kv_heads, length_k, value_dim),
    )
    placements = (draw(st.sampled_from(PLACEMENTS)) for _ in shapes)
    tensors = [tensor(shape, dtype, placement) for shape, placement in zip(shapes, placements, strict=True)]
    # SDPA itself gives NaN for a causal mask with a negative scale.
    scales = (None, None, 0.3) if operation == "attention.causal" else (None, None, 0.3, -0.05)
    arguments = (*tensors, None, 0.0, draw(st.sampled_from(scales)))
    alignment = draw(st.sampled_from(("top_left", "bottom_right")))
    return Call(OPERATIONS[operation].describe(*arguments, causal_alignment=alignment), arguments)


@st.composite
def row_calls(draw: st.DrawFn, operation: str, dtype: str) -> Call:
    """Calls of norms and gated activations."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    leading = draw(st.sampled_from(((), (1,), (7,), (129,), (1, 1, 5), (3, 1, 33))))
    # At least 64 elements, and not of width 1: the norm of one element is its sign, without an error to compare with.
    width = draw(st.sampled_from([size for size in (7, 33, 129, 1000, 5003) if size * math.prod(leading) >= 64]))

    def rows() -> torch.Tensor:
        return tensor((*leading, width), dtype, draw(st.sampled_from(PLACEMENTS)))

    def vector(center: float) -> torch.Tensor | None:
        kind = draw(st.sampled_from((dtype, dtype, "float32", None)))
        placement = draw(st.sampled_from(("contiguous", "contiguous", "strided")))
        return None if kind is None else tensor((width,), kind, placement) * 0.1 + center

    arguments: tuple[Any, ...]
    features: dict[str, str] = {}
    eps = draw(st.sampled_from((1e-6, 1e-5, 0.5)))
    if operation == "norm.rms":
        x, weight = rows(), vector(1.0)
        arguments = (x, weight, eps, 0.0 if weight is None else draw(st.sampled_from((0.0, 0.0, 1.0))))
    elif operation == "norm.add_rms":
        arguments = (rows(), rows(), vector(1.0), eps)
    elif operation == "norm.layer":
        weight, bias = vector(1.0), vector(0.0)
        bias = None if weight is None or bias is None else bias.to(weight.dtype)
        arguments = (rows(), weight, bias, eps)
    else:
        arguments = (rows(), rows())
        if operation == "mlp.geglu":
            features["approximate"] = draw(st.sampled_from(("none", "tanh")))
    return Call(OPERATIONS[operation].describe(*arguments, **features), arguments)


def quantised(shape: tuple[int, ...], dtype: str, placement: str = "contiguous") -> torch.Tensor:
    """Values that spread over the range of the dtype; a "transposed" matrix is one of columns."""
    if placement == "transposed" and len(shape) == 2:
        return quantised((shape[1], shape[0]), dtype).t()
    drawn = tensor(shape, "float32", placement)
    # Arithmetic would make memory dense.
    room = torch.empty_strided(drawn.shape, drawn.stride(), dtype=getattr(torch, dtype))
    return room.copy_((drawn * (25.0 if dtype == "int8" else 1.0)).clamp(-128.0, 127.0))


@st.composite
def linear_calls(draw: st.DrawFn, operation: str, dtype: str) -> Call:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    leading = draw(st.sampled_from(((), (1,), (7,), (40,), (1, 1, 5), (3, 1, 11))))
    in_features = draw(st.sampled_from((1, 7, 16, 33, 64, 129, 300)))
    # At least 64 elements of output.
    least = -(-64 // math.prod(leading))
    out_features = draw(st.sampled_from([size for size in (1, 5, 16, 40, 72, 130) if size >= least]))
    scales_x: tuple[tuple[int, ...], ...] = ((), (1,), (*leading, 1), leading)
    scales_w: tuple[tuple[int, ...], ...] = ((), (1, 1), (out_features, 1), (out_features,))

    def scale(shape: tuple[int, ...]) -> torch.Tensor:
        return 0.5 + torch.rand(shape).expand(shape)

    arguments = (
        quantised((*leading, in_features), dtype, draw(st.sampled_from(PLACEMENTS))),
        quantised((out_features, in_features), dtype, draw(st.sampled_from(PLACEMENTS))),
        scale(draw(st.sampled_from(scales_x))),
        scale(draw(st.sampled_from(scales_w))),
        draw(st.sampled_from((None, tensor((out_features,), "bfloat16")))),
    )
    return Call(OPERATIONS[operation].describe(*arguments), arguments)


def calls(operation: str, dtype: str) -> st.SearchStrategy[Call]:
    if operation.startswith("linear"):
        return linear_calls(operation, dtype)
    return attention_calls(operation, dtype) if operation.startswith("attention") else row_calls(operation, dtype)


def plain_call(
    operation: str, dtype: str, *, group: int = 1, length_q: int = 33, length_k: int = 33, alignment: str = "top_left"
) -> Call:
    """A call of the operation with its usual features on contiguous tensors; cross attention has 37 more keys."""
    torch.manual_seed(0)
    if operation.startswith("attention"):
        lengths = {"attention.full": (length_q, length_q), "attention.cross": (length_q, length_q + 37)}
        length_q, length_k = lengths.get(operation, (length_q, length_k))
        query = tensor((2, 2 * group, length_q, 32), dtype)
        key, value = tensor((2, 2, length_k, 32), dtype), tensor((2, 2, length_k, 32), dtype)
        arguments: tuple[object, ...] = (query, key, value, None, 0.0, None)
        return Call(OPERATIONS[operation].describe(*arguments, causal_alignment=alignment), arguments)
    if operation.startswith("linear"):
        scales = torch.rand(33, 1) + 0.5, torch.rand(40, 1) + 0.5
        arguments = (quantised((33, 129), dtype), quantised((40, 129), dtype), *scales, tensor((40,), "bfloat16"))
        return Call(OPERATIONS[operation].describe(*arguments), arguments)
    x, other, weight = tensor((33, 129), dtype), tensor((33, 129), dtype), tensor((129,), dtype)
    arguments = {
        "norm.rms": (x, weight, 1e-6, 0.0),
        "norm.add_rms": (x, other, weight, 1e-6),
        "norm.layer": (x, weight, weight + 1, 1e-5),
    }.get(operation, (x, other))
    return Call(OPERATIONS[operation].describe(*arguments), arguments)

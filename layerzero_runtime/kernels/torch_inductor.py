"""Norms and gated activations compiled by Inductor, one fused loop nest for all sizes.

The functions are traced and compiled directly, not through `torch.compile`: Dynamo's guards cost about 20 us per call,
and after 8 compilations of one frame it would run the function uncompiled. What its guards would check is in the key
(dtypes, which tensors are present) or in the limits (contiguity, no gradients); sizes are symbolic, and a graph that
came out specialised to some of them is refused when it is loaded.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import KernelExecutionError
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

_RowFunction = Callable[..., "tuple[Tensor, ...]"]

_DTYPES = ("float32", "float16", "bfloat16")
# Rows and width of the traced example. Sizes are symbolic: these only have to be large, and different, because equal
# sizes would be traced as one.
_EXAMPLE_ROWS, _EXAMPLE_WIDTH = 2048, 4096
_PARALLEL_ELEMENTS = 32768  # below, loops are serial: torch's own grain size (at::internal::GRAIN_SIZE)
_COMPILING = threading.Lock()  # Inductor's settings are those of the process


def _compile(function: _RowFunction, *examples: Tensor) -> Callable[[list[Any]], tuple[Tensor, ...]]:
    """Compile a function of tensors for all sizes of its example's dimensions; takes from one second to ten.

    Returns:
        A function of the list of tensors, which gives a tuple; the first tensor's size decides whether it is parallel.

    Raises:
        KernelExecutionError: the compiled code would hold for some sizes only.
    """
    # Left to itself, Inductor decides from the example's sizes whether the loops are parallel, or takes what an earlier
    # process with other sizes left in its cache. A parallel loop over few elements costs more than it saves: 2 us on an
    # idle machine, a whole time slice where another process has the core that a thread is waiting for.
    serial = _compile_loops(function, examples, {"cpp.threads": 1})
    parallel = _compile_loops(function, examples, {"cpp.dynamic_threads": True})

    def run(tensors: list[Any]) -> tuple[Tensor, ...]:
        return (serial if tensors[0].numel() < _PARALLEL_ELEMENTS else parallel)(tensors)

    return run


def _compile_loops(
    function: _RowFunction, examples: tuple[Tensor, ...], settings: dict[str, Any]
) -> Callable[[list[Any]], tuple[Tensor, ...]]:
    import torch
    import torch._inductor.config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental import _config as shape_config
    from torch.fx.experimental.proxy_tensor import make_fx

    with (
        _COMPILING,
        torch.no_grad(),
        inductor_config.patch(settings),
        # Traces sizes 0 and 1 like any other.
        shape_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
    ):
        graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled: Any = compile_fx_inner(graph, inputs)
    sizes = inputs[0].fake_mode.shape_env
    narrow = [str(bounds) for bounds in sizes.var_to_range.values() if bounds.lower > 1]
    if sizes.guards or narrow:
        conditions = [str(guard.expr) for guard in sizes.guards] + narrow
        raise KernelExecutionError(
            f"Inductor of torch {torch.__version__} specialised {function.__name__} to {', '.join(conditions)}; "
            "code for all sizes is required: deny the torch.inductor kernels, or use another version of torch"
        )
    return compiled  # type: ignore[no-any-return]


def _example_rows(dtype: str) -> Tensor:
    import torch

    return torch.empty(_EXAMPLE_ROWS, _EXAMPLE_WIDTH, dtype=getattr(torch, dtype))


def _example_width(dtype: str) -> Tensor:
    import torch

    return torch.empty(_EXAMPLE_WIDTH, dtype=getattr(torch, dtype))


@lru_cache(maxsize=64)
def _scalar(value: float) -> Tensor:
    """A number as a tensor without dimensions, so that it is an input of the compiled code instead of a constant."""
    import torch

    return torch.tensor(value, dtype=torch.float32)


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _normalised(rows: Tensor, eps: Tensor) -> Tensor:
    return rows * (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    baked_offset, has_weight = context.offset, context.has_weight

    def rms(x: Tensor, eps: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
        output = _normalised(x.float(), eps)
        return ((output * (weight[0].float() + baked_offset) if has_weight else output).to(x.dtype),)

    weights = (_example_width(context.dtype),) if has_weight else ()
    compiled = _compile(rms, _example_rows(context.dtype), _scalar(1e-6), *weights)

    def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        arguments = [_as_rows(x), _scalar(eps), weight] if has_weight else [_as_rows(x), _scalar(eps)]
        return compiled(arguments)[0].view(x.shape)

    return normalise


def _load_add_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    has_weight = context.has_weight

    def add_rms(x: Tensor, residual: Tensor, eps: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        output = _normalised(total.float(), eps)
        return (output * weight[0].float() if has_weight else output).to(x.dtype), total

    weights = (_example_width(context.dtype),) if has_weight else ()
    rows = _example_rows(context.dtype)
    compiled = _compile(add_rms, rows, rows.clone(), _scalar(1e-6), *weights)

    def normalise(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        arguments = [_as_rows(x), _as_rows(residual), _scalar(eps)]
        output, total = compiled([*arguments, weight] if has_weight else arguments)
        return output.view(x.shape), total.view(x.shape)

    return normalise


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    has_weight, has_bias = context.has_weight, context.has_bias

    def layer(x: Tensor, eps: Tensor, *weight_and_bias: Tensor) -> tuple[Tensor, ...]:
        rows = x.float()
        output = _normalised(rows - rows.mean(dim=-1, keepdim=True), eps)
        if has_weight:
            output = output * weight_and_bias[0].float()
        if has_bias:
            output = output + weight_and_bias[-1].float()
        return (output.to(x.dtype),)

    vectors = [_example_width(context.dtype) for present in (has_weight, has_bias) if present]
    compiled = _compile(layer, _example_rows(context.dtype), _scalar(1e-5), *vectors)

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        arguments: list[Tensor | None] = [_as_rows(x), _scalar(eps)]
        if has_weight:
            arguments.append(weight)
        if has_bias:
            arguments.append(bias)
        return compiled(arguments)[0].view(x.shape)

    return normalise


def _load_activation(function: Callable[[Tensor], Tensor], context: SelectionContext) -> KernelFunction:
    def gated(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return ((function(gate.float()) * up.float()).to(gate.dtype),)

    rows = _example_rows(context.dtype)
    compiled = _compile(gated, rows, rows.clone())

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return compiled([_as_rows(gate), _as_rows(up)])[0].view(gate.shape)

    return activate


def _load_swiglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import silu

    return _load_activation(silu, context)


def _load_geglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import gelu

    return _load_activation(_gelu_tanh if context.approximate == "tanh" else gelu, context)


def _gelu_tanh(x: Tensor) -> Tensor:
    """(1 + tanh(y)) / 2 = sigmoid(2y): one exponential instead of a tanh, three times as fast as Inductor's form."""
    return x * (2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)).sigmoid()


def _declare(kernel_id: str, operation: str, traced_as: str) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cpu",),
        dtypes=_DTYPES,
        requires=("torch", "cxx_compiler"),
        min_version="2.13",  # of 2.11, the code holds for no more rows than the example has
        requires_contiguous=True,
        compiles=True,
        traced_as=traced_as,
        priority=40,
    )


# In a graph each is what compiles to the same loops. Of torch.layer_norm Inductor makes one pass over the rows, which
# takes 1.4 to 1.7 times as long as the two passes here.
KERNELS = (
    Kernel(_declare("torch.inductor.rms_norm", "norm.rms", "torch.rms_norm"), _load_rms),
    Kernel(_declare("torch.inductor.add_rms_norm", "norm.add_rms", "torch.add_rms_norm"), _load_add_rms),
    Kernel(_declare("torch.inductor.layer_norm", "norm.layer", "torch.layer_norm.vector_norm"), _load_layer),
    Kernel(_declare("torch.inductor.swiglu", "mlp.swiglu", "torch.swiglu"), _load_swiglu),
    Kernel(_declare("torch.inductor.geglu", "mlp.geglu", "torch.geglu"), _load_geglu),
)

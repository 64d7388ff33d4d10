"""Functions compiled by Dynamo with a backend that keeps the graphs, for tests of calls inside torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch.fx import GraphModule

import layerzero_runtime as lz
from layerzero_runtime.integrations import in_force
from layerzero_runtime.kernel import KernelFunction, KernelSpec
from tests.runtime.public_calls import Outputs, PublicCall

# What Dynamo makes of the shapes of tensors.
SHAPES = frozenset({"Size", "getitem", "size"})
# Of kernels that Dynamo traces, the function that makes them out, in the words of `Graphs.functions`.
TRACED = {
    "torch.sdpa": {"scaled_dot_product_attention"},
    "torch.sdpa.flash_cpu": {"_scaled_dot_product_flash_attention_for_cpu"},
    "torch.sdpa.flash_cpu_folded": {"_scaled_dot_product_flash_attention_for_cpu", "reshape"},
    "torch.sdpa.math": {"_scaled_dot_product_attention_math"},
    "torch.rms_norm": {"rms_norm"},
    "torch.rms_norm.vector_norm": {"linalg_vector_norm"},
    "torch.add_rms_norm": {"rms_norm", "add"},
    "torch.add_rms_norm.vector_norm": {"linalg_vector_norm", "add"},
    "torch.layer_norm": {"layer_norm"},
    "torch.layer_norm.vector_norm": {"linalg_vector_norm"},
    "torch.swiglu": {"silu", "mul"},
    "torch.swiglu.in_place": {"silu", "mul_"},
    "torch.geglu": {"gelu", "mul"},
    "torch.geglu.in_place": {"gelu", "mul_"},
}


class Graphs:
    """A backend of torch.compile that runs what Dynamo traced as it is, and keeps it.

    Attributes:
        traced: the graphs, in the order in which they were compiled.
        ran: of each call, the index of its graph.
    """

    def __init__(self) -> None:
        self.traced: list[GraphModule] = []
        self.ran: list[int] = []

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        index = len(self.traced)
        self.traced.append(graph)

        def run(*arguments: Any) -> Any:
            self.ran.append(index)
            return graph.forward(*arguments)

        return run

    def __len__(self) -> int:
        return len(self.traced)

    def functions(self) -> list[frozenset[str]]:
        """Of each graph, the names of what it calls, but for what reads shapes; operators have their namespace."""
        return [_functions(graph) - SHAPES for graph in self.traced]


def _functions(graph: GraphModule) -> frozenset[str]:
    called = [node.target for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    return frozenset(
        str(target) if isinstance(target, str | torch._ops.OpOverload) else str(getattr(target, "__name__", target))
        for target in called
    )


@contextmanager
def compiled(
    function: Callable[..., Any], *, dynamic: bool | None = True, backend: Any = None, **options: Any
) -> Iterator[tuple[Callable[..., Any], Graphs]]:
    """(the function compiled without graph breaks, its graphs), with no compilations of others before it."""
    graphs = Graphs()
    options = {"fullgraph": True, "dynamic": dynamic, "backend": graphs if backend is None else backend, **options}
    torch._dynamo.reset()
    try:
        # What an earlier run left on disk says nothing of the code as it is.
        with torch._dynamo.config.patch(recompile_limit=64), inductor_config.patch(force_disable_caches=True):
            yield torch.compile(function, **options), graphs
    finally:
        torch._dynamo.reset()
        # Else each snapshot of the tests that follow would be asked whether it still selects as this one did.
        in_force.give_up()


@contextmanager
def registered(spec: KernelSpec, function: KernelFunction) -> Iterator[None]:
    lz.register_kernel(spec, function)
    try:
        yield
    finally:
        lz.unregister_kernel(spec.kernel_id)


@contextmanager
def policy_in_force(policy: lz.Policy) -> Iterator[None]:
    lz.set_policy(policy)
    try:
        yield
    finally:
        lz.set_policy(None)


def on_tensors(call: PublicCall) -> tuple[Callable[..., Outputs], list[torch.Tensor]]:
    """A call as a function of its tensors, and these."""

    def function(*tensors: torch.Tensor) -> Outputs:
        given = iter(tensors)
        return call.on(*(next(given) if isinstance(part, torch.Tensor) else part for part in call.arguments)).run()

    return function, [part for part in call.arguments if isinstance(part, torch.Tensor)]

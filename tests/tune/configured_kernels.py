"""Norms with configurations to choose from, as a user's own module declares them: the fewer passes the faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

OWN_PASSES = 8


def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    passes = configuration.get("passes", OWN_PASSES)
    if configuration.get("order") == "broken":
        raise RuntimeError("this order does not compile")

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        for _ in range(passes):
            scaled = x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        return scaled if weight is None else scaled * (weight + offset)

    return rms_norm


def _is_valid(configuration: Configuration, context: SelectionContext) -> bool:
    return configuration["passes"] < 100 and context.device is not None


SPACE = ConfigurationSpace({"passes": (1, 4, 16, 100), "order": ("rows", "columns", "broken")}, _is_valid)


def _kernel(name: str, space: ConfigurationSpace | None) -> Kernel:
    spec = KernelSpec(kernel_id=f"configured.{name}", operations=("norm.rms",), platforms=("cpu",), dtypes=("float32",))
    return Kernel(spec, load, space)


PASSES = _kernel("passes", SPACE)
# 16 x 4 x 4 configurations: more than are enumerated.
MANY = _kernel(
    "many",
    ConfigurationSpace({"passes": tuple(range(1, 17)), "order": ("a", "b", "c", "d"), "tile": (16, 32, 64, 128)}),
)

KERNELS = (PASSES,)

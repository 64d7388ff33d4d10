"""`Operation`: one declaration from which keys, table layout, inputs, roofline and evaluation derive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError

Sizes = tuple[int, ...]
StaticKey = tuple[Any, ...]

# Features of every operation that tunings leave at these values.
USUAL: Mapping[str, Any] = MappingProxyType(
    {
        "requires_grad": False,
        "requires_deterministic": False,
        "quant_format": None,
        "other_output_dtype": None,
        "workspace_limit": None,
    }
)


@dataclass(frozen=True)
class Axis:
    """A bucketed feature: an integer attribute of the context, searched by comparison.

    `tied` names an attribute and its value under which this axis repeats the one before it, so that nothing needs to
    split on it (with a square mask, the key length is the query length). `fields` gives the fields of a context with
    this size; by default the field of the axis's own name.
    """

    name: str
    tied: tuple[str, str] | None = None
    fields: Callable[[SelectionContext, int], Mapping[str, int]] | None = None

    def is_tied(self, context: SelectionContext) -> bool:
        return self.tied is not None and getattr(context, self.tied[0]) == self.tied[1]


@dataclass(frozen=True)
class TensorArgument:
    """A tensor of the call: its shape and dtype as functions of the context.

    `center` and `spread` are the mean and standard deviation of its random values in measurements.
    """

    name: str
    shape: Callable[[SelectionContext], Sizes]
    dtype: Callable[[SelectionContext], str] = lambda context: context.dtype
    present: Callable[[SelectionContext], bool] = lambda context: True
    center: float = 0.0
    spread: float = 1.0


@dataclass(frozen=True)
class Matrices:
    """What kernels of an operation compute apart from each other.

    Attributes:
        count: the axis that counts them.
        rows: the axis of the rows that each has.
        each: how many there are to one of the count, by a call's static features.
    """

    count: int
    rows: int
    each: Callable[[SelectionContext], int]


@dataclass(frozen=True)
class Operation:
    """What a kernel may compute, declared once.

    Attributes:
        name: dotted name, such as "attention.causal".
        required: sizes that a context must give.
        static: attributes that are in every static key, after mode and dtype.
        plain: attributes with their usual values; one that differs joins the key, so that a feature which was not
            measured makes a miss.
        fixed: further attributes that follow from the static ones.
        axes: the bucketed features, in the order of the table function's parameters.
        monotone: attributes that follow from the sizes and never fall when one of them grows.
        tensors: the tensor arguments.
        outputs: shapes of the results.
        arguments: positional arguments of a kernel function, from the tensors by name.
        describe: the way back: the context of such arguments; keywords give the features that no argument shows.
        default_kernel: id of what the user would have called without us.
        flops: floating-point operations of one call.
        reference: the same arguments in float64 to results in float64 (a tuple), written apart from every kernel.
        misfit: why the sizes of a context make it another operation, None if they do not.
        matrices: what kernels compute apart from each other; None where that says nothing of their times.
        graded: of the static attributes one that is a number: what is measured at one of its values tells of the
            others, the more the closer they are.
    """

    name: str
    required: tuple[str, ...]
    static: tuple[str, ...]
    plain: Mapping[str, Any]
    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    monotone: tuple[str, ...]
    tensors: tuple[TensorArgument, ...]
    outputs: Callable[[SelectionContext], tuple[Sizes, ...]]
    arguments: Callable[[SelectionContext, Mapping[str, Any]], tuple[Any, ...]]
    describe: Callable[..., SelectionContext]
    default_kernel: str
    flops: Callable[[SelectionContext], int]
    reference: Callable[..., tuple[Any, ...]]
    misfit: Callable[[SelectionContext], str | None] = lambda context: None
    matrices: Matrices | None = None
    graded: str | None = None

    def validate(self, context: SelectionContext) -> None:
        """Check that the context describes a call of this operation.

        Raises:
            ContextError: a size is missing, or the sizes make it a call of another operation.
        """
        missing = [name for name in self.required if getattr(context, name) is None]
        if missing:
            raise ContextError(f"{self.name} needs {', '.join(missing)}; required: {', '.join(self.required)}")
        misfit = self.misfit(context)
        if misfit is not None:
            raise ContextError(misfit)

    def static_key(self, context: SelectionContext) -> StaticKey:
        """(mode, dtype, static features..., ((name, value) of every feature that is not plain))."""
        unusual = tuple(
            (name, value) for name, usual in self.plain.items() if (value := getattr(context, name)) != usual
        )
        return (context.mode, context.dtype, *(getattr(context, name) for name in self.static), unusual)

    def sizes(self, context: SelectionContext) -> Sizes:
        """The bucketed features of the context, one integer per axis."""
        return tuple(getattr(context, axis.name) for axis in self.axes)

    def with_sizes(self, context: SelectionContext, sizes: Sizes) -> SelectionContext:
        """A context with the static features of `context` and these sizes: the inverse of `sizes`.

        Where several calls have the sizes (batch x kv heads), the one with a single key/value head.
        """
        changes: dict[str, Any] = {}
        for axis, size in zip(self.axes, sizes, strict=True):
            changes |= {axis.name: size} if axis.fields is None else axis.fields(context, size)
        return context.resized(changes)

    def axes_of(self, context: SelectionContext) -> tuple[Axis, ...]:
        """The axes that are free under the context's static features."""
        return tuple(axis for axis in self.axes if not axis.is_tied(context))

    def present_tensors(self, context: SelectionContext) -> tuple[TensorArgument, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.present(context))

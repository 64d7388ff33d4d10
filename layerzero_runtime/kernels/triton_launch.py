"""Launches of Triton kernels at little cost on the host.

Triton's own launch, `kernel[grid](...)`, binds and classifies all arguments anew in every call, and compiles wherever
their divisibility is new. Here the two forms that a kernel needs, for addresses and strides that are multiples of 16
and for any, are compiled when it is loaded, and a call starts the one that fits by its handle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import log_warning

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What Triton's compiler makes use of: an address in bytes, or a number of elements, that is a multiple of this.
_DIVISOR = 16
# Neither 1 nor a multiple of 16, so that code for it is code for all.
_ANY = _DIVISOR + 1

# (programs, tensors, numbers worth being multiples of 16, other numbers)
Launch = Callable[[int, "Sequence[Tensor]", tuple[int, ...], tuple[int | float, ...]], None]
# What a compiled kernel is started by: its launcher, the loaded function, and its metadata.
_Handle = tuple[Callable[..., None], int, Any]

_warned = False


@dataclass(frozen=True)
class TritonForm:
    """A kernel for tensors of given dtypes and all sizes.

    Attributes:
        kernel: what `triton.jit` has made, with parameters in the order that `triton_sources` describes.
        pointers: dtypes of its tensors; None for one that the calls do not have.
        divisible: how many numbers behind the pointers are worth being multiples of 16.
        numbers: types of the numbers behind those.
        constants: its constants by name.
        num_warps: warps per program.
        num_stages: tiles that its loops with matrix products keep in flight.
    """

    kernel: Any
    pointers: tuple[torch.dtype | None, ...]
    divisible: int
    numbers: tuple[type[int] | type[float], ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1

    def launcher(self, context: SelectionContext) -> Launch:
        """A function that starts the kernel on the current stream of the tensors' device.

        All is compiled here, and made ready on the device of the context; another of the same product is made ready by
        its first call. Under Triton's interpreter, and with a version of Triton whose compiled kernels cannot be
        started by their handles, it launches in Triton's own way.
        """
        from triton.runtime.jit import JITFunction

        if not isinstance(self.kernel, JITFunction):
            return self.launch
        import torch

        index = None if context.device is None else context.device.index
        prepared = _PreparedLaunch(self)
        with torch.cuda.device(index):
            compiled = [self.compile(aligned=aligned) for aligned in (True, False)]
            try:
                prepared.add_handles(torch.cuda.current_device(), *compiled)
            except (AttributeError, TypeError) as error:
                _warn_of_plain_launches(error)
                return self.launch
        return prepared

    def compile(self, *, aligned: bool) -> Any:
        """The kernel compiled for the current device, for tensors and numbers that are all multiples of 16, or for any.

        What Triton's compiler or the device's limits refuse, raises.
        """
        return self.kernel.warmup(
            *self._example_arguments(aligned),
            grid=(1,),
            **self.constants,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        # As Triton's default is up to 3.9, and will not be later.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def start_nothing(self, handle: _Handle, stream: int) -> None:
        """A launch of 0 programs, which checks that the handle takes what a launch gives it.

        Raises:
            TypeError: it does not.
        """
        run, function, metadata = handle
        pointers = [None if dtype is None else 0 for dtype in self.pointers]
        numbers = [kind(1) for kind in self.numbers]
        constants = self.constants.values()
        run(
            0,
            1,
            1,
            stream,
            function,
            metadata,
            None,
            None,
            None,
            *pointers,
            *[1] * self.divisible,
            *numbers,
            *constants,
        )

    def launch(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        divisible: tuple[int, ...],
        numbers: tuple[int | float, ...],
    ) -> None:
        """A launch in Triton's own way."""
        import torch

        pointers: list[Any] = list(tensors)
        for place, dtype in enumerate(self.pointers):
            if dtype is None:
                pointers.insert(place, None)
        with torch.cuda.device(tensors[0].get_device()):  # which does nothing for that of a CPU
            self.kernel[(programs,)](
                *pointers,
                *divisible,
                *numbers,
                **self.constants,
                **self._options(),
            )

    def _example_arguments(self, aligned: bool) -> list[Any]:
        import torch

        def example(dtype: torch.dtype) -> Tensor:
            # Of a tensor, Triton's compiler looks at the dtype and the address alone.
            storage = torch.empty(_DIVISOR, dtype=dtype)
            return storage if aligned else storage[1:]

        return [
            *(None if dtype is None else example(dtype) for dtype in self.pointers),
            *[_DIVISOR if aligned else _ANY] * self.divisible,
            *(kind(_ANY) for kind in self.numbers),
        ]


class _PreparedLaunch:
    """Launches of one form by its handles, which belong to a device."""

    __slots__ = (
        "_absent",
        "_address",
        "_aligned",
        "_constants",
        "_current_device",
        "_form",
        "_kept",
        "_stream",
        "_unaligned",
    )

    def __init__(self, form: TritonForm) -> None:
        import torch

        self._form = form
        self._absent = tuple(place for place, dtype in enumerate(form.pointers) if dtype is None)
        self._constants = tuple(form.constants.values())
        self._aligned: dict[int, _Handle] = {}
        self._unaligned: dict[int, _Handle] = {}
        self._kept: list[Any] = []
        self._address: Callable[[Tensor], int] = torch.Tensor.data_ptr
        self._current_device: Callable[[], int] = torch._C._cuda_getDevice
        self._stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream

    def add_handles(self, index: int, *compiled: Any) -> None:
        """Make ready on a device, which is the current one, what was compiled for it: aligned, unaligned.

        Raises:
            AttributeError, TypeError: the compiled kernels cannot be started by their handles.
        """
        handles = []
        for part in compiled:
            # `run` first: it loads the function.
            handle = part.run, part.function, part.packed_metadata
            self._form.start_nothing(handle, self._stream(index))
            handles.append(handle)
        self._kept += compiled  # which would unload their functions at their end
        self._aligned[index], self._unaligned[index] = handles

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        divisible: tuple[int, ...],
        numbers: tuple[int | float, ...],
    ) -> None:
        index = tensors[0].get_device()
        pointers: list[Any] = list(map(self._address, tensors))
        bits = reduce(or_, (*pointers, *divisible))
        handle = (self._unaligned if bits % _DIVISOR else self._aligned).get(index)
        if handle is None or self._current_device() != index:
            self._launch_elsewhere(index, programs, tensors, divisible, numbers)
            return
        for place in self._absent:
            pointers.insert(place, None)
        run, function, metadata = handle
        stream = self._stream(index)
        run(
            programs,
            1,
            1,
            stream,
            function,
            metadata,
            None,
            None,
            None,
            *pointers,
            *divisible,
            *numbers,
            *self._constants,
        )

    def _launch_elsewhere(
        self,
        index: int,
        programs: int,
        tensors: Sequence[Tensor],
        divisible: tuple[int, ...],
        numbers: tuple[int | float, ...],
    ) -> None:
        """A launch on a device that is not the current one, or not ready yet."""
        import torch

        with torch.cuda.device(index):
            if index not in self._aligned:
                self.add_handles(index, *(self._form.compile(aligned=aligned) for aligned in (True, False)))
            self(programs, tensors, divisible, numbers)


def _warn_of_plain_launches(error: Exception) -> None:
    """Counted for each kernel, logged once."""
    global _warned
    import triton

    from layerzero_runtime.dispatch import count

    count("triton_plain_launches")
    if not _warned:
        _warned = True
        log_warning(
            f"kernels compiled by Triton {triton.__version__} cannot be started by their handles "
            f"({type(error).__name__}: {error}); they are launched in Triton's own way, which costs tens of "
            "microseconds per call: use a version of Triton from 3.4 to 3.9"
        )

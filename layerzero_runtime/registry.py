"""`Registry`: the kernels known to a snapshot, by id and by operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Kernel


class Registry:
    """An immutable collection of kernels; candidates of an operation are found in O(1).

    Raises:
        SpecError: two kernels have one id.
    """

    __slots__ = ("_by_id", "_by_operation")

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        by_id: dict[str, Kernel] = {}
        by_operation: dict[str, list[Kernel]] = {}
        for kernel in kernels:
            if kernel.kernel_id in by_id:
                raise SpecError(f"kernel {kernel.kernel_id!r} is registered twice; give one of them another kernel_id")
            by_id[kernel.kernel_id] = kernel
            for operation in kernel.spec.operations:
                by_operation.setdefault(operation, []).append(kernel)
        self._by_id = by_id
        # Without a measurement, priority decides, and the id breaks ties.
        self._by_operation = {
            operation: tuple(sorted(found, key=lambda kernel: (-kernel.spec.priority, kernel.kernel_id)))
            for operation, found in by_operation.items()
        }

    def with_kernels(self, added: Iterable[Kernel]) -> Registry:
        """A registry with further kernels.

        Raises:
            SpecError: an id is taken.
        """
        return Registry((*self, *added))

    def without(self, kernel_id: str) -> Registry:
        """A registry without one of its kernels.

        Raises:
            SpecError: no kernel has the id.
        """
        if kernel_id not in self._by_id:
            raise SpecError(f"no kernel {kernel_id!r} is registered; registered: {', '.join(sorted(self._by_id))}")
        return Registry(kernel for kernel in self if kernel.kernel_id != kernel_id)

    def __iter__(self) -> Iterator[Kernel]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, kernel_id: str) -> Kernel | None:
        return self._by_id.get(kernel_id)

    def candidates(self, operation: str) -> tuple[Kernel, ...]:
        """The kernels of an operation, best priority first; empty if there are none."""
        return self._by_operation.get(operation, ())

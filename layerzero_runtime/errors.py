"""The errors that the library raises on purpose: what was wrong, the value, what is allowed, the next step."""

from __future__ import annotations

from collections.abc import Mapping


class LayerZeroError(Exception):
    """Base of all errors raised by LayerZero."""


class ContextError(LayerZeroError, ValueError):
    """A field of a context has a value that is not allowed."""


class ContextTypeError(LayerZeroError, TypeError):
    """A field of a context has a value of the wrong type."""


class SpecError(LayerZeroError, ValueError):
    """A kernel's declaration contradicts itself or an existing one."""


class NoKernelAvailableError(LayerZeroError):
    """No registered kernel accepts the call.

    Attributes:
        rejections: for each kernel id considered, why it was refused (one sentence per violated limit).
    """

    def __init__(self, message: str, rejections: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.rejections: dict[str, tuple[str, ...]] = dict(rejections or {})
        lines = [message]
        for kernel_id, reasons in self.rejections.items():
            lines.append(f"  {kernel_id}: " + "; ".join(reasons))
        super().__init__("\n".join(lines))


class TableError(LayerZeroError):
    """A generated table cannot be used: damaged, of another schema, or holding more than literals and decisions."""


class PolicyLoadError(LayerZeroError, ValueError):
    """A policy is not valid, or its file cannot be read; the message names file, line and key where there are any."""


class QueueFullError(LayerZeroError):
    """More selections wait than the queue holds; the caller may wait and ask again, or select at once."""


class DeviceError(LayerZeroError):
    """A device that was asked for is not on this machine, or its driver does not answer."""


class KernelExecutionError(LayerZeroError):
    """A kernel failed while it was prepared or run, and nothing else could serve the call."""


class KernelOutputError(KernelExecutionError):
    """A kernel gave a result of another shape, dtype or device than the call asks for."""


class RanksDifferError(LayerZeroError):
    """Ranks do not select alike, or some of them did not answer in time.

    Attributes:
        differing: for each rank that differs from the majority, the parts of its snapshot in which it does.
        unanswered: the ranks that did not answer.
    """

    def __init__(
        self, message: str, differing: Mapping[int, tuple[str, ...]] | None = None, unanswered: tuple[int, ...] = ()
    ) -> None:
        self.differing: dict[int, tuple[str, ...]] = dict(differing or {})
        self.unanswered = unanswered
        super().__init__(message)


class ResultsError(LayerZeroError):
    """A results store cannot be read or written."""

"""A process of its own for measuring, so that a kernel's crash costs one measurement."""

from layerzero_tune.worker.process import WorkerProcess

__all__ = ["WorkerProcess"]

"""Counters as a dictionary, and in Prometheus' text exposition format."""

from __future__ import annotations

from collections.abc import Mapping

_GAUGES = frozenset({"live_cache_entries"})


class Statistics(dict[str, int]):
    """Counters by name.

    Attributes:
        broken: ids of the kernels whose breakers are open.
        throttled: by index the GPUs that are slowed down at this moment, with the reasons.
    """

    def __init__(
        self,
        values: Mapping[str, int],
        broken: tuple[str, ...] = (),
        throttled: Mapping[int, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(values)
        self.broken = broken
        self.throttled = dict(throttled or {})

    def prometheus(self) -> str:
        """The text of version 0.0.4 of the exposition format, for an endpoint that Prometheus scrapes."""
        lines = []
        for name, value in sorted(self.items()):
            kind, suffix = ("gauge", "") if name in _GAUGES else ("counter", "_total")
            metric = f"layerzero_{name}{suffix}"
            lines += [f"# TYPE {metric} {kind}", f"{metric} {value}"]
        lines.append("# TYPE layerzero_kernel_broken gauge")
        lines += [f'layerzero_kernel_broken{{kernel="{kernel_id}"}} 1' for kernel_id in self.broken]
        lines.append("# TYPE layerzero_gpu_throttled gauge")
        lines += [
            f'layerzero_gpu_throttled{{gpu="{index}",reason="{reason}"}} 1'
            for index, reasons in self.throttled.items()
            for reason in reasons
        ]
        return "\n".join(lines) + "\n"

"""The parts of a comparison in words, those of the generated modules where they have some."""

from __future__ import annotations

from collections.abc import Mapping

from layerzero_runtime.device import DeviceSpec
from layerzero_tune.compile.form import Step
from layerzero_tune.compile.judge import describe_choice
from layerzero_tune.diff.ranges import Ranges
from layerzero_tune.diff.regions import Chain, Region
from layerzero_tune.diff.side import SideEntry


def describe_device(device: DeviceSpec) -> str:
    traits = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in device.to_dict().items()
        if name not in ("name", "platform")
    ]
    return f"{device.name} ({', '.join(traits)})" if traits else device.name


def describe_ranges(ranges: Ranges) -> str:
    return ", ".join(f"{name} {low} to {high}" for name, (low, high) in ranges.items())


def describe_place(region: Region, old: SideEntry, new: SideEntry) -> str:
    """The ranges of a region; those that span all that both tables measured go without saying."""
    before, after = old.ranges, new.ranges
    told = {
        name: (low, high)
        for name, (low, high) in region.ranges.items()
        if name not in before
        or low > max(before[name][0], after[name][0])
        or high < min(before[name][1], after[name][1])
    }
    return describe_ranges(told) or "all sizes"


def describe_chain(chain: Chain) -> str:
    """Plans with their guards: "a if stride_last_dim is 1, else b"."""
    return ", else ".join(map(_describe_step, chain)) or "a miss"


def _describe_step(step: Step) -> str:
    guards = " and ".join(f"{guard.field} is {guard.required}" for guard in step.guards)
    return f"{describe_choice(step.choice)} if {guards}" if guards else describe_choice(step.choice)


def describe_coverage(ranges: Ranges, max_product: int | None) -> str:
    text = describe_ranges(ranges)
    return text if max_product is None else f"{text}, {' * '.join(ranges)} at most {max_product}"


def describe_identity(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What a kernel was measured with, before and now; empty where that is the same."""
    if old["version"] != new["version"]:
        return f"{new['library']} {old['version']} -> {new['version']}"
    return "its code has changed" if old["source"] != new["source"] else ""


def speed(factor: float | None, digits: int = 2) -> str:
    return "-" if factor is None else f"{factor:.{digits}f}x"


def percent(factor: float | None) -> str:
    """A factor as a change: 0.98 is "-2.0%"."""
    if factor is None:
        return "-"
    text = f"{100 * (factor - 1):+.1f}%"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"

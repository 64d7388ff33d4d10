"""A `Comparison` as a text for people, apart from where it is printed: the summary first, then the largest changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from layerzero_tune.compile.emit import describe_key
from layerzero_tune.compile.judge import TIE_MARGIN, describe_choice
from layerzero_tune.diff.comparison import Comparison, CoverageChange, Effect, KernelChange, RegionChange
from layerzero_tune.diff.reading import Pairs
from layerzero_tune.diff.side import EntryKey, Side
from layerzero_tune.diff.summary import SpeedSummary, summarise
from layerzero_tune.diff.words import (
    counted,
    describe_chain,
    describe_coverage,
    describe_device,
    describe_identity,
    describe_place,
    percent,
    speed,
)

# Changes that a list names; the others are counted.
LARGEST = 10
_KERNEL_COLUMNS = ("kernel", "shapes before", "shapes now", "what it was measured with")
_SPEED_COLUMNS = ("operation", "mode", "shapes", "other plan", "speed", "time", "worst", "best", "total time")


@dataclass(frozen=True)
class Group:
    """Lines under a static key."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A part of the text: a title, paragraphs, then a table or groups of lines; parts may be empty."""

    title: str
    text: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    groups: tuple[Group, ...] = ()


def document_of(comparison: Comparison, weighing: str) -> tuple[Section, ...]:
    """The text; `weighing` says which shapes count and how much, such as "each measured shape counts once"."""
    return (
        _tables(comparison),
        _summary(comparison, weighing),
        *_changes(comparison),
        *_coverage(comparison),
        *_kernels(comparison.kernels),
    )


def devices_section(pairs: Pairs) -> tuple[Section, ...]:
    """Which devices have a table on one side alone; nothing where none has."""
    text = tuple(
        f"{what}: {describe_device(side.device)}, {side.path}"
        for what, sides in (("Removed", pairs.removed), ("Added", pairs.added))
        for side in sides
    )
    return (Section("Devices", text),) if text else ()


def _tables(comparison: Comparison) -> Section:
    old, new = comparison.old, comparison.new
    text: tuple[str, ...] = ()
    if not comparison.is_same_device:
        title = f"Different devices: {old.device.name} and {new.device.name}"
        text = (
            "What follows says which plans differ between the devices, not that anything became faster or slower: "
            "speeds are those of both tables' plans on the new table's device, as that table's measurements have them.",
        )
    elif old.provenance["results"] == new.provenance["results"]:
        title = f"{new.device.name}: the same results, compiled again"
        text = ("What differs comes from the compiler, or from what the kernels declare.",)
    else:
        title = f"{new.device.name}: other results"

    def row(name: str, of: Callable[[Side], str]) -> tuple[str, str, str]:
        return (name, of(old), of(new))

    rows = (
        row("path", lambda side: str(side.path)),
        row("device", lambda side: describe_device(side.device)),
        row("measured", lambda side: f"{side.provenance['measured_from']} to {side.provenance['measured_to']}"),
        row("versions", lambda side: ", ".join(map(" ".join, side.provenance["versions"].items()))),
        row("measurements", lambda side: str(side.provenance["measurements"])),
        row("disturbed", _disturbed),
        row("static keys", lambda side: str(len(side.entries))),
        row("buckets", lambda side: str(sum(len(entry.buckets) for entry in side.entries.values()))),
    )
    return Section(title, text, ("", "old", "new"), rows)


def _disturbed(side: Side) -> str:
    """How many contests had to do with other processes: their times are worth less."""
    return f"{side.disturbed} of {side.contests} contests" if side.contests else "-"


def _summary(comparison: Comparison, weighing: str) -> Section:
    summaries = summarise(comparison.shapes)
    overall = summaries[-1]
    before = sum(change.old is not None for change in comparison.shapes)
    now = sum(change.new is not None for change in comparison.shapes)
    text = [
        f"Static keys (operation, mode, dtype, features): {len(comparison.added)} added, {len(comparison.removed)} "
        f"removed, {len(comparison.changed)} changed, {comparison.unchanged} as they were.",
        f"Coverage: of {counted(overall.shapes, 'shape')} ({weighing}) the old table serves {before}, the new one "
        f"{now}; {overall.gained} gained, {overall.lost} lost.",
        f"Plans: another one at {overall.other_plan} of the {overall.shapes - overall.missing} shapes that both serve.",
    ]
    if not overall.other_plan or overall.speed is None:
        return Section("Summary", tuple(text))
    text += [
        f"Predicted speed: {speed(overall.speed, 3)} the old table's, {percent(1 / overall.speed)} time per call "
        f"(geometric mean); {speed(overall.worst)} at worst, {speed(overall.best)} at best.",
        f"Where plans differ: {', '.join(_bases(overall))}.",
        'In the table, "speed" and "time" are geometric means over the shapes that both serve, "total time" is the '
        "change of all their times together.",
    ]
    rows = tuple(_speed_row(summary) for summary in summaries if summary.other_plan)
    return Section("Summary", tuple(text), _SPEED_COLUMNS, rows)


def _bases(summary: SpeedSummary) -> Iterable[str]:
    """Where the ratios between different plans come from."""
    if summary.measured:
        yield f"{counted(summary.measured, 'ratio')} from contests that timed both plans at that shape"
    if summary.estimated:
        yield f"{counted(summary.estimated, 'estimate')} from what was measured nearby"
    if summary.unknown:
        yield f"{counted(summary.unknown, 'shape')} without a ratio, which are left out"


def _speed_row(summary: SpeedSummary) -> tuple[str, ...]:
    return (
        summary.operation,
        summary.mode,
        str(summary.shapes),
        str(summary.other_plan),
        speed(summary.speed, 3),
        percent(None if summary.speed is None else 1 / summary.speed),
        speed(summary.worst),
        speed(summary.best),
        percent(summary.total_time),
    )


def _changes(comparison: Comparison) -> Iterable[Section]:
    """The largest changes by what they are worth, and how many there are besides."""
    found: dict[Effect, list[RegionChange]] = {}
    for change in sorted(comparison.regions, key=lambda change: change.rank, reverse=True):
        found.setdefault(change.effect, []).append(change)
    titles: tuple[tuple[Effect, str, str], ...] = (
        ("slower", "Predicted slower", ""),
        ("faster", "Predicted faster", ""),
        ("unknown", "Another plan, but no time to compare", ""),
        ("no shape", "Another plan between the shapes that count", "Speeds are estimates for the middle of the sizes."),
        ("guards", "The same plan under other conditions", ""),
        ("equal", f"Another plan, but within {100 * TIE_MARGIN:g}%", ""),
    )
    for effect, title, text in titles:
        changes = found.get(effect, [])
        listed = changes[: LARGEST if effect != "equal" else 0]
        if changes:
            groups = _grouped((change.region.key, _line(comparison, change)) for change in listed)
            paragraphs = [text, _and_more(len(changes), "by speed and how much they cover") if listed else ""]
            yield Section(f"{title}: {counted(len(changes), 'change')}", tuple(filter(None, paragraphs)), groups=groups)


def _line(comparison: Comparison, change: RegionChange) -> str:
    region = change.region
    place = describe_place(region, comparison.old.entries[region.key], comparison.new.entries[region.key])
    if change.effect == "guards":
        return f"{place}: {describe_chain(region.old)} -> {describe_chain(region.new)}"
    plans = " -> ".join(describe_choice(chain[0].choice) for chain in (region.old, region.new))
    gain = "" if change.log_gain is None else f"{speed(math.exp(change.log_gain))}  "
    if not change.shapes:
        return f"{gain and 'about '}{gain}{place}: {plans}"
    return f"{gain}{place}: {plans} ({counted(change.shapes, 'shape')})"


def _grouped(lines: Iterable[tuple[EntryKey, str]]) -> tuple[Group, ...]:
    """Lines under their static keys, in the order in which these first occur."""
    grouped: dict[EntryKey, list[str]] = {}
    for key, line in lines:
        grouped.setdefault(key, []).append(line)
    return tuple(Group(describe_key(*key), tuple(found)) for key, found in grouped.items())


def _and_more(number: int, measure: str) -> str:
    if number <= LARGEST:
        return ""
    return f"The {LARGEST} largest {measure}; {number - LARGEST} more are not listed."


def _coverage(comparison: Comparison) -> Iterable[Section]:
    changes = sorted(comparison.coverage, key=lambda change: (change.lost, change.gained), reverse=True)
    if changes:
        lines = [(change.key, line) for change in changes[:LARGEST] for line in _coverage_lines(change)]
        text = tuple(filter(None, (_and_more(len(changes), "by shapes lost and gained"),)))
        title = f"Coverage: {counted(len(changes), 'static key')} with another range"
        yield Section(title, text, groups=_grouped(lines))


def _coverage_lines(change: CoverageChange) -> Iterable[str]:
    if change.new is None:
        assert change.old is not None
        yield f"removed: {describe_coverage(change.old, change.old_product)}"
    elif change.old is None:
        yield f"added: {describe_coverage(change.new, change.new_product)}"
    elif (change.old, change.old_product) != (change.new, change.new_product):
        yield f"before: {describe_coverage(change.old, change.old_product)}"
        yield f"now: {describe_coverage(change.new, change.new_product)}"
    if change.regions:
        gained = sum(not region.old for region in change.regions)
        lost = len(change.regions) - gained
        yield f"inside that range: {counted(gained, 'region')} served now, {counted(lost, 'region')} no longer"
    yield f"{counted(change.gained, 'shape')} gained, {change.lost} lost"


def _kernels(changes: Sequence[KernelChange]) -> Iterable[Section]:
    if not changes:
        return
    gained = [change.kernel_id for change in changes if change.old is None]
    lost = [change.kernel_id for change in changes if change.new is None]
    text = tuple(f"{what}: {', '.join(ids)}." for what, ids in (("Gained", gained), ("Lost", lost)) if ids)
    rows = tuple(
        (
            change.kernel_id,
            str(change.old_shapes),
            str(change.new_shapes),
            "" if change.old is None or change.new is None else describe_identity(change.old, change.new),
        )
        for change in changes
    )
    yield Section(f"Kernels: {len(gained)} gained, {len(lost)} lost", text, _KERNEL_COLUMNS, rows)

"""Merging shards: results that several machines or days measured on one device, as one folder."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ResultsError
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.results.atomic import TEMPORARY_SUFFIX
from layerzero_tune.results.content import Contest, differ, whole_contests
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import JsonTexts
from layerzero_tune.results.store import ResultsStore


@dataclass(frozen=True)
class Conflict:
    """A contest that shards hold with different times: the shard whose version is kept, and the others."""

    contest: Contest
    kept: str
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class MergedResults:
    """The union of shards.

    Attributes:
        contests: each once, in ascending order of contest id.
        shared: how many of them several shards hold alike.
        conflicts: those that shards hold with different times, in the order of the contests.
        held_out: by shard, how many contests of `evaluate` were left out.
    """

    device: DeviceSpec
    contests: tuple[Contest, ...]
    shared: int
    conflicts: tuple[Conflict, ...]
    held_out: Mapping[str, int]

    @property
    def measurements(self) -> int:
        return sum(map(len, self.contests))


def merge_shards(shards: Mapping[str, Iterable[Measurement]]) -> MergedResults:
    """The union of the rows by (contest_id, job_id); equal shards give an equal union, in whatever order.

    Where shards hold one contest with different times, `whole_contests` says which version is kept, as it does for the
    files of one folder: the less disturbed, then the earlier, always whole. So a merge compiles to what the same files
    in one folder compile to. Held-out contests, which `evaluate` measures, are no part of a tuning and stay out.

    Args:
        shards: rows by the name of their shard.

    Raises:
        ResultsError: a shard holds no measurement, there are held-out contests only, or two rows are of different
            devices; names the shards.
    """
    held_out: dict[str, int] = {}
    versions: dict[str, list[tuple[str, Contest]]] = {}
    for name, rows in sorted(shards.items()):
        contests = whole_contests([rows])
        if not contests:
            raise ResultsError(f"{name} holds no measurement; leave it out, or measure with layerzero-tune run --out")
        tuned = [contest for contest in contests if not _is_held_out(contest)]
        held_out[name] = len(contests) - len(tuned)
        for contest in tuned:
            versions.setdefault(contest[0].contest_id, []).append((name, contest))
    merged = whole_contests(contest for found in versions.values() for _, contest in found)
    if not merged:
        raise ResultsError(
            f"{', '.join(sorted(shards))}: held-out measurements of evaluate only; merge what run measured"
        )
    several = [contest for contest in merged if len(versions[contest[0].contest_id]) > 1]
    found = [_conflict(contest, versions[contest[0].contest_id]) for contest in several]
    conflicts = tuple(conflict for conflict in found if conflict is not None)
    return MergedResults(
        device=_single_device(versions.values()),
        contests=tuple(merged),
        shared=len(several) - len(conflicts),
        conflicts=conflicts,
        held_out=held_out,
    )


def write_merged(contests: Sequence[Contest], directory: Path) -> tuple[Path, ...]:
    """Write the contests into a results folder; the files written, in order.

    A folder that is new or empty appears whole or not at all (after a kill a folder beside it, a leading dot and
    `TEMPORARY_SUFFIX`, is left over); one that holds something grows, as `ResultsStore.absorb` says. Either way the
    same call again gives the same files.

    Raises:
        ResultsError: the folder cannot be read or written.
    """
    directory = directory.resolve()
    try:
        if directory.exists() and any(directory.iterdir()):
            return ResultsStore(directory).absorb(contests)
        draft = directory.with_name(f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        try:
            written = ResultsStore(draft).absorb(contests)
            os.replace(draft, directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ResultsError(
            f"cannot write results to {directory}: {error.strerror or error}; choose another directory with --out"
        ) from error
    return tuple(directory / path.name for path in written)


def _is_held_out(contest: Contest) -> bool:
    return any(row.kernel_id == PUBLIC_CALL for row in contest)


def _conflict(kept: Contest, versions: Sequence[tuple[str, Contest]]) -> Conflict | None:
    dropped = tuple(name for name, contest in versions if differ(contest, kept))
    keepers = [name for name, _ in versions if name not in dropped]
    return Conflict(kept, keepers[0], dropped) if dropped else None


def _single_device(versions: Iterable[Sequence[tuple[str, Contest]]]) -> DeviceSpec:
    texts = JsonTexts()
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, contest in sorted((pair for held in versions for pair in held), key=lambda pair: pair[0]):
        for row in contest:
            found.setdefault(texts.of_mapping(row.device), (name, row.device))
    (first_name, first), *others = found.values()
    if others:
        other_name, other = others[0]
        raise ResultsError(
            f"shards are merged for one device: {first_name} is of {_described(first, other)}, {other_name} of "
            f"{_described(other, first)}; merge each device's shards into a folder of its own"
        )
    return DeviceSpec.from_dict(first)


def _described(device: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The device's name, and what it says otherwise than the other."""
    names = sorted(name for name in {*device, *other} - {"name"} if device.get(name) != other.get(name))
    return ", ".join([str(device["name"]), *(f"{name} {device.get(name)}" for name in names)])

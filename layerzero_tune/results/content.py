"""What results say, apart from the files that hold them: order, duplicates, and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from layerzero_tune.measure.contention import MAX_SHARE
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import COLUMNS, JsonTexts

Contest = list[Measurement]


def results_hash(rows: Iterable[Measurement]) -> str:
    """128 bits of SHA-256 over the rows in the order of their ids, as 32 hexadecimal digits.

    It depends on what was measured alone: not on the order of the rows, nor on files, runs or machines.
    """
    digest = hashlib.sha256()
    for text in sorted(_texts(rows)):
        digest.update(text.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def whole_contests(files: Iterable[Iterable[Measurement]]) -> list[Contest]:
    """The contests of several files, each once, in ascending order of contest id and within it of job id.

    Where two files hold the same contest with other times (two machines of one kind measured it), one of them wins as a
    whole: times of different contests are never mixed. The one that other processes disturbed less wins (up to
    `MAX_SHARE` it counts as undisturbed); then the earlier, as what a store holds stays when more is added; then the
    lesser text.
    """
    contests: dict[str, Contest] = {}
    for rows in files:
        for contest_id, group in groupby(sorted(rows, key=_ids), key=lambda row: row.contest_id):
            contest = list({row.job_id: row for row in group}.values())
            held = contests.get(contest_id)
            if held is None or (differ(held, contest) and _precedence(contest) < _precedence(held)):
                contests[contest_id] = contest
    return [contest for _, contest in sorted(contests.items())]


def differ(first: Contest, second: Contest) -> bool:
    """Whether two versions of a contest say different things."""
    return first != second and list(_texts(first)) != list(_texts(second))  # an error that is no number equals itself


def _ids(row: Measurement) -> tuple[str, str]:
    return (row.contest_id, row.job_id)


def _precedence(contest: Contest) -> tuple[float, str, list[str]]:
    disturbance = max(row.contention for row in contest)
    return (
        disturbance if disturbance > MAX_SHARE else 0.0,
        min(row.measured_at for row in contest),
        list(_texts(contest)),
    )


def _texts(rows: Iterable[Measurement]) -> Iterator[str]:
    """Each row as JSON, ids first; equal rows give equal texts."""
    texts = JsonTexts()
    for row in rows:
        values: dict[str, Any] = {name: getattr(row, name) for name in COLUMNS}
        values["context"] = texts.of_context(row.context)
        for name in ("configuration", "device", "versions", "policy"):
            values[name] = texts.of_mapping(values[name])
        for name in ("relative_error", "tolerance"):
            values[name] = None if values[name] is None else float(values[name])
        yield json.dumps(list(values.values()))

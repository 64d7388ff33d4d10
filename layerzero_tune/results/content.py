"""What results say, apart from the files that hold them: order, duplicates, and a hash."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from json.encoder import encode_basestring_ascii
from math import isfinite
from operator import attrgetter
from typing import Any

from layerzero_tune.measure.contention import MAX_SHARE
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import COLUMNS, JsonTexts

Contest = list[Measurement]
# What is hashed of every row. `gpu` follows where there is one: rows from before that column keep their hash.
_HASHED = tuple(name for name in COLUMNS if name != "gpu")
_VALUES_OF = attrgetter(*_HASHED)


def results_hash(rows: Iterable[Measurement]) -> str:
    """128 bits of SHA-256 over the rows in the order of their ids, as 32 hexadecimal digits.

    It depends on what was measured alone: not on the order of the rows, nor on files, runs or machines.
    """
    digest = hashlib.sha256()
    texts = _Texts()
    # The texts begin with the contest's id in quotes: in its order they need not all be held to be sorted.
    for _, contest in groupby(sorted(rows, key=_quoted_contest), key=_quoted_contest):
        for text in sorted(map(texts.of_row, contest)):
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
    return first != second and _texts(first) != _texts(second)  # an error that is no number equals itself


def _ids(row: Measurement) -> tuple[str, str]:
    return (row.contest_id, row.job_id)


def _quoted_contest(row: Measurement) -> str:
    return encode_basestring_ascii(row.contest_id)


def _precedence(contest: Contest) -> tuple[float, str, list[str]]:
    disturbance = max(row.contention for row in contest)
    return (
        disturbance if disturbance > MAX_SHARE else 0.0,
        min(row.measured_at for row in contest),
        _texts(contest),
    )


def _texts(contest: Contest) -> list[str]:
    return list(map(_Texts().of_row, contest))


class _Texts:
    """Rows as JSON lists of their columns, ids first; equal rows give equal texts.

    What many rows share is printed once. As with `JsonTexts` an instance serves one pass over rows that are kept alive.
    """

    def __init__(self) -> None:
        texts = JsonTexts()
        quoted: dict[str, str] = {}

        def word(text: str) -> str:
            found = quoted.get(text)
            if found is None:
                found = quoted[text] = encode_basestring_ascii(text)
            return found

        # `repr` is what JSON prints for finite floats, at a third of its cost.
        def number(value: float | None) -> str:
            if value is None:
                return "null"
            return repr(float(value)) if isfinite(value) else json.dumps(float(value))

        # Their bits, which cost a tenth of their digits: most of a row is times.
        def times(values: tuple[float, ...]) -> str:
            return f'"{struct.pack(f"<{len(values)}d", *values).hex()}"'

        def mapping(value: Mapping[str, Any]) -> str:
            return word(texts.of_mapping(value))

        printers: dict[str, Callable[[Any], str]] = {
            "contest_id": encode_basestring_ascii,
            "job_id": encode_basestring_ascii,
            "context": lambda context: word(texts.of_context(context)),
            **dict.fromkeys(("configuration", "device", "versions", "policy"), mapping),
            "is_default": lambda value: "true" if value else "false",
            **dict.fromkeys(("relative_error", "tolerance", "screen_ns", "contention"), number),
            "samples_ns": times,
        }
        self._printers = tuple(printers.get(name, word) for name in _HASHED)
        self._mapping = mapping

    def of_row(self, row: Measurement) -> str:
        parts = [text(value) for text, value in zip(self._printers, _VALUES_OF(row), strict=True)]
        if row.gpu is not None:
            parts.append(self._mapping(row.gpu))
        return f"[{', '.join(parts)}]"

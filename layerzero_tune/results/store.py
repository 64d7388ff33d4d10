"""`ResultsStore`: a directory of immutable Parquet files, one for each finished contest until they are compacted."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from layerzero_tune.results.atomic import write_atomically
from layerzero_tune.results.content import Contest, results_hash, whole_contests
from layerzero_tune.results.folder import ResultsFolder, contest_file_name, is_contest_file
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import Decoder, encode

__all__ = ["Results", "ResultsStore", "results_hash"]

PART_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Results:
    """What a store held when it was read.

    Attributes:
        rows: every measurement once, in ascending order of (contest_id, job_id).
        quarantined: the damaged files that this read came across, where they lie now.
    """

    rows: tuple[Measurement, ...]
    quarantined: tuple[Path, ...]


class ResultsStore:
    """The results in one directory, safe under any number of readers, writers and compactions at once.

    A file appears whole, by a rename, and its content never changes; so a reader sees finished contests only. No file
    is kept open. The directory is created by the first `append`.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._folder = ResultsFolder(self.directory)

    def append(self, rows: Sequence[Measurement]) -> Path:
        """Write all rows of one finished contest and return its file; a contest that is already there stays as it is.

        Raises:
            ValueError: no rows, rows of several contests, a job twice, or a contest id that cannot be a file name.
            ResultsError: the directory cannot be created or written.
        """
        path = self.directory / contest_file_name(_contest_id_of(rows))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, encode(sorted(rows, key=lambda row: row.job_id)))
        except OSError as error:
            raise self._folder.unwritable(error) from error
        return path

    def read(self) -> Results:
        """All rows. A damaged file is named in a warning and moved to `quarantine/`, the others are used.

        Raises:
            ResultsError: the directory does not exist, it or a file cannot be read, or a file was written by a newer
                release.
        """
        decoder = Decoder()
        quarantined: list[Path] = []
        with _collector_paused():
            files = self._folder.visit(lambda name: self._folder.rows_of(name, decoder, quarantined))
        rows = (row for contest in whole_contests(files.values()) for row in contest)
        return Results(tuple(rows), tuple(quarantined))

    def contest_ids(self) -> frozenset[str]:
        """The ids of the finished contests; none where the directory does not exist yet.

        Contest files are not opened: a damaged one counts until `read` has set it aside.

        Raises:
            ResultsError: the directory or a compacted file cannot be read, or a newer release wrote the file.
        """
        if not self.directory.exists():
            return frozenset()
        return frozenset().union(*self._folder.visit(self._folder.contests_of).values())

    def contest(self, contest_id: str, seen: dict[str, frozenset[str]]) -> tuple[Measurement, ...]:
        """The rows of a finished contest, none where there is no such contest or its file is damaged.

        `seen` keeps what compacted files hold from one call to the next.

        Raises:
            ResultsError: as for `read`.
        """
        name = contest_file_name(contest_id)
        if (self.directory / name).exists():
            with suppress(FileNotFoundError):  # compacted meanwhile
                return tuple(self._folder.rows_of(name, Decoder(), []))
        names = self._folder.names() if self.directory.exists() else frozenset()
        for part in sorted(name for name in names if not is_contest_file(name)):
            if part not in seen:
                with suppress(FileNotFoundError):
                    seen[part] = self._folder.contests_of(part)
        if not any(contest_id in seen.get(name, ()) for name in names):
            return ()
        return tuple(row for row in self.read().rows if row.contest_id == contest_id)

    def compact(self) -> tuple[Path, ...]:
        """Merge contest files and small parts into parts of at most about `PART_BYTES`; the parts written, in order.

        Parts above half that size are left alone. Equal rows give equal files. Killed between writing and deleting, it
        leaves duplicates, which `read` drops and the next compaction removes.

        Raises:
            ResultsError: a file cannot be read, a newer release wrote it, or the directory cannot be written.
        """
        if not self.directory.exists():
            return ()
        try:
            self._folder.remove_leftovers()
            sources = self._rows_by_file([name for name in self._folder.names() if self._is_source(name)])
            return () if len(sources) < 2 else self._rewrite(sources, ())
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def absorb(self, contests: Sequence[Contest]) -> tuple[Path, ...]:
        """Write contests and all that is held already as parts; the parts written, in order.

        New parts are whole before old files go, so that a reader meanwhile, or the next one after a kill, sees at least
        what was held, and contests whole. The same contests again give the same files.

        Raises:
            ResultsError: as for `compact`.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._folder.remove_leftovers()
            return self._rewrite(self._rows_by_file(self._folder.names()), contests)
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def _rows_by_file(self, names: Iterable[str]) -> dict[str, list[Measurement]]:
        """The rows of these files, but for damaged ones, which are set aside, and those that have just been merged."""
        decoder = Decoder()
        found: dict[str, list[Measurement]] = {}
        for name in sorted(names):
            quarantined: list[Path] = []
            try:
                rows = self._folder.rows_of(name, decoder, quarantined)
            except FileNotFoundError:  # another process has just merged it
                continue
            if not quarantined:
                found[name] = rows
        return found

    def _rewrite(self, sources: Mapping[str, Sequence[Measurement]], more: Sequence[Contest]) -> tuple[Path, ...]:
        """Write what these files hold, and more contests, as parts; then delete the files."""
        written = []
        for rows, data in _parts(whole_contests([*sources.values(), *more])):
            path = self.directory / f"part-{results_hash(rows)}.parquet"
            write_atomically(path, data)
            written.append(path)
        for name in sources.keys() - {path.name for path in written}:
            (self.directory / name).unlink(missing_ok=True)
        return tuple(written)

    def _is_source(self, name: str) -> bool:
        if is_contest_file(name):
            return True
        try:
            return (self.directory / name).stat().st_size < PART_BYTES // 2
        except FileNotFoundError:
            return False


@contextmanager
def _collector_paused() -> Iterator[None]:
    """While a million rows are made, which hold no cycles, looking for some takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _contest_id_of(rows: Sequence[Measurement]) -> str:
    contest_ids = {row.contest_id for row in rows}
    if len(contest_ids) != 1:
        raise ValueError(f"append takes the rows of one contest, got rows of {len(contest_ids)}")
    if len({row.job_id for row in rows}) != len(rows):
        raise ValueError(f"a job occurs twice in contest {rows[0].contest_id}")
    return rows[0].contest_id


def _parts(contests: list[Contest]) -> list[tuple[list[Measurement], bytes]]:
    """Contests as files of at most `PART_BYTES`, halved until they fit; a contest is never torn apart."""
    rows = [row for contest in contests for row in contest]
    data = encode(rows)
    if len(data) <= PART_BYTES or len(contests) == 1:
        return [(rows, data)]
    middle = len(contests) // 2
    return [*_parts(contests[:middle]), *_parts(contests[middle:])]

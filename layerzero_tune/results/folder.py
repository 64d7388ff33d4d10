"""`ResultsFolder`: the Parquet files of a store, as other processes add, merge and damage them."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from layerzero_runtime.errors import ResultsError
from layerzero_tune.results.atomic import TEMPORARY_SUFFIX
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import DamagedFileError, Decoder, read_columns

QUARANTINE = "quarantine"
# A temporary file this old belongs to a writer that was killed: writing one takes seconds at most.
LEFTOVER_SECONDS = 3600.0

_CONTEST_FILE = re.compile(r"contest-([A-Za-z0-9_][A-Za-z0-9_.-]*)\.parquet")
Loaded = TypeVar("Loaded")
_logger = logging.getLogger(__name__)


def is_contest_file(name: str) -> bool:
    """Whether it holds one contest, as it was appended."""
    return _CONTEST_FILE.fullmatch(name) is not None


def contest_file_name(contest_id: str) -> str:
    """The name of the file to which a contest is appended.

    Raises:
        ValueError: the id cannot be part of a file name.
    """
    name = f"contest-{contest_id}.parquet"
    if not is_contest_file(name):
        raise ValueError(f"contest_id {contest_id!r} must consist of letters, digits, '_', '.' and '-'")
    return name


@dataclass(frozen=True)
class ResultsFolder:
    """One directory of files whose contents never change; any of them may vanish when it has been merged."""

    directory: Path

    def visit(self, load: Callable[[str], Loaded]) -> dict[str, Loaded]:
        """What `load` gives for every file, as one snapshot.

        A compaction may run meanwhile, and a listing made while names change can miss both the old files and the new.
        So list again until nothing has vanished and no new part has appeared; new contests alone end the wait.
        """
        loaded: dict[str, Loaded] = {}
        before: frozenset[str] | None = None
        while True:
            names = self.names()
            if before is not None and before <= names and all(map(is_contest_file, names - before)):
                return loaded
            for name in sorted(names - loaded.keys()):
                try:
                    loaded[name] = load(name)
                except FileNotFoundError:  # merged or set aside since it was listed; the next listing will tell
                    continue
            before = names

    def names(self) -> frozenset[str]:
        """The names of its files.

        Raises:
            ResultsError: the folder does not exist or cannot be read.
        """
        try:
            with os.scandir(self.directory) as entries:
                return frozenset(
                    entry.name
                    for entry in entries
                    if entry.name.endswith(".parquet") and not entry.name.startswith(".") and entry.is_file()
                )
        except FileNotFoundError:
            raise ResultsError(
                f"there are no results at {self.directory}: no such directory; measure some with "
                f"`layerzero-tune run --out {self.directory}`, or check the path"
            ) from None
        except NotADirectoryError:
            raise ResultsError(f"{self.directory} is a file; results are a directory of Parquet files") from None
        except OSError as error:
            raise self._unreadable(self.directory, error) from error

    def _bytes_of(self, name: str) -> bytes:
        path = self.directory / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unreadable(path, error) from error

    def rows_of(self, name: str, decoder: Decoder, quarantined: list[Path]) -> list[Measurement]:
        """The rows of a file; of a damaged one none, which is set aside, and added to `quarantined`.

        Raises:
            FileNotFoundError: it was merged meanwhile.
            ResultsError: it cannot be read, or a newer release wrote it.
        """
        data = self._bytes_of(name)
        try:
            return decoder.decode(data)
        except DamagedFileError as error:
            quarantined.append(self._set_aside(name, error))
            return []
        except ResultsError as error:
            raise ResultsError(f"{self.directory / name}: {error}") from error

    def contests_of(self, name: str) -> frozenset[str]:
        """The ids of the contests that a file holds; of a damaged one none, which stays where it is.

        Raises:
            FileNotFoundError, ResultsError: as for `rows_of`.
        """
        if match := _CONTEST_FILE.fullmatch(name):
            return frozenset((match[1],))
        data = self._bytes_of(name)
        try:
            column = read_columns(data, ["contest_id"]).column("contest_id")
        except DamagedFileError as error:
            _logger.warning("%s is damaged (%s); its contests count as missing", self.directory / name, error)
            return frozenset()
        except ResultsError as error:
            raise ResultsError(f"{self.directory / name}: {error}") from error
        return frozenset(column.unique().to_pylist())

    def _set_aside(self, name: str, damage: DamagedFileError) -> Path:
        """Move a damaged file out of the way, and return where it lies then."""
        path = self.directory / name
        target = self.directory / QUARANTINE / name
        number = 1
        while target.exists():
            target = target.with_name(f"{name}.{number}")
            number += 1
        try:
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        except OSError as error:
            _logger.warning(
                "%s is damaged (%s) and is skipped; it could not be moved to %s: %s", path, damage, target.parent, error
            )
            return path
        _logger.warning("%s is damaged (%s); it was moved to %s, the other results are used", path, damage, target)
        return target

    def remove_leftovers(self) -> None:
        """Delete what killed writers have left half written."""
        oldest = time.time() - LEFTOVER_SECONDS
        for path in self.directory.glob(f".*.parquet.*{TEMPORARY_SUFFIX}"):
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
            except FileNotFoundError:  # its writer has renamed it, or another process removed it
                continue

    def unwritable(self, error: OSError) -> ResultsError:
        """What to raise where nothing can be written."""
        return ResultsError(
            f"cannot write results to {self.directory}: {error.strerror or error}; "
            "choose another directory with --out, or make this one writable"
        )

    def _unreadable(self, path: Path, error: OSError) -> ResultsError:
        return ResultsError(f"cannot read {path}: {error.strerror or error}; make it readable, or move it elsewhere")

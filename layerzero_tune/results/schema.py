"""Rows as Parquet: the schema of a `Measurement`, its encodings, and the conversions in both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import LayerZeroError, ResultsError
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.measurement import STATUSES, Measurement

# Raise this with every change that an older reader would misread, a new field of `SelectionContext` included.
# 2: further statuses. 3: the column `gpu`.
SCHEMA_VERSION = 3
_READABLE_VERSIONS = (1, 2, SCHEMA_VERSION)
# By column, the version that brought it; the rows of older files have nothing there.
_ADDED = {"gpu": 3}
SCHEMA_KEY = b"layerzero.schema"

_WORD = pa.dictionary(pa.int32(), pa.string())
_TIMES = pa.list_(pa.field("element", pa.float64(), nullable=False))
_JSON = ("context", "configuration", "device", "versions", "policy", "gpu")
_TYPES: dict[str, pa.DataType] = {
    "job_id": pa.string(),
    "is_default": pa.bool_(),
    "relative_error": pa.float64(),
    "tolerance": pa.float64(),
    "screen_ns": pa.float64(),
    "samples_ns": _TIMES,
    "contention": pa.float64(),
}
_NULLABLE = ("relative_error", "tolerance", "screen_ns", "gpu")
COLUMNS = tuple(field.name for field in fields(Measurement))
# Words repeat over many rows (a context over all candidates, a device over everything); job ids and times do not.
_REPEATED = tuple(name for name in COLUMNS if name not in _TYPES)
SCHEMA = pa.schema(
    [pa.field(name, _TYPES.get(name, _WORD), nullable=name in _NULLABLE) for name in COLUMNS],
    metadata={SCHEMA_KEY: str(SCHEMA_VERSION).encode()},
)
# The bytes of a float are stored plane by plane: rounded times have five planes of zeros, which vanish in compression.
_ENCODINGS = {
    "job_id": "PLAIN",
    "relative_error": "BYTE_STREAM_SPLIT",
    "tolerance": "BYTE_STREAM_SPLIT",
    "screen_ns": "BYTE_STREAM_SPLIT",
    "samples_ns.list.element": "BYTE_STREAM_SPLIT",
    "contention": "BYTE_STREAM_SPLIT",
}


class DamagedFileError(Exception):
    """The bytes are no results of this schema or an older one; the message says what is wrong with them."""


def encode(rows: Sequence[Measurement]) -> bytes:
    """The rows as the bytes of a Parquet file, in the order given; equal rows give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        to_table(rows),
        sink,
        compression="zstd",
        use_dictionary=list(_REPEATED),
        column_encoding=_ENCODINGS,
        write_statistics=False,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def to_table(rows: Sequence[Measurement]) -> pa.Table:
    """The rows as an Arrow table of `SCHEMA`."""
    texts = JsonTexts()
    arrays = []
    for name in COLUMNS:
        values: list[Any] = [getattr(row, name) for row in rows]
        if name == "context":
            values = [texts.of_context(context) for context in values]
        elif name in _JSON:
            values = [None if mapping is None else texts.of_mapping(mapping) for mapping in values]
        array = pa.array(values, pa.string() if name in _REPEATED else _TYPES[name])
        arrays.append(array.dictionary_encode() if name in _REPEATED else array)
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


class JsonTexts:
    """Canonical JSON of contexts and mappings, made once for each object that many rows share.

    Mappings are told apart by identity, so an instance serves one pass over rows that are kept alive meanwhile.
    """

    def __init__(self) -> None:
        self._contexts: dict[SelectionContext, str] = {}
        self._mappings: dict[int, str] = {}

    def of_context(self, context: SelectionContext) -> str:
        text = self._contexts.get(context)
        if text is None:
            text = self._contexts[context] = canonical_json(context.to_dict())
        return text

    def of_mapping(self, mapping: Mapping[str, Any]) -> str:
        text = self._mappings.get(id(mapping))
        if text is None:
            text = self._mappings[id(mapping)] = canonical_json(dict(mapping))
        return text


class Decoder:
    """Parquet bytes back to rows. Rows of one decoder share their context, device, versions and policy objects."""

    def __init__(self) -> None:
        self._contexts: dict[str, SelectionContext] = {}
        self._mappings: dict[str, dict[str, Any]] = {}

    def decode(self, data: bytes) -> list[Measurement]:
        """The rows of a file.

        Raises:
            DamagedFileError: the bytes are not a whole Parquet file of this schema, or a value in it is not allowed.
            ResultsError: the file was written by a newer schema version.
        """
        table = read_columns(data, COLUMNS)
        try:
            return self._rows(table)
        except (pa.ArrowException, ValueError, TypeError, RecursionError, LayerZeroError) as error:
            if isinstance(error, MemoryError):
                raise
            raise DamagedFileError(f"a value is not allowed: {error}") from error

    def _rows(self, table: pa.Table) -> list[Measurement]:
        table.validate(full=True)
        held = table.column_names
        columns: dict[str, list[Any]] = {
            name: _values(table.column(name)) if name in held else [None] * len(table) for name in COLUMNS
        }
        columns["context"] = [self._context(text) for text in columns["context"]]
        for name in _JSON[1:]:
            columns[name] = [None if text is None else self._mapping(text) for text in columns[name]]
        unknown = set(columns["status"]) - set(STATUSES)
        if unknown:
            raise ValueError(f"status {sorted(unknown)[0]!r}, allowed: {', '.join(STATUSES)}")
        names = tuple(columns)
        return [Measurement.of_stored(names, values) for values in zip(*columns.values(), strict=True)]

    def _context(self, text: str) -> SelectionContext:
        context = self._contexts.get(text)
        if context is None:
            context = self._contexts[text] = SelectionContext(**_object(text))
        return context

    def _mapping(self, text: str) -> dict[str, Any]:
        mapping = self._mappings.get(text)
        if mapping is None:
            mapping = self._mappings[text] = _object(text)
        return mapping


def read_columns(data: bytes, names: Sequence[str]) -> pa.Table:
    """Those of some columns that a file of its schema version has, after version and types were checked.

    Raises:
        DamagedFileError: the bytes are not a whole Parquet file of this schema.
        ResultsError: the file was written by a newer schema version.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = _schema_of(_version(file.metadata.metadata or {}))
        if not file.schema_arrow.equals(schema):
            raise DamagedFileError(f"its columns are {', '.join(file.schema_arrow.names)}, not those of a measurement")
        return file.read(columns=[name for name in names if name in schema.names], use_threads=False)
    # Arrow reports bytes that it cannot parse as OSError, too; nothing here touches a disk.
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, MemoryError | ResultsError):
            raise
        raise DamagedFileError(" ".join(str(error).split())) from error


def _schema_of(version: int) -> pa.Schema:
    """The columns that files of a version have."""
    return pa.schema([field for field in SCHEMA if _ADDED.get(field.name, 1) <= version])


def _version(metadata: Mapping[bytes, bytes]) -> int:
    written = metadata.get(SCHEMA_KEY, b"").decode("ascii", "replace")
    if written.isdecimal() and int(written) > SCHEMA_VERSION:
        raise ResultsError(
            f"written with schema version {written}, this release reads up to {SCHEMA_VERSION}; "
            "use the release that wrote it, or a newer one"
        )
    if written not in map(str, _READABLE_VERSIONS):
        raise DamagedFileError(
            f"its schema version is {written or 'missing'}, expected one of {', '.join(map(str, _READABLE_VERSIONS))}"
        )
    return int(written)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The column as Python values; of a dictionary column each word once, shared by its rows."""
    values: list[Any] = []
    for chunk in column.chunks:
        if isinstance(chunk, pa.DictionaryArray):
            words = chunk.dictionary.to_pylist()
            values.extend(None if index is None else words[index] for index in chunk.indices.to_pylist())
        elif isinstance(chunk, pa.ListArray):
            numbers = chunk.values.to_numpy(zero_copy_only=False).tolist()
            ends = chunk.offsets.to_pylist()
            values.extend(tuple(numbers[start:end]) for start, end in pairwise(ends))
        else:
            values.extend(chunk.to_pylist())
    return values


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"{text[:80]!r} is not a JSON object")
    return value

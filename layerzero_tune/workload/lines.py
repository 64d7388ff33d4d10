"""Workload files: JSON Lines, a context with an optional weight per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layerzero_runtime.context import FIELD_NAMES, SelectionContext
from layerzero_runtime.errors import ContextError, ContextTypeError
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_tune.workload.errors import WorkloadError, nearest
from layerzero_tune.workload.fields import fields_of

MAX_REPORTED = 10


@dataclass(frozen=True)
class WorkloadLine:
    """A point of the workload and how much it counts beside the others (any positive finite unit).

    Raises:
        WorkloadError: the weight is not a positive finite number.
    """

    context: SelectionContext
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise WorkloadError(f"weight must be a number, not {self.weight!r}")
        try:
            weight = float(self.weight)
        except OverflowError:
            weight = math.inf
        if not (math.isfinite(weight) and weight > 0.0):
            raise WorkloadError(f"weight is {self.weight!r}, required a finite number above 0")
        object.__setattr__(self, "weight", weight)


def read_workload(path: str | os.PathLike[str]) -> tuple[WorkloadLine, ...]:
    """The lines of a workload file, as `parse_workload` gives them.

    Raises:
        WorkloadError: the file cannot be read, is not UTF-8, or a line in it is malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise WorkloadError(
            f"there is no workload file {path}; make one with `layerzero-tune workload make`, or check the path"
        ) from None
    except OSError as error:
        raise WorkloadError(f"cannot read the workload file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"{path} is not a text file in UTF-8 (byte {error.start}); a workload has one JSON object per line"
        ) from error
    return parse_workload(text, str(path))


def parse_workload(text: str, source: str) -> tuple[WorkloadLine, ...]:
    """The lines of a workload in the order of their first occurrence; equal contexts become one, their weights added.

    Blank lines and lines that begin with `#` are skipped. `source` names the text in errors.

    Raises:
        WorkloadError: lines are malformed (the first `MAX_REPORTED` are named with their numbers), or there is none.
    """
    lines: list[WorkloadLine] = []
    problems: list[str] = []
    # Not splitlines(): a JSON string may hold other separators, such as U+2028, as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            lines.append(parse_line(stripped))
        except (WorkloadError, ContextError, ContextTypeError) as error:
            problems.append(f"{source}:{number}: {error}")
    if problems:
        reported = problems[:MAX_REPORTED]
        if len(problems) > MAX_REPORTED:
            reported.append(f"and {len(problems) - MAX_REPORTED} more malformed lines")
        raise WorkloadError("\n".join(reported))
    if not lines:
        raise WorkloadError(f"{source} has no workload lines; give one JSON object per line, such as {_EXAMPLE}")
    return merge_workloads(lines)


def parse_line(text: str) -> WorkloadLine:
    """One line of a workload file.

    Raises:
        WorkloadError: the text is no JSON object, or its fields do not describe a call of the operation.
        ContextError: a value is not allowed.
        ContextTypeError: a value has the wrong type.
    """
    given = _parse_object(text)
    weight = given.pop("weight", 1.0)
    for required in ("operation", "dtype"):
        if required not in given:
            raise WorkloadError(f"the field {required!r} is missing; every line gives operation and dtype")
    name = given["operation"]
    if isinstance(name, str) and name not in OPERATIONS:
        raise WorkloadError(
            f"operation is {name!r}, known operations: {', '.join(OPERATIONS)}{nearest(name, OPERATIONS)}"
        )
    allowed = fields_of(operation_named(name))
    for field, value in given.items():
        if field not in FIELD_NAMES:
            known = (*allowed, "weight")
            raise WorkloadError(f"unknown field {field!r}{nearest(field, known)}, {name} has: {', '.join(known)}")
        if field not in allowed:
            raise WorkloadError(f"{name} has no field {field!r}, it has: {', '.join(allowed)}")
        if value is None:
            raise WorkloadError(f"{field} is null; leave the field out for its default")
        if isinstance(value, float) and not math.isfinite(value):
            raise WorkloadError(f"{field} is not a finite number")
    context = SelectionContext(**given)
    operation_named(context.operation).validate(context)
    return WorkloadLine(context, weight)


def format_workload(lines: Sequence[WorkloadLine]) -> str:
    """The lines as JSON Lines without spaces: fields in the order of their declaration, defaults and a weight of 1 left
    out."""
    return "".join(_format_line(line) + "\n" for line in lines)


def merge_workloads(*workloads: Iterable[WorkloadLine]) -> tuple[WorkloadLine, ...]:
    """All lines in the order of their first occurrence, the weights of equal contexts added.

    Raises:
        WorkloadError: a sum of weights is too large for a float.
    """
    weights: dict[SelectionContext, float] = {}
    for workload in workloads:
        for line in workload:
            weights[line.context] = weights.get(line.context, 0.0) + line.weight
    return tuple(WorkloadLine(context, weight) for context, weight in weights.items())


def _format_line(line: WorkloadLine) -> str:
    given = line.context.to_dict()
    if line.weight != 1.0:
        given["weight"] = int(line.weight) if line.weight.is_integer() else line.weight
    return json.dumps(given, allow_nan=False, separators=(",", ":"))


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_fields, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except WorkloadError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or nesting as deep
        raise WorkloadError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WorkloadError(f"not a JSON object but {text[:60]}; a line looks like {_EXAMPLE}")
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise WorkloadError(f"the field {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise WorkloadError(f"not valid JSON: {name} is no JSON number")


_EXAMPLE = '{"operation": "norm.rms", "dtype": "bfloat16", "mode": "eager", "rows": 4096, "hidden_size": 4096}'

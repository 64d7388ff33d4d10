"""Printing: the form of a table as a Python module, and the evidence beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ResultsError
from layerzero_runtime.operation import StaticKey
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.tables.table import MISS, SCHEMA_VERSION
from layerzero_tune.compile.feature import Range, condition, feature_at, feature_name
from layerzero_tune.compile.form import Entry, Leaf, Split, TableForm, Tree
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.region import Region
from layerzero_tune.results.atomic import write_atomically

MODULE_FILE = "__init__.py"
EVIDENCE_FILE = "evidence.json"


@dataclass(frozen=True)
class EmittedTable:
    """The texts of a table's files."""

    slug: str
    module: str
    evidence: str

    def write(self, directory: Path) -> Path:
        """Write both files into the device's folder below `directory`; returns the folder.

        Raises:
            ResultsError: the folder cannot be written.
        """
        folder = directory / self.slug
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / MODULE_FILE, self.module.encode())
            write_atomically(folder / EVIDENCE_FILE, self.evidence.encode())
        except OSError as error:
            raise ResultsError(
                f"cannot write a table to {folder}: {error.strerror or error}; choose another --out"
            ) from error
        return folder


def emit(form: TableForm) -> EmittedTable:
    """Print a table. Equal forms give equal bytes."""
    device = DeviceSpec.from_dict(form.device)
    choices = sorted({step.choice for entry in form.entries for leaf in entry.leaves() for step in leaf.chain})
    plans = {choice: index for index, choice in enumerate(choices)}
    names = [f"{entry.operation.replace('.', '_')}_{index}" for index, entry in enumerate(form.entries)]
    source = files("layerzero_tune.templates").joinpath("table.py.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).from_string(source)
    module = template.render(
        device_name=_plain(device.name),
        summary=_summary(form),
        provenance=form.provenance,
        schema=SCHEMA_VERSION,
        device=_literal(dict(form.device)),
        provenance_literal=_literal(dict(form.provenance)),
        kernels=[(repr(kernel_id), _literal(dict(identity))) for kernel_id, identity in form.kernels.items()],
        plans=[f"({kernel_id!r}, {_literal(json.loads(configuration))})" for kernel_id, configuration in choices],
        entries=[_entry_parts(entry, name, plans) for entry, name in zip(form.entries, names, strict=True)],
        operations=_operations(form.entries, names),
    )
    return EmittedTable(device.slug, module, _evidence(form))


def _plain(text: str) -> str:
    """A text that may stand in a docstring: whatever could end it or begin an escape is left out."""
    return "".join(character for character in text if character.isprintable() and character not in '"\\')


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(value[key])}" for key in sorted(value)) + "}"
    return repr(value)


def _summary(form: TableForm) -> str:
    leaves = sum(len(entry.leaves()) for entry in form.entries)
    operations = len({entry.operation for entry in form.entries})
    return (
        f"{operations} operations, {len(form.entries)} static keys, {leaves} buckets, "
        f"from {form.provenance['measurements']} measurements."
    )


def _entry_parts(entry: Entry, name: str, plans: Mapping[Choice, int]) -> dict[str, Any]:
    leaves = entry.leaves()
    return {
        "description": describe_key(entry.operation, entry.static_key),
        "function": name,
        "parameters": ", ".join(entry.axes),
        "lines": [
            *_range_check(entry),
            *_decision(entry.tree, entry.axes, {id(leaf): i for i, leaf in enumerate(leaves)}),
        ],
        "leaves_name": name.upper(),
        "leaves": [{"chain": _chain(leaf, plans), "comment": _comment(entry, leaf)} for leaf in leaves],
    }


def describe_key(operation: str, static_key: StaticKey) -> str:
    """The static key in plain words."""
    mode, dtype, *values = static_key
    features = [f"{name} {value}" for name, value in zip(operation_named(operation).static, values, strict=False)]
    features += [f"{name} {value}" for name, value in values[-1]]
    return ", ".join([operation, mode, dtype, *features])


def _range_check(entry: Entry) -> list[str]:
    """The lines that refuse what lies outside the measured range."""
    conditions = [
        f"{low} <= {entry.axes[axis]} <= {high}" for axis in entry.free for low, high in (entry.bounds[axis],)
    ]
    if entry.max_product is not None:
        conditions.append(condition(entry.free, entry.max_product, entry.axes))
    return [f"if not ({' and '.join(conditions)}):", f"    return {MISS}"]


def _decision(tree: Tree, axes: Sequence[str], numbers: Mapping[int, int]) -> list[str]:
    if isinstance(tree, Leaf):
        return [f"return {numbers[id(tree)] if tree.chain else MISS}"]
    text, meaning = condition(tree.feature, tree.edge, axes), f"{feature_name(tree.feature, axes)} <= {tree.edge}"
    comment = "" if text == meaning else f"  # {meaning}"
    return [
        f"if {text}:{comment}",
        *(f"    {line}" for line in _decision(tree.low, axes, numbers)),
        *_decision(tree.high, axes, numbers),
    ]


def _chain(leaf: Leaf, plans: Mapping[Choice, int]) -> str:
    steps = [f"({plans[step.choice]}, {tuple(_guard(guard) for guard in step.guards)!r})" for step in leaf.chain]
    return f"({', '.join(steps)}{',' if len(steps) == 1 else ''})"


def _guard(limit: Limit) -> tuple[str, str, Any]:
    return (limit.field, limit.kind, limit.bound)


def _comment(entry: Entry, leaf: Leaf) -> str:
    ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in _named(entry, leaf.region).items())
    if not leaf.chain:
        return f"{ranges}: not measured"
    return f"{ranges}: {leaf.chain[0].choice[0]}"


def _named(entry: Entry, region: Region) -> dict[str, Range]:
    """The ranges of a region by what they hold for: the name of an axis, or that of a feature of several."""
    ranges = {entry.axes[axis]: region.box[axis] for axis in entry.free}
    return ranges | {feature_name(feature, entry.axes): bounds for feature, bounds in region.beside}


def _operations(entries: Sequence[Entry], names: Sequence[str]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    grouped: dict[str, list[tuple[str, str, str]]] = {}
    for entry, name in zip(entries, names, strict=True):
        grouped.setdefault(entry.operation, []).append((repr(entry.static_key), name, name.upper()))
    return [(repr(operation), keys) for operation, keys in grouped.items()]


def _evidence(form: TableForm) -> str:
    """The evidence by operation, static key (its repr) and leaf, as JSON with a line for each leaf."""
    grouped: dict[str, list[str]] = {}
    for entry in form.entries:
        leaves = [
            json.dumps({"bucket": _named(entry, leaf.region), "evidence": leaf.evidence and asdict(leaf.evidence)})
            for leaf in entry.leaves()
        ]
        grouped.setdefault(entry.operation, []).append(f"{json.dumps(repr(entry.static_key))}: {_lines('[]', leaves)}")
    operations = [f"{json.dumps(operation)}: {_lines('{}', keys)}" for operation, keys in grouped.items()]
    return _lines("{}", operations) + "\n"


def _lines(brackets: str, values: Sequence[str]) -> str:
    return "\n".join((brackets[0], ",\n".join(values), brackets[1]))


def leaf_at(tree: Tree, sizes: Sequence[int]) -> Leaf:
    """The leaf of the form that serves these sizes."""
    while isinstance(tree, Split):
        tree = tree.low if feature_at(sizes, tree.feature) <= tree.edge else tree.high
    return tree

"""The YAML form of a policy, read with the line of every part: an error says where, what is allowed and what to do."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from layerzero_runtime.context import (
    ALIGNMENTS,
    APPROXIMATIONS,
    DTYPES,
    LAYOUTS,
    MASKS,
    MODES,
    QUANT_FORMATS,
    SCALINGS,
    SelectionContext,
)
from layerzero_runtime.device import PLATFORMS
from layerzero_runtime.devices.cpu import INSTRUCTION_SETS
from layerzero_runtime.errors import PolicyLoadError
from layerzero_runtime.policies.policy import CONDITION_FIELDS, EMPTY, Policy, Rule
from layerzero_runtime.policies.yaml_part import LARGEST_INTEGER, YamlPart, compose_yaml, suggestion
from layerzero_runtime.selection.limits import Kind, Limit

VERSION = 1

_RULES = tuple(kind.name for kind in fields(Policy))
_GLOBS = ("operation", "kernel", "backend")
_TESTS: Mapping[str, tuple[Kind, ...]] = {
    "int": ("at_least", "at_most", "multiple_of"),
    "float": ("at_least", "at_most"),
    "tuple[int, int]": ("at_least", "at_most"),
}
_REQUIRED = {
    "int": f"an integer from 0 to {LARGEST_INTEGER}",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text",
    "tuple[int, int]": "a pair of integers, such as [9, 0]",
}
_GEOMETRIES = ("square", *ALIGNMENTS)
# The names that a text field may hold; `operation`, which policies share with later versions, is left open.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "weight_dtype": DTYPES,
    "mixed_weight_dtype": DTYPES,
    "output_dtype": DTYPES,
    "other_output_dtype": DTYPES,
    "result_dtype": DTYPES,
    "mode": MODES,
    "layout": LAYOUTS,
    "causal_alignment": ALIGNMENTS,
    "causal_geometry": _GEOMETRIES,
    "causal_mask": _GEOMETRIES,
    "attn_mask": MASKS,
    "approximate": APPROXIMATIONS,
    "scale_x": SCALINGS,
    "scale_w": SCALINGS,
    "quant_format": QUANT_FORMATS,
    "platform": PLATFORMS,
    "instruction_set": tuple(name for name, _ in INSTRUCTION_SETS),
}


def _declared_type(field: str) -> str:
    attribute = vars(SelectionContext)[field]
    if isinstance(attribute, property):
        return str(attribute.fget.__annotations__["return"])
    return str(SelectionContext.__annotations__[field])


# What each field of a context holds, as declared there: a type, and whether the field may be None.
_TYPES = {
    field: (declared.removesuffix(" | None"), declared.endswith(" | None"))
    for field, declared in ((field, _declared_type(field)) for field in CONDITION_FIELDS)
}


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy that a YAML file holds.

    Raises:
        PolicyLoadError: the file cannot be read, is not YAML, or does not hold a policy; says file, line and key.
    """
    name = os.fsdecode(path)
    try:
        with open(name, "rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PolicyLoadError(
            f"{name}:1: cannot be read ({reason}); name a YAML file that this user may read"
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PolicyLoadError(
            f"{name}:1: is not UTF-8: line {line} holds the byte {content[error.start]:#04x}; save the file as UTF-8"
        ) from error
    return parse_policy(text, name)


def parse_policy(text: str, name: str) -> Policy:
    """The policy that a YAML text holds; `name` is what errors and the rules' origins call it.

    Raises:
        PolicyLoadError: the text is not YAML or does not hold a policy, or PyYAML is not installed.
    """
    whole = compose_yaml(text, name)
    if whole is None or whole.is_null:
        return EMPTY
    members = whole.members(("version", *_RULES))
    version = members.get("version")
    # Not by equality alone: true and 1.0 equal 1.
    if version is not None and repr(version.value()) != repr(VERSION):
        raise version.error(
            f"is {version.shown}, this LayerZero reads version {VERSION}; "
            "convert the file, or use the LayerZero that it was written for"
        )
    return Policy(
        **{
            kind: tuple(_rule(kind, part) for part in members[kind].elements()) if kind in members else ()
            for kind in _RULES
        }
    )


def _rule(kind: str, part: YamlPart) -> Rule:
    members = part.members((*_GLOBS, "when", *(("add",) if kind == "boosts" else ())))
    if kind != "boosts" and not members.keys() & {"kernel", "backend"}:
        raise part.error(
            "names neither kernel nor backend, so that it would be about every kernel, which is likely a mistake; "
            'name one of them (kernel: "*" if all are meant)'
        )
    boost = 0.0
    if kind == "boosts":
        if "add" not in members:
            raise part.error("has no add; required is a finite number, what the rule adds: add: 10")
        boost = float(_checked(members["add"], "float"))
    return Rule(
        **{name: _glob(members[name]) for name in _GLOBS if name in members},
        when=tuple(_conditions(members["when"])) if "when" in members else (),
        boost=boost,
        origin=f"{part.file}:{part.line}",
    )


def _glob(part: YamlPart) -> str:
    pattern = part.value()
    if not isinstance(pattern, str) or not pattern:
        raise part.error(f'is {part.shown}, required a glob, such as "torch.*"; write text, in quotes if need be')
    return pattern


def _conditions(part: YamlPart) -> Iterator[Limit]:
    for field, condition in part.members(CONDITION_FIELDS).items():
        if condition.kind == "mapping":
            yield from _tests(condition, field)
            continue
        type_name, may_be_none = _TYPES[field]
        if condition.kind == "sequence" and not (type_name.startswith("tuple") and condition.lists_integers):
            parts = condition.elements()
            if not parts:
                raise condition.error("lists no value, so that no call satisfies it; list at least one")
        else:
            parts = [condition]
        allowed = tuple(_checked(value, type_name, may_be_none, _NAMES.get(field)) for value in parts)
        yield Limit(field, "one_of", allowed)


def _tests(part: YamlPart, field: str) -> Iterator[Limit]:
    type_name, _ = _TYPES[field]
    kinds = _TESTS.get(type_name)
    if kinds is None:
        raise part.error(f"cannot be compared, it is {_REQUIRED[type_name]}; write the value or a list of values")
    members = part.members(kinds)
    if not members:
        raise part.error(f"has no test; write at least one of {', '.join(kinds)}")
    limits = {kind: Limit(field, kind, _bound(members[kind], kind, type_name)) for kind in kinds if kind in members}
    low, high = limits.get("at_least"), limits.get("at_most")
    if low is not None and high is not None and low.bound > high.bound:
        raise part.error(f"asks for at least {low.bound} and at most {high.bound}, which no call satisfies; swap them")
    yield from limits.values()


def _bound(part: YamlPart, kind: Kind, type_name: str) -> Any:
    bound = _checked(part, type_name)
    if kind == "multiple_of" and bound < 1:
        raise part.error(f"is {part.shown}, required an integer of at least 1; correct it")
    return bound


def _checked(part: YamlPart, type_name: str, may_be_none: bool = False, names: Collection[str] | None = None) -> Any:
    """The value of a part, of the type that a context holds there."""
    if may_be_none and part.is_written_null:
        return None
    if type_name.startswith("tuple") and part.kind == "sequence":
        pair = tuple(_checked(number, "int") for number in part.elements())
        if len(pair) == 2:
            return pair
    elif part.kind == "scalar":
        value = part.value()
        if type_name == "str" and isinstance(value, str):
            if names is None or value in names:
                return value
            raise part.error(f"is {value[:40]!r}, allowed: {', '.join(names)}{suggestion(value, names)}")
        if type_name == "bool" and isinstance(value, bool):
            return value
        if not isinstance(value, bool) and type_name == "float" and isinstance(value, int | float):
            return float(value)
        if not isinstance(value, bool) and type_name == "int" and isinstance(value, int) and value >= 0:
            return value
    required = _REQUIRED[type_name] + (", or null" if may_be_none else "")
    raise part.error(f"is {part.shown}, required {required}; correct the value")

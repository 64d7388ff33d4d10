"""`YamlPart`: a piece of a YAML file that knows its line and the keys that lead to it, for errors that name both."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerzero_runtime.errors import PolicyLoadError

if TYPE_CHECKING:
    from yaml.nodes import Node

# More levels than any file of ours has; what is nested deeper is damaged, or made to exhaust the stack.
MAX_DEPTH = 16
LARGEST_INTEGER = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = {"mapping": "map", "sequence": "seq"}
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class YamlPart:
    """A node of a file.

    Attributes:
        path: the keys that lead to it from the top, such as "locks[0].when.dtype".
    """

    node: Node
    file: str
    path: str = ""

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1

    @property
    def kind(self) -> str:
        """What it is: a scalar, a mapping or a sequence."""
        kind = str(getattr(self.node, "id", ""))
        return kind if _COLLECTIONS.get(kind, self._type) == self._type else f"{kind} with the tag {self._type[:40]!r}"

    @property
    def is_null(self) -> bool:
        return self.kind == "scalar" and self._type == "null" and self.node.value in _NULLS

    @property
    def is_written_null(self) -> bool:
        """Whether somebody has written null, and not just nothing behind a colon."""
        return self.is_null and self.node.value != ""

    @property
    def lists_integers(self) -> bool:
        """Whether it is a sequence of integers."""
        return self.kind == "sequence" and all(YamlPart(node, self.file)._type == "int" for node in self.node.value)

    @property
    def shown(self) -> str:
        """The value for a message, short however long it is."""
        if self.kind != "scalar":
            return f"a {self.kind}"
        text: str = self.node.value[:40]
        return repr(text) if self._type == "str" or not text.isprintable() else text or "empty"

    @property
    def _type(self) -> str:
        return str(self.node.tag).removeprefix(_TAG)

    def error(self, problem: str) -> PolicyLoadError:
        return PolicyLoadError(f"{self.file}:{self.line}: {self.path or 'the file'} {problem}")

    def members(self, allowed: Collection[str]) -> dict[str, YamlPart]:
        """The values of a mapping by their keys.

        Raises:
            PolicyLoadError: it is no mapping, or a key is unknown or written twice.
        """
        known = ", ".join(allowed)
        if self.kind != "mapping":
            raise self.error(f"is {self.shown}, required a mapping with keys among: {known}; write key: value")
        found: dict[str, YamlPart] = {}
        lines: dict[str, int] = {}
        for key_node, value in self.node.value:
            key = YamlPart(key_node, self.file, self.path)
            if key.kind != "scalar" or key._type != "str" or key_node.value not in allowed:
                hint = suggestion(key_node.value, allowed) if key.kind == "scalar" else "; write the key as text"
                raise key.error(f"has an unknown key, {key.shown}, allowed: {known}{hint}")
            name: str = key_node.value
            if name in found:
                raise key.error(f"has the key {name!r} twice, first on line {lines[name]}; remove one of the two")
            found[name] = YamlPart(value, self.file, f"{self.path}.{name}" if self.path else name)
            lines[name] = key.line
        return found

    def elements(self) -> list[YamlPart]:
        """The parts of a list; none where nothing is written.

        Raises:
            PolicyLoadError: it is something else.
        """
        if self.is_null:
            return []
        if self.kind != "sequence":
            raise self.error(f"is {self.shown}, required a list; begin each of its items with a dash")
        return [YamlPart(node, self.file, f"{self.path}[{place}]") for place, node in enumerate(self.node.value)]

    def value(self) -> str | int | float | bool | None:
        """The value of a scalar.

        Raises:
            PolicyLoadError: it is no scalar, or none of these types.
        """
        if self.kind != "scalar":
            raise self.error(f"is {self.shown}, required a single value; write one")
        text: str = self.node.value
        number: int | float | None = None
        if self.is_null:
            return None
        if self._type == "str":
            return text
        if self._type == "bool" and text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        try:
            if self._type == "int":
                # Unlike YAML 1.1 this takes no octals such as 010 and no sexagesimals such as 1:30.
                number = int(text, 0)
            elif self._type == "float":
                number = float(text)
        except ValueError:
            pass
        is_too_large = isinstance(number, int) and abs(number) > LARGEST_INTEGER
        if number is None or is_too_large or not math.isfinite(number):
            raise self.error(
                f"is {self.shown}, read as {self._type[:40]!r}; allowed are integers up to "
                f"{LARGEST_INTEGER}, finite numbers, true, false, null and text (perhaps in quotes); correct the value"
            )
        return number


def suggestion(name: str, allowed: Collection[str]) -> str:
    """The end of a message about a name that is not allowed: the next step."""
    from difflib import get_close_matches

    close = get_close_matches(name[:40], allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; correct or remove it"


def compose_yaml(text: str, name: str) -> YamlPart | None:
    """The whole of a YAML text, None if nothing is in it.

    Raises:
        PolicyLoadError: it is not YAML, holds several documents or is nested too deeply, or PyYAML is not installed.
    """
    try:
        import yaml
        from yaml.composer import ComposerError
        from yaml.reader import ReaderError
    except ImportError as error:
        raise PolicyLoadError(
            f"{name}:1: reading a policy from YAML needs PyYAML: pip install 'layerzero-dispatch[policy]'"
        ) from error

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Node | None, index: int) -> Node | None:
            self.depth += 1
            if self.depth > MAX_DEPTH and parent is not None:
                problem = f"nested deeper than {MAX_DEPTH} levels, which no policy is"
                raise ComposerError(problem=problem, problem_mark=parent.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    loader: Loader | None = None
    try:
        # What yaml.compose does, with the loader at hand for its line.
        loader = Loader(text)
        root = loader.get_single_node()
        return None if root is None else YamlPart(root, name)
    except ReaderError as error:
        cause: Exception = error
        line = text.count("\n", 0, error.position) + 1
        reason = f"the character U+{ord(text[error.position]):04X} is not allowed"
    except yaml.MarkedYAMLError as error:
        cause = error
        mark = error.problem_mark or error.context_mark
        line, reason = (mark.line + 1 if mark else 1), ", ".join(filter(None, (error.context, error.problem)))
    except (yaml.YAMLError, ValueError, LookupError) as error:
        # Such as an escape beyond the last character of Unicode, which PyYAML does not check.
        cause, line, reason = error, loader.line + 1 if loader else 1, str(error)
    raise PolicyLoadError(f"{name}:{line}: this is not YAML that can be read: {reason}; correct that line") from cause

"""A table's text may hold literals and decisions; anything else is refused with its line, and nothing of it runs."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.errors import TableError
from layerzero_runtime.tables.table_syntax import MAX_CHARACTERS, MAX_NESTING, check_table_source
from tests.runtime.odd_statements import ODD_IN_FUNCTION, ODD_STATEMENTS

MODULE = '''"""A generated table."""

from __future__ import annotations

from bisect import bisect_left

SCHEMA: int = 1
DEVICE = {"platform": "cpu", "name": "AMD EPYC", "physical_cores": 2, "compute_capability": [9, 0]}
NEGATIVE = -1.5
NAMES: dict[str, tuple[int, ...] | None] = {"a": (1, 2), "b": None}
EDGES = (16, 64, 1024)
LEAVES = (0, 1, -1, 2)


def decide_0(batch_kv_heads: int, seq_len_q: int, seq_len_k: int) -> int:
    """The docstring of a decision."""
    if batch_kv_heads > 256 or not 1 <= seq_len_q <= 4096:
        return -1
    if batch_kv_heads * seq_len_q * seq_len_k <= 123456 and seq_len_k != 7:
        return 1
    if 3 * -(-2 * batch_kv_heads * -(-seq_len_q // 192) // 132) < -seq_len_k * 5 // 7:
        return 4
    elif seq_len_q < 8:
        return 2
    else:
        if seq_len_k == 1:
            return 3
    return LEAVES[bisect_left(EDGES, seq_len_k)]


def decide_1(rows, hidden_size):
    return 0


ENTRIES = {
    "attention.causal": {("eager", "float32", 64, None, True, ()): (decide_0, NAMES, {1, 2, ("x", -3)})},
    "norm.rms": {("eager", "bfloat16", (("offset", 1.0),)): (decide_1, LEAVES)},
}
'''
BISECT = "from bisect import bisect_left\n{}\ndef f(a: int) -> int:\n    return L[bisect_left(E, a)]\n"
LINES = MODULE.splitlines()
END_OF_FUNCTION = LINES.index("    return LEAVES[bisect_left(EDGES, seq_len_k)]") + 1


def refused_line(source: str) -> int:
    with pytest.raises(TableError) as caught:
        check_table_source(source, "some/table.py")
    message = str(caught.value)
    assert message.startswith("some/table.py:")
    assert "compile the results again" in message
    return int(message.split(":")[1])


def test_a_generated_module_is_accepted_and_decides() -> None:
    check_table_source(MODULE, "table.py")
    namespace: dict[str, object] = {}
    exec(compile(MODULE, "table.py", "exec"), namespace)
    decide = namespace["decide_0"]
    assert callable(decide)
    assert [decide(1, 4096, length) for length in (16, 30, 64, 65, 1024, 1025)] == [1, 1, 1, -1, -1, 2]
    assert [decide(*sizes) for sizes in ((257, 1, 1), (1, 4097, 1), (1, 5, 7), (99, 4000, 7))] == [-1, -1, 2, 0]


@pytest.mark.parametrize("source", ["", '"""Only a docstring."""', "X = 1", "def f():\n    return -1"])
def test_small_modules_are_accepted(source: str) -> None:
    check_table_source(source, "table.py")


@pytest.mark.parametrize("statement", ODD_STATEMENTS)
def test_a_statement_too_many_in_the_module(statement: str) -> None:
    first = len(LINES) + 2
    last = first + statement.count("\n")
    assert first <= refused_line(f"{MODULE}\n{statement}\n") <= last


@pytest.mark.parametrize("statement", ODD_IN_FUNCTION)
def test_an_odd_statement_in_a_function(statement: str) -> None:
    lines = list(LINES)
    lines[END_OF_FUNCTION - 1] = f"    {statement}"
    assert refused_line("\n".join(lines)) == END_OF_FUNCTION


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is of Python 3.12")
@pytest.mark.parametrize("statement", ["def f[T: print(1)](a: int) -> int: return 1", "type X = print(1)"])
def test_odd_statements_of_newer_pythons(statement: str) -> None:
    assert refused_line(f"{MODULE}\n{statement}\n") == len(LINES) + 2


@given(statement=st.sampled_from(ODD_STATEMENTS), data=st.data())
@settings(max_examples=150, deadline=None)
def test_wherever_the_statement_stands(statement: str, data: st.DataObject) -> None:
    starts = [i for i, line in enumerate(LINES) if i > LINES.index("SCHEMA: int = 1") and line[:1].isalpha()]
    where = data.draw(st.sampled_from(starts))
    if statement.startswith(("EDGES =", "decide_0 =", "def decide_0", "def f(EDGES")):
        where = starts[-1]  # before the module's own definition of that name it would be right
    lines = [*LINES[:where], *statement.split("\n"), *LINES[where:]]
    assert where + 1 <= refused_line("\n".join(lines)) <= where + 1 + statement.count("\n")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_after_a_random_change_compiles_and_runs(data: st.DataObject) -> None:
    """The check refuses it with TableError, or it is still a module that needs no built-in function to run."""
    position = data.draw(st.integers(0, len(MODULE) - 1))
    length = data.draw(st.integers(0, 12))
    text = data.draw(
        st.sampled_from(["", "(", ")", "[", "-", "0", "1", " ", "\n", ":", ",", "*", "a", "EDGES", "'", '"', "\0", "é"])
    )
    source = MODULE[:position] + text + MODULE[position + length :]
    try:
        check_table_source(source, "table.py")
    except TableError:
        return
    types: dict[str, object] = {kind.__name__: kind for kind in (int, str, tuple, dict)}
    namespace: dict[str, object] = {"__builtins__": {"__import__": __import__, **types}}
    exec(compile(source, "table.py", "exec"), namespace)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(
            st.text(max_size=4) | st.tuples(st.integers(), st.none() | st.text(max_size=3)), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@given(VALUES)
@settings(deadline=None)
def test_every_literal_that_repr_writes_is_accepted(value: object) -> None:
    source = f"X = {value!r}\n"
    try:
        source.encode()
    except UnicodeEncodeError:
        return
    check_table_source(source, "table.py")
    namespace: dict[str, object] = {}
    exec(compile(source, "table.py", "exec"), namespace)
    assert namespace["X"] == value


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_text_is_accepted_or_refused_as_a_table(source: str) -> None:
    try:
        check_table_source(source, "table.py")
    except TableError:
        return
    compile(source, "table.py", "exec")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("X = 1\nY = (\n", 2),
        ("X = 1\n  Y = 2\n", 2),
        ("X = 1\nY = '''\n\n", 2),
        ("X = 1\nY = 2\0\n", 2),
        ("X = 1\nY = " + "9" * 5000, 2),
        ("X = '\ud800'\n", 1),
        ("\ufeffX = 1", 1),
        ("# -*- coding: utf-7 -*-\nX = 1", 1),
        ("#!/usr/bin/python\n# vim: set fileencoding=latin-1 :\nX = 1", 2),
        ("from bisect import bisect_left\nfrom __future__ import annotations\n", 2),
        ("X = 1\nfrom bisect import bisect_left\n", 2),
        ("from bisect import bisect_left as b\n", 1),
        ("from bisect import bisect_left, insort\n", 1),
        ("from bisect import bisect_left, insort as i\n", 1),
        ("from .bisect import bisect_left\n", 1),
        ("bisect_left = 1\n", 1),
        ("1\nX = 1\n", 1),
        ("def f(a: int) -> int:\n    1\n    return 1\n", 2),
        ("def f(a: int) -> int:\n  if a < 1:\n    if a < 0:\n      return 1\n  else:\n    return 2\n", 1),
        ("from __future__ import division\n", 1),
        ("def f(a: int) -> int:\n    if a < 1:\n        return 1\n", 1),
        ("def f(a: int) -> int:\n    if a < 1:\n        return 1\n    else:\n        return 2\n    return 3\n", 6),
        ("def f(a: int) -> int:\n    'no return'\n", 1),
        ("E = (1, 2)\nL = (1, 2, 3)\ndef f(a: int) -> int:\n    return L[bisect_left(E, a)]\n", 4),
        (BISECT.format("E = (2, 1)\nL = (1, 2, 3)"), 5),
        (BISECT.format("E = (1, 1)\nL = (1, 2, 3)"), 5),
        (BISECT.format("E = (1, 2)\nL = (1, 2)"), 5),
        ("X = Y\nY = 1\n", 1),
    ],
)  # fmt: skip
def test_damaged_text_is_refused_with_its_line(source: str, line: int) -> None:
    assert refused_line(source) == line


@pytest.mark.parametrize(
    "source",
    [
        "(" * 1000 + ")" * 1000,
        "X = " + "(" * (MAX_NESTING + 5) + "1" + ",)" * (MAX_NESTING + 5),
        "X = " + "-" * 100_000 + "1",
        "X = a" + ".b" * 200_000,
        "X = 1" + "+1" * 200_000,
        "X = " + "not " * 100_000 + "1",
        "def f(a: int) -> int:\n  if a < 0:\n    return 1\n"
        + "".join(f"  elif a < {i}:\n    return 1\n" for i in range(2000))
        + "  return 1\n",
        "def f(a: int) -> int:\n  if " + "not " * 500 + "a < 0:\n    return 1\n  return 1\n",
        "def f(a: int) -> int:\n  if " + "a * " * 500 + "a < 0:\n    return 1\n  return 1\n",
        "X: " + "tuple[" * 100 + "int" + "]" * 100 + " = 1",
        "#" * (MAX_CHARACTERS + 1),
    ],
)
def test_absurd_size_and_nesting_are_refused(source: str) -> None:
    refused_line(source)


def test_the_nesting_of_generated_trees_is_accepted() -> None:
    depth = MAX_NESTING - 1
    branches = "".join(f"{' ' * level}if a <= {level}:\n" for level in range(1, depth + 1))
    check_table_source(f"def f(a: int) -> int:\n{branches}{' ' * (depth + 1)}return 1\n return 0\n", "table.py")


def test_little_stack_left_is_a_table_error() -> None:
    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            check_table_source("X = " + "(" * 70 + "1" + ",)" * 70, "table.py")

    with pytest.raises(TableError, match="cannot be parsed"):
        descend(sys.getrecursionlimit() - len(inspect.stack(0)) - 40)


def test_the_check_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "written"
    assert refused_line(f"X = 1\nopen({str(witness)!r}, 'w').close()\n") == 2
    check_table_source("X = 1\n", "table.py")
    assert not witness.exists()

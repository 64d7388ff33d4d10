"""The syntax of generated tables: literals and decisions, nothing that could run anything else.

    module     = [docstring] [from __future__ import annotations] [from bisect import bisect_left] definition...
    definition = NAME [: annotation] = value  |  def name(parameter [: int], ...) [-> int]: [docstring] block
    value      = constant  |  -number  |  tuple, list, set or dict of values  |  a name defined above
    block      = [if condition: block [else: block]]... return result
    result     = integer  |  NAME[bisect_left(NAME, parameter)]
    condition  = comparison  |  condition and condition  |  condition or condition  |  not condition
    comparison = operand < operand ...  (or <= > >= == !=)
    operand    = integer  |  parameter  |  -operand  |  operand * operand  |  operand // positive integer

Integers that are compared have 64 bits at most: one of a million digits is divided for seconds.

A name is defined once; every path through a function returns; keys of dicts and elements of sets are constants or
tuples of them; what bisect_left searches are ascending integers, and the sequence that its answer indexes is longer, so
that no decision can fail. Import this module where a table is checked, not before: it needs `ast`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NoReturn

from layerzero_runtime.errors import TableError

# Far above what is generated: a table of 10 000 leaves has about 1 MB and 20 levels.
MAX_CHARACTERS = 4 * 2**20
MAX_NESTING = 80
_BEYOND_64_BITS = 2**64

_ADVICE = "a generated table holds literals and decisions only; compile the results again"
_IMPORTS = (("__future__", "annotations"), ("bisect", "bisect_left"))
_ANNOTATION_NAMES = frozenset(("int", "float", "str", "bool", "object", "tuple", "list", "dict", "set", "frozenset"))
_SEQUENCES = (ast.Tuple, ast.List)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
# PEP 263: a module that is imported is decoded by such a comment, and then is another text than the one checked here.
_ENCODING_COMMENT = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")


def check_table_source(source: str, filename: str) -> None:
    """Check that a module's text has the syntax of a generated table. It is parsed, never run.

    Who runs it must compile this same text.

    Raises:
        TableError: with the file and the line of the first thing that is not allowed.
    """
    _check_text(source, filename)
    try:
        module = ast.parse(source, filename)
        _ModuleCheck(filename).run(module)
    except SyntaxError as error:
        raise TableError(f"{filename}:{error.lineno or 1}: {error.msg}; {_ADVICE}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        # Lone surrogates, or nesting that the parser gives up on; it does not tell the line.
        reason = str(error) or type(error).__name__
        raise TableError(f"{filename}:1: cannot be parsed ({reason}); {_ADVICE}") from error


def _check_text(source: str, filename: str) -> None:
    if len(source) > MAX_CHARACTERS:
        raise TableError(f"{filename}:1: has {len(source)} characters, allowed are {MAX_CHARACTERS}; {_ADVICE}")
    if "\0" in source:
        line = source[: source.index("\0")].count("\n") + 1
        raise TableError(f"{filename}:{line}: holds a null character; {_ADVICE}")
    for line, text in enumerate(source.split("\n", 2)[:2], start=1):
        comment = _ENCODING_COMMENT.match(text)
        if comment and comment[1].lower().replace("_", "-") not in ("utf-8", "utf8"):
            raise TableError(f"{filename}:{line}: encoding {comment[1]} is not allowed, a table is UTF-8; {_ADVICE}")


class _Check:
    def __init__(self, filename: str) -> None:
        self.filename = filename

    def refuse(self, node: ast.AST, what: str) -> NoReturn:
        raise TableError(f"{self.filename}:{getattr(node, 'lineno', 1)}: {what} is not allowed; {_ADVICE}")

    def check_depth(self, node: ast.AST, depth: int) -> None:
        if depth > MAX_NESTING:
            self.refuse(node, f"nesting deeper than {MAX_NESTING} levels")


class _ModuleCheck(_Check):
    """One pass over a module's statements, in order."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename)
        # What is defined so far: of a sequence of integers the values, else None.
        self.names: dict[str, tuple[int, ...] | None] = {}

    def run(self, module: ast.Module) -> None:
        imports: Sequence[tuple[str, str]] = _IMPORTS
        for statement in _without_docstring(module.body):
            if isinstance(statement, ast.ImportFrom):
                imports = self.check_import(statement, imports)
                continue
            imports = ()
            if isinstance(statement, ast.FunctionDef):
                self.check_new_name(statement, statement.name)
                _FunctionCheck(self, statement).run()
                self.names[statement.name] = None
            elif isinstance(statement, ast.Assign):
                self.check_assignment(statement, statement.targets, statement.value)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self.check_annotation(statement.annotation, 0)
                self.check_assignment(statement, [statement.target], statement.value)
            else:
                self.refuse(statement, f"the statement {type(statement).__name__}")

    def check_import(self, statement: ast.ImportFrom, allowed: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Returns the imports that may still follow this one."""
        names = [(statement.module or "", alias.name) for alias in statement.names if alias.asname is None]
        if statement.level or len(statement.names) != 1 or len(names) != 1 or names[0] not in allowed:
            self.refuse(statement, "this import")
        if names[0] == ("bisect", "bisect_left"):
            self.names["bisect_left"] = None
        return allowed[allowed.index(names[0]) + 1 :]

    def check_new_name(self, node: ast.AST, name: str) -> None:
        is_special = name in _ANNOTATION_NAMES or name == "bisect_left" or name.startswith("__")
        if is_special or name in self.names:
            self.refuse(node, f"defining {name}{'' if is_special else ' again'}")

    def check_assignment(self, statement: ast.stmt, targets: Sequence[ast.expr], value: ast.expr) -> None:
        target = targets[0]
        if len(targets) != 1 or not isinstance(target, ast.Name):
            self.refuse(statement, "an assignment to anything but one name")
        self.check_value(value, 0)
        self.check_new_name(statement, target.id)
        self.names[target.id] = _integers(value)

    def check_annotation(self, node: ast.expr, depth: int) -> None:
        self.check_depth(node, depth)
        parts: Sequence[ast.expr] = ()
        if isinstance(node, ast.Subscript):
            parts = (node.value, node.slice)
        elif isinstance(node, ast.Tuple):
            parts = node.elts
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            parts = (node.left, node.right)
        elif not (isinstance(node, ast.Name) and node.id in _ANNOTATION_NAMES) and not (
            isinstance(node, ast.Constant) and node.value in (None, Ellipsis)
        ):
            self.refuse(node, f"{type(node).__name__} in an annotation")
        for part in parts:
            self.check_annotation(part, depth + 1)

    def check_value(self, node: ast.expr, depth: int) -> None:
        if _is_constant(node):
            return
        self.check_depth(node, depth)
        if isinstance(node, _SEQUENCES):
            for element in node.elts:
                self.check_value(element, depth + 1)
        elif isinstance(node, ast.Set):
            for element in node.elts:
                self.check_key(element, depth + 1)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is None:
                    self.refuse(value, "** in a dict")
                self.check_key(key, depth + 1)
                self.check_value(value, depth + 1)
        elif not isinstance(node, ast.Name):
            self.refuse(node, f"the value {type(node).__name__}")
        elif node.id == "bisect_left" or node.id not in self.names:
            self.refuse(node, f"the name {node.id}, which no assignment or function above defines,")

    def check_key(self, node: ast.expr, depth: int) -> None:
        """A key of a dict or an element of a set: a constant, or a tuple of constants and such tuples."""
        self.check_depth(node, depth)
        if isinstance(node, ast.Tuple):
            for element in node.elts:
                self.check_key(element, depth + 1)
        elif not _is_constant(node):
            self.refuse(node, f"the key {type(node).__name__}")


class _FunctionCheck(_Check):
    """One pass over a decision function."""

    def __init__(self, module: _ModuleCheck, function: ast.FunctionDef) -> None:
        super().__init__(module.filename)
        self.module = module
        self.function = function
        self.parameters: set[str] = set()

    def run(self) -> None:
        function, arguments = self.function, self.function.args
        if function.decorator_list:
            self.refuse(function.decorator_list[0], "a decorator")
        special = (arguments.posonlyargs, arguments.kwonlyargs, arguments.vararg, arguments.kwarg, arguments.defaults)
        if any(special) or getattr(function, "type_params", None):
            self.refuse(function, "a parameter other than a plain one")
        for argument in arguments.args:
            self.module.check_new_name(argument, argument.arg)
            if argument.arg in (function.name, *self.parameters):
                self.refuse(argument, f"a second {argument.arg}")
            self.parameters.add(argument.arg)
        for annotation in (function.returns, *(argument.annotation for argument in arguments.args)):
            if annotation is not None and not _is_name(annotation, "int"):
                self.refuse(annotation, "declaring anything but int")
        if not self.check_block(_without_docstring(function.body), 0):
            self.refuse(function, "a function with a path that does not return")

    def check_block(self, statements: Sequence[ast.stmt], depth: int) -> bool:
        """Whether every path through the block returns."""
        returns = False
        for statement in statements:
            self.check_depth(statement, depth)
            if returns:
                self.refuse(statement, "a statement that is never reached")
            if isinstance(statement, ast.Return):
                self.check_result(statement)
                returns = True
            elif isinstance(statement, ast.If):
                self.check_condition(statement.test, 0)
                body_returns = self.check_block(statement.body, depth + 1)
                returns = self.check_block(statement.orelse, depth + 1) and body_returns
            else:
                self.refuse(statement, f"the statement {type(statement).__name__} in a function")
        return returns

    def check_result(self, statement: ast.Return) -> None:
        value, names = statement.value, self.module.names
        if value is not None and _integer(value) is not None:
            return
        call = value.slice if isinstance(value, ast.Subscript) else None
        if not (
            isinstance(value, ast.Subscript)
            and isinstance(call, ast.Call)
            and _is_name(call.func, "bisect_left")
            and "bisect_left" in names
            and len(call.args) == 2
            and not call.keywords
        ):
            self.refuse(statement, "returning anything but an integer or NAME[bisect_left(NAME, parameter)]")
        results, edges = (
            names.get(node.id) if isinstance(node, ast.Name) else None for node in (value.value, call.args[0])
        )
        if not isinstance(call.args[1], ast.Name) or call.args[1].id not in self.parameters:
            self.refuse(statement, "searching for anything but a parameter")
        if edges is None or list(edges) != sorted(set(edges)):
            self.refuse(statement, "searching anything but ascending integers")
        if results is None or len(results) <= len(edges):
            self.refuse(statement, "indexing anything but integers, one more than there are edges,")

    def check_condition(self, node: ast.expr, depth: int) -> None:
        self.check_depth(node, depth)
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self.check_condition(value, depth + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.check_condition(node.operand, depth + 1)
        elif isinstance(node, ast.Compare) and all(isinstance(operator, _COMPARISONS) for operator in node.ops):
            for operand in (node.left, *node.comparators):
                self.check_operand(operand, depth + 1)
        else:
            self.refuse(node, f"the condition {type(node).__name__}")

    def check_operand(self, node: ast.expr, depth: int) -> None:
        self.check_depth(node, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.FloorDiv):
            self.check_operand(node.left, depth + 1)
            self.check_operand(node.right, depth + 1)
            if isinstance(node.op, ast.FloorDiv) and (_integer(node.right) or 0) < 1:
                self.refuse(node, "dividing by anything but a positive integer")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self.check_operand(node.operand, depth + 1)
        elif (value := _integer(node)) is not None:
            if value >= _BEYOND_64_BITS:
                self.refuse(node, "comparing an integer of more than 64 bits")
        elif not (isinstance(node, ast.Name) and node.id in self.parameters):
            self.refuse(node, "comparing anything but integers, parameters, their products and quotients")


def _is_name(node: ast.expr | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _without_docstring(statements: list[ast.stmt]) -> list[ast.stmt]:
    first = statements[0].value if statements and isinstance(statements[0], ast.Expr) else None
    return statements[1:] if isinstance(first, ast.Constant) and type(first.value) is str else statements


def _is_constant(node: ast.expr) -> bool:
    """None, a bool, a string or a number, which alone may have a minus."""
    if isinstance(node, ast.Constant):
        return node.value is None or type(node.value) in (int, str, bool, float)
    negated = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else None
    return isinstance(negated, ast.Constant) and (type(negated.value) is int or type(negated.value) is float)


def _integer(node: ast.expr) -> int | None:
    """The value of an integer with or without a minus, None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if type(node.operand.value) is int else None
    return None


def _integers(node: ast.expr) -> tuple[int, ...] | None:
    """The values of a tuple or list of integers, None for anything else."""
    values = [_integer(element) for element in node.elts] if isinstance(node, _SEQUENCES) else [None]
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None

"""What is wrong in a policy file is said with its line, its key and what is allowed."""

from __future__ import annotations

import pytest

from layerzero_runtime.errors import PolicyLoadError
from layerzero_runtime.policies.policy_file import parse_policy


def rule_with(line: str) -> str:
    """A lock whose conditions stand on line 4 and below."""
    return f"locks:\n- kernel: a.b\n  when:\n    {line}\n"


ERRORS = [
    # Unknown keys, at every level.
    ("lock: []", 1, ["the file has an unknown key", "'lock'", "version, locks, allows", "did you mean 'locks'?"]),
    (
        "locks:\n- kernel: a\n  kernal: b",
        3,
        ["locks[0]", "'kernal'", "operation, kernel, backend, when", "'kernel'?"],
    ),
    (rule_with("seq_len: 4"), 4, ["locks[0].when", "'seq_len'", "seq_len_k, seq_len_q", "did you mean"]),
    (rule_with("device: cpu"), 4, ["locks[0].when", "'device'"]),
    (rule_with("rows: {atleast: 4}"), 4, ["locks[0].when.rows", "'atleast'", "at_least, at_most, multiple_of"]),
    (rule_with("scale: {multiple_of: 4}"), 4, ["locks[0].when.scale", "'multiple_of'", "at_least, at_most;"]),
    ("locks: []\n1: 2", 2, ["unknown key, 1,"]),
    ("? [locks]\n: 3", 1, ["unknown key, a sequence", "write the key as text"]),
    ("<<: {locks: []}", 1, ["unknown key, <<"]),
    # Keys written twice.
    ("locks: []\ndenies: []\nlocks: []", 3, ["the file", "'locks' twice", "first on line 1", "remove one"]),
    ("denies:\n- kernel: a\n  when: {}\n  kernel: b", 4, ["denies[0]", "'kernel' twice", "first on line 2"]),
    (rule_with("rows: 1\n    rows: 2"), 5, ["locks[0].when", "'rows' twice", "first on line 4"]),
    (rule_with("rows: {at_most: 1, at_most: 2}"), 4, ["locks[0].when.rows", "'at_most' twice"]),
    # Another kind of node.
    ("- locks", 1, ["the file is a sequence", "required a mapping"]),
    ("locks", 1, ["the file is 'locks'", "required a mapping"]),
    ("denies:\n  kernel: a", 2, ["denies is a mapping", "required a list", "dash"]),
    ("denies: 3", 1, ["denies is 3", "required a list"]),
    ("denies:\n- a.b", 2, ["denies[0] is 'a.b'", "required a mapping", "operation, kernel"]),
    ("denies:\n-", 2, ["denies[0] is empty", "required a mapping"]),
    ("denies:\n- kernel: a\n  when: [rows]", 3, ["denies[0].when is a sequence", "required a mapping"]),
    ("denies:\n- kernel: a\n  when:", 3, ["denies[0].when is empty", "required a mapping"]),
    ("denies:\n- kernel: [a, b]", 2, ["denies[0].kernel is a sequence", "required a single value"]),
    ("denies: !rules []", 1, ["denies is a sequence with the tag '!rules'"]),
    (rule_with("rows: !odd 3"), 4, ["locks[0].when.rows", "'!odd'"]),
    # Globs.
    ("denies:\n- kernel: 5", 2, ["denies[0].kernel is 5", "required a glob"]),
    ("denies:\n- kernel:", 2, ["denies[0].kernel is empty", "required a glob"]),
    ("denies:\n- kernel: ''", 2, ["denies[0].kernel is ''", "required a glob"]),
    ("denies:\n- kernel: *torch", 2, ["undefined alias 'torch'", "correct that line"]),
    # Rules about everything.
    ("locks:\n- operation: mlp.*", 2, ["locks[0]", "neither kernel nor backend", "name one of them"]),
    ("allows:\n- {}", 2, ["allows[0]", "neither kernel nor backend"]),
    ("\ndenies:\n\n- when: {rows: 3}", 4, ["denies[0]", "neither kernel nor backend"]),
    # What a boost adds.
    ("boosts:\n- kernel: a", 2, ["boosts[0] has no add", "finite number", "add: 10"]),
    ("boosts:\n- kernel: a\n  add: much", 3, ["boosts[0].add is 'much'", "required a finite number"]),
    ("boosts:\n- kernel: a\n  add: .inf", 3, ["boosts[0].add is .inf", "finite"]),
    ("boosts:\n- kernel: a\n  add: .nan", 3, ["boosts[0].add is .nan", "finite"]),
    ("boosts:\n- kernel: a\n  add: 1.0e+999", 3, ["boosts[0].add", "finite"]),
    ("boosts:\n- kernel: a\n  add: true", 3, ["boosts[0].add is true", "required a finite number"]),
    ("boosts:\n- kernel: a\n  add: null", 3, ["boosts[0].add is null", "required a finite number"]),
    ("locks:\n- kernel: a\n  add: 10", 3, ["locks[0]", "'add'", "operation, kernel, backend, when"]),
    # Values of conditions.
    (rule_with("dtype: fp16"), 4, ["locks[0].when.dtype is 'fp16'", "allowed: float64, float32"]),
    (rule_with("dtype:\n    - float16\n    - flaot32"), 6, ["dtype[1] is 'flaot32'", "did you mean 'float32'?"]),
    (rule_with("dtype: 16"), 4, ["locks[0].when.dtype is 16", "required text"]),
    (rule_with("dtype: no"), 4, ["locks[0].when.dtype is no", "required text"]),
    (rule_with("dtype: {at_least: 3}"), 4, ["locks[0].when.dtype", "cannot be compared"]),
    (rule_with("dtype: []"), 4, ["locks[0].when.dtype", "lists no value", "at least one"]),
    (rule_with("dtype: null"), 4, ["locks[0].when.dtype is null", "required text;"]),
    (rule_with("requires_grad: 1"), 4, ["locks[0].when.requires_grad is 1", "required true or false"]),
    (rule_with("requires_grad: {at_most: 1}"), 4, ["locks[0].when.requires_grad", "cannot be compared"]),
    (rule_with("rows: true"), 4, ["locks[0].when.rows is true", "required an integer"]),
    (rule_with("rows: '8'"), 4, ["locks[0].when.rows is '8'", "required an integer"]),
    (rule_with("rows: 8.5"), 4, ["locks[0].when.rows is 8.5", "required an integer"]),
    (rule_with("rows: -8"), 4, ["locks[0].when.rows is -8", "required an integer from 0"]),
    (rule_with("rows:"), 4, ["locks[0].when.rows is empty", "or null"]),
    (rule_with("rows: [[8]]"), 4, ["locks[0].when.rows[0] is a sequence", "required an integer"]),
    (rule_with("rows: 010"), 4, ["locks[0].when.rows is 010"]),
    (rule_with("rows: 1:30"), 4, ["locks[0].when.rows is 1:30"]),
    (rule_with("rows: 2026-01-01"), 4, ["locks[0].when.rows is 2026-01-01", "'timestamp'"]),
    (rule_with(f"rows: {'9' * 5000}"), 4, ["locks[0].when.rows is 9", "integers up to"]),
    (rule_with(f"rows: 0x{'f' * 5000}"), 4, ["locks[0].when.rows is 0xf", "integers up to"]),
    (rule_with("rows: {}"), 4, ["locks[0].when.rows has no test", "at_least, at_most, multiple_of"]),
    (rule_with("rows:\n      at_least: x"), 5, ["locks[0].when.rows.at_least is 'x'", "required an integer"]),
    (rule_with("rows: {at_least: true}"), 4, ["locks[0].when.rows.at_least is true"]),
    (rule_with("rows: {at_least: null}"), 4, ["locks[0].when.rows.at_least is null"]),
    (rule_with("rows: {at_least: [1, 2]}"), 4, ["locks[0].when.rows.at_least is a sequence"]),
    (rule_with("rows: {multiple_of: 0}"), 4, ["locks[0].when.rows.multiple_of is 0", "at least 1"]),
    (rule_with("rows: {at_least: 9, at_most: 8}"), 4, ["locks[0].when.rows", "which no call satisfies"]),
    (rule_with("sm: 9.0"), 4, ["locks[0].when.sm is 9.0", "a pair of integers, such as [9, 0]"]),
    (rule_with("sm: [9]"), 4, ["locks[0].when.sm is a sequence", "a pair"]),
    (rule_with("sm: {at_least: 9}"), 4, ["locks[0].when.sm.at_least is 9", "a pair"]),
    (rule_with("sm: {multiple_of: [1, 1]}"), 4, ["locks[0].when.sm", "'multiple_of'"]),
    # What is no YAML.
    ("locks:\n\t- kernel: a", 2, ["not YAML that can be read", "'\\t'", "correct that line"]),
    ("locks: [\n\n", 3, ["not YAML"]),
    ('locks:\n- kernel: "a', 2, ["not YAML", "quoted scalar"]),
    ("locks: []\nlocks\n", 3, ["not YAML"]),
    ("locks: []\n--- \nlocks: []", 2, ["another document"]),
    ("locks: []\n\x07", 2, ["U+0007"]),
    ("\ufffe", 1, ["U+FFFE"]),
    ("locks: []\ndenies:\n- kernel: \ud800", 3, ["U+D800"]),
    ('locks:\n- kernel: "\\U00110000"', 2, ["not YAML"]),
    (f"%YAML {'1' * 5000}.1\n---\n", 1, ["not YAML"]),
    ("locks: *a", 1, ["undefined alias 'a'"]),
    # What contains itself, or goes on and on.
    ("&a [*a]", 1, ["the file is a sequence"]),
    ("locks: &a\n- *a", 1, ["locks[0] is a sequence"]),
    ("locks:\n- &a\n  kernel: a\n  when: *a", 3, ["locks[0].when", "'kernel'"]),
    (rule_with("dtype: &a [*a]"), 4, ["locks[0].when.dtype[0] is a sequence"]),
    (rule_with("sm: &a [*a, *a]"), 4, ["locks[0].when.sm[0]"]),
    ("locks: " + "[" * 100_000, 1, ["nested deeper than 16 levels"]),
    ("{a: " * 5_000, 1, ["nested deeper than 16 levels"]),
    ("\n".join(" " * depth + "a:" for depth in range(3_000)), 16, ["nested deeper than 16 levels"]),
]


@pytest.mark.scenario("FS-018")
@pytest.mark.parametrize(("text", "line", "parts"), ERRORS, ids=[parts[0] for _, _, parts in ERRORS])
def test_errors_say_line_key_and_what_is_allowed(text: str, line: int, parts: list[str]) -> None:
    with pytest.raises(PolicyLoadError) as caught:
        parse_policy(text, "some/p.yaml")
    message = str(caught.value)
    assert message.startswith(f"some/p.yaml:{line}: ")
    for part in parts:
        assert part in message
    # However long what it complains about is.
    assert len(message) < 1200

"""Ten thousand damaged policy files: each gives a policy that works or an error with a line, never anything else."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from layerzero_runtime.errors import PolicyLoadError
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.policies.policy_file import load_policy, parse_policy
from tests.runtime.test_policy_file import WHOLE
from tests.scenarios.conftest import attention, norm, spec

MUTATIONS = 10_000
SEEDS = (
    WHOLE,
    "denies:\n- kernel: torch.matmul\n- backend: flash_attn\n  operation: attention.*\n",
    "version: 1\nlocks: [{kernel: a.b, when: {rows: {at_least: 8}, dtype: [float16, int8]}}]\nallows: []\n",
    "boosts:\n  - {backend: torch, add: 1.5, when: {is_causal: true, scale: {at_most: 0.5}}}\n  - kernel: 'a.*'\n"
    "    add: 2\n",
    "denies: [{kernel: a.b, when: &w {seq_len_q: {multiple_of: 16}, sm: {at_least: [9, 0]}}}]\n"
    "locks:\n- kernel: c.d\n  when: *w\n",
    '# only a comment\nlocks:\nallows:\n- kernel: "*" # all\n\ndenies: !!seq []\n',
)
# Words of the format, what YAML reads in its own way, and characters that mean something to it.
WORDS = """
    version locks denies boosts kernel backend when add at_least multiple_of dtype sm rows float16 is_causal
    null ~ true yes 1 -1 0 1e5 .inf .nan 0x1F 010 2026-01-01 [] {} [ ] { } : | > &a *a *w << = --- ... " ' # , \\ é
    !!python/object:os.system !!int !!binary "\\U00110000" "\\uD800" [z-a]* [[]
"""
TOKENS = (*WORDS.split(), "9" * 40, "- ", "? ", "%YAML 1.1", "", "\t", "\n", "\0", "\x85", "\u2028", "\ufeff")
_TOKEN = re.compile(rb"[\w.*]+|[^\w\s]|[ \t]+")


def flip_bytes(content: bytes, source: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(source.randint(1, 3)):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def change_lines(content: bytes, source: random.Random) -> bytes:
    """Delete, double or swap lines."""
    lines = content.split(b"\n")
    first, second = (source.randrange(len(lines)) for _ in range(2))
    kind = source.choice(("delete", "double", "swap"))
    if kind == "delete":
        del lines[first]
    elif kind == "double":
        lines.insert(second, lines[first])
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def change_indentation(content: bytes, source: random.Random) -> bytes:
    lines = content.split(b"\n")
    place = source.randrange(len(lines))
    bare = lines[place].lstrip()
    lines[place] = source.choice((b" ", b"\t")) * source.randrange(9) + bare
    return b"\n".join(lines)


def replace_tokens(content: bytes, source: random.Random) -> bytes:
    tokens = list(_TOKEN.finditer(content))
    if not tokens:
        return content
    found = source.choice(tokens)
    others = [*(token.encode() for token in TOKENS), source.choice(tokens)[0]]
    return content[: found.start()] + source.choice(others) + content[found.end() :]


def truncate(content: bytes, source: random.Random) -> bytes:
    cut = source.randrange(len(content))
    return content[:cut] if source.random() < 0.7 else content[cut:]


MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bytes,
    change_lines,
    change_indentation,
    replace_tokens,
    replace_tokens,
    truncate,
)


def mutated(source: random.Random) -> bytes:
    """A valid file with one to three changes."""
    content = source.choice(SEEDS).encode()
    for _ in range(source.randint(1, 3)):
        content = source.choice(MUTATORS)(content, source) or b"\n"
    return content


def use(policy: Policy) -> None:
    """What selection, explanation and digest ask of a policy."""
    for context, declared in (
        (attention(), spec("a.b")),
        (attention(operation="attention.causal", seq_len_k=1024, num_kv_heads=4, scale=0.25), spec("torch.matmul")),
        (norm(), spec("c.d", operations=("norm.rms",))),
    ):
        policy.denial(declared, context)
        policy.boost(declared, context)
        policy.overrules_measurement(context)
        policy.relevance(context, ("dtype", "sm"))
    assert all(str(rule) and re.search(r":\d+$", rule.origin) for rule in policy.rules())
    assert repr(policy)


def outcome(path: Path, content: bytes) -> str:
    """ "policy", or the message of the error without what varies."""
    path.write_bytes(content)
    try:
        policy = load_policy(path)
    except PolicyLoadError as error:
        text = str(error)
        found = re.match(re.escape(str(path)) + r":(\d+): (.+)", text, re.DOTALL)
        assert found is not None, text
        # A line of the file, or the end behind its last one. YAML breaks lines at more characters than "\n".
        breaks = len(re.findall("\r\n|[\r\n\x85\u2028\u2029]", content.decode(errors="replace")))
        assert 1 <= int(found[1]) <= breaks + 1, text
        assert len(text) < 2000
        return re.sub(r"\d|'.*?'", "", found[2])[:60]
    assert isinstance(policy, Policy)
    use(policy)
    return "policy"


def test_the_files_before_they_are_damaged_are_policies() -> None:
    for text in SEEDS:
        use(parse_policy(text, "seed"))
    assert sum(len(parse_policy(text, "seed").rules()) for text in SEEDS) >= 12


@pytest.mark.scenario("FS-018")
def test_damaged_files_give_a_policy_or_an_error_with_a_line(tmp_path: Path) -> None:
    source = random.Random(20260301)
    path = tmp_path / "policy.yaml"
    outcomes: Counter[str] = Counter()
    for number in range(MUTATIONS):
        content = mutated(source)
        try:
            outcomes[outcome(path, content)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} gives {error!r}: {content!r}") from error
    assert outcomes.total() == MUTATIONS
    # Both ways are taken often, and many kinds of error are met.
    assert outcomes["policy"] > MUTATIONS // 20
    assert outcomes.total() - outcomes["policy"] > MUTATIONS // 4
    assert len(outcomes) > 100

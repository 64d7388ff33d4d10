"""Policies in YAML files: the format, what cannot be read, and what a broken file does to the policy in force."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.context import FIELD_NAMES, SelectionContext
from layerzero_runtime.errors import PolicyLoadError
from layerzero_runtime.policies.policy import CONDITION_FIELDS, EMPTY, Policy, Rule
from layerzero_runtime.policies.policy_file import load_policy, parse_policy
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.test_dispatch import DEFAULT, IN_PLACE, LARGE, SMALL, changes, lines, swiglu_context

WHOLE = """\
# What serves what.
version: 1
locks:
  - operation: attention.*
    kernel: torch.sdpa
    backend: torch
    when:
      seq_len_q: {at_least: 128, at_most: 1024}
      dtype: [float16, bfloat16]
      requires_grad: false
      head_dim:
        multiple_of: 64
allows: []
denies:
  - backend: "flash_*"

  - {kernel: torch.matmul, when: {sm: {at_most: [8, 9]}, quant_format: null, scale: 1}}
boosts:
  - kernel: "torch.matmul*"
    add: 10
  - operation: norm.*
    add: -2.5
    when: {sm: [[8, 0], [9, 0]], platform: cuda, dropout_p: [0, 0.5], is_causal: yes}
"""


@pytest.fixture(autouse=True)
def no_policy_is_left() -> Iterator[None]:
    yield
    dispatch.set_policy(None)


def test_the_format() -> None:
    policy = parse_policy(WHOLE, "whole.yaml")
    assert policy == Policy(
        locks=(
            Rule(
                operation="attention.*",
                kernel="torch.sdpa",
                backend="torch",
                when=(
                    Limit("seq_len_q", "at_least", 128),
                    Limit("seq_len_q", "at_most", 1024),
                    Limit("dtype", "one_of", ("float16", "bfloat16")),
                    Limit("requires_grad", "one_of", (False,)),
                    Limit("head_dim", "multiple_of", 64),
                ),
                origin="whole.yaml:4",
            ),
        ),
        denies=(
            Rule(backend="flash_*", origin="whole.yaml:15"),
            Rule(
                kernel="torch.matmul",
                when=(
                    Limit("sm", "at_most", (8, 9)),
                    Limit("quant_format", "one_of", (None,)),
                    Limit("scale", "one_of", (1.0,)),
                ),
                origin="whole.yaml:17",
            ),
        ),
        boosts=(
            Rule(kernel="torch.matmul*", boost=10.0, origin="whole.yaml:19"),
            Rule(
                operation="norm.*",
                boost=-2.5,
                when=(
                    Limit("sm", "one_of", ((8, 0), (9, 0))),
                    Limit("platform", "one_of", ("cuda",)),
                    Limit("dropout_p", "one_of", (0.0, 0.5)),
                    Limit("is_causal", "one_of", (True,)),
                ),
                origin="whole.yaml:21",
            ),
        ),
    )


def test_every_value_is_of_the_type_that_the_context_has() -> None:
    """1 is true and 1.0 to Python, so equality alone does not show it."""
    [rule] = parse_policy(
        "denies:\n- {kernel: a.b, when: {scale: 1, requires_grad: true, rows: 1, sm: [9, 0]}}", "p"
    ).denies
    values = [limit.bound[0] for limit in rule.when]
    assert [type(value) for value in values] == [float, bool, int, tuple]


@pytest.mark.scenario("EC-033")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "# nothing\n",
        "---\n",
        "~",
        "version: 1",
        "locks: []\nallows: []\ndenies: []\nboosts: []",
        "locks:\n",
    ],
)
def test_files_without_a_rule_are_the_empty_policy(text: str) -> None:
    assert parse_policy(text, "p.yaml") == EMPTY


def test_parts_may_be_shared_by_anchors() -> None:
    text = "locks:\n- kernel: a.b\n  when: &short {rows: {at_most: 8}}\ndenies:\n- {kernel: c.d, when: *short}\n"
    policy = parse_policy(text, "p.yaml")
    assert policy.locks[0].when == policy.denies[0].when == (Limit("rows", "at_most", 8),)


@pytest.mark.parametrize("field", CONDITION_FIELDS)
def test_every_field_of_a_context_can_be_a_condition(field: str) -> None:
    """A call's own value, written down, is a condition that holds for it; a number between bounds does as well."""
    context = SelectionContext(
        operation="attention.cross",
        dtype="float16",
        output_dtype="float32",
        weight_dtype="bfloat16",
        batch_size=2,
        seq_len_q=3,
        seq_len_k=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        v_head_dim=16,
        quant_format="int8",
        workspace_limit=100,
        scale=0.3,
        device=lz.DeviceSpec("cuda", "H100", compute_capability=(9, 0)),
    )
    value = getattr(context, field)
    written = "null" if value is None else str(list(value)) if isinstance(value, tuple) else str(value).lower()
    conditions = [written, f"[{written}]"]
    if isinstance(value, int | float | tuple) and not isinstance(value, bool):
        conditions.append(f"{{at_least: {written}, at_most: {written}}}")
    for condition in conditions:
        [rule] = parse_policy(f"denies:\n- kernel: a.b\n  when:\n    {field}: {condition}", "p").denies
        assert rule.applies(context), condition


@pytest.mark.scenario("FS-021")
@pytest.mark.parametrize("version", ["2", "0", "1.0", "true", "'1'", "null", "", "[1]", "one"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(PolicyLoadError, match=r"^p\.yaml:2: version is .*(reads version 1|required a single value)"):
        parse_policy(f"locks: []\nversion: {version}", "p.yaml")


@pytest.mark.scenario("FS-021")
def test_a_file_of_another_version_leaves_the_defaults(snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 2\ndenies: [{{kernel: {IN_PLACE}}}]\n", encoding="utf-8")
    with pytest.raises(PolicyLoadError, match=r"policy\.yaml:1: version is 2"):
        lz.set_policy(str(path))
    assert lz.select(swiglu_context(*SMALL)).kernel_id == IN_PLACE


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, folder, binary = tmp_path / "missing.yaml", tmp_path / "folder", tmp_path / "binary.yaml"
    folder.mkdir()
    binary.write_bytes(b"locks: []\nallows: []\n# \xff\n")
    for path, reason in (
        (missing, "No such file or directory"),
        (folder, "Is a directory"),
        (tmp_path / "a\0b", "null byte"),
        (binary, "is not UTF-8: line 3 holds the byte 0xff; save the file as UTF-8"),
    ):
        with pytest.raises(PolicyLoadError) as caught:
            load_policy(path)
        assert str(caught.value).startswith(f"{path}:1: ")
        assert reason in str(caught.value)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_is_read_under_the_name_given(as_text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the marker that some editors put in front, and with the line ends of Windows."""
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    path = "policy.yaml" if as_text else Path("policy.yaml")
    assert load_policy(path) == parse_policy(WHOLE, "policy.yaml")


def test_without_pyyaml_the_error_names_the_extra(tmp_path: Path) -> None:
    """In a process of its own, where importing yaml fails; nothing else needs it."""
    (tmp_path / "policy.yaml").write_text("locks: []\n", encoding="utf-8")
    program = (
        "import sys; sys.modules['yaml'] = None\n"
        "import layerzero_runtime as lz\n"
        "lz.set_policy(lz.Policy())\n"
        "try:\n    lz.set_policy('policy.yaml')\n"
        "except lz.PolicyLoadError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lz.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("policy.yaml:1: ")
    assert "pip install 'layerzero-dispatch[policy]'" in done.stdout


@pytest.mark.scenario("FS-018")
def test_a_broken_file_leaves_the_policy_in_force(
    snapshot: Snapshot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "layerzero")
    path = tmp_path / "policy.yaml"
    path.write_text(f"denies:\n- kernel: {IN_PLACE}\n", encoding="utf-8")
    lz.set_policy(str(path))
    in_force = dispatch.current_snapshot()
    assert lz.select(swiglu_context(*SMALL)).kernel_id == DEFAULT
    before = lz.stats()

    path.write_text(f"denies:\n- kernel: {IN_PLACE}\n  wen: {{rows: 3}}\n", encoding="utf-8")
    with pytest.raises(PolicyLoadError):
        lz.set_policy(str(path))

    assert dispatch.current_snapshot() is in_force
    assert lz.select(swiglu_context(*SMALL)).kernel_id == DEFAULT
    assert lz.explain(swiglu_context(*SMALL)).policy == (f"denies kernel {IN_PLACE} ({path}:2)",)
    assert changes(before)["policies_refused"] == 1
    [line] = [line for line in lines(caplog) if "policy" in line and "first miss" not in line]
    assert line.startswith(f"{path}:3: denies[0] has an unknown key, 'wen'")
    assert line.endswith("the policy before it stays in force")

    # Mended, it takes the place of the old one, as a whole.
    path.write_text(f"denies:\n- kernel: {DEFAULT}\n", encoding="utf-8")
    lz.set_policy(str(path))
    assert lz.select(swiglu_context(*SMALL)).kernel_id == IN_PLACE
    assert lz.select(swiglu_context(*LARGE)).kernel_id != DEFAULT
    assert changes(before)["policies_refused"] == 1


def test_conditions_of_files_name_every_field_of_a_context() -> None:
    """What is a condition follows the context: a field that is added there can be used here."""
    assert set(FIELD_NAMES) <= set(CONDITION_FIELDS)
    properties = {name for name, value in vars(SelectionContext).items() if isinstance(value, property)}
    assert set(CONDITION_FIELDS) == {*FIELD_NAMES, *properties}

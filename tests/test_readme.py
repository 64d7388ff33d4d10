"""The README tells the truth: its examples print what it says, its figures are those of the committed files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
_EXAMPLE = re.compile(r"<!-- example -->\n```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
EXAMPLES = _EXAMPLE.findall(README)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_prints_what_the_readme_says(code: str, printed: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == printed


@pytest.mark.parametrize("name", ["measured", "dispatch"])
def test_a_section_of_figures_comes_from_the_committed_results(name: str) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "measured_table.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60).stdout
    section = re.compile(f"<!-- {name} -->\n.*?<!-- end {name} -->\n", re.DOTALL)
    [found] = section.findall(README)
    assert section.findall(printed) == [found]
    assert "|" in found


def test_every_command_of_the_readme_exists() -> None:
    command = Path(sys.executable).with_name("layerzero-tune")
    run = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=60)
    commands = set(re.findall(r"layerzero-tune (\w+)", README))
    assert commands <= set(re.findall(r"\w+", run.stdout))
